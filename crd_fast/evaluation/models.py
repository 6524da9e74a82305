"""The model that makes images: a pipeline, or one around a model that full fine-tuning has saved alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from crd_fast import backbones
from crd_fast.backbones import Backbone, LoadOptions
from crd_fast.backbones.load import pipeline_index
from crd_fast.errors import ConfigError


def find_transformer(path: str) -> Path:
    """The folder of a model alone, or the one under a run directory. Raises ConfigError where none is."""
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "transformer"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ConfigError(
        f"no model at --transformer {path}: expected a folder with config.json and weights, or a finished run "
        "directory of full fine-tuning, which has one under transformer/"
    )


def load_model(model: str, transformer: str | None, options: LoadOptions) -> Backbone:
    """The pipeline behind its family's adapter. transformer: see `find_transformer`; it replaces the pipeline's own.

    Raises ConfigError as `backbones.load` does, and for a transformer that does not fit the pipeline.
    """
    folder = None if transformer is None else find_transformer(transformer)
    backbone = backbones.load(model, options=options, key="model")
    if folder is None:
        return backbone
    replaced = backbone.with_model(str(folder))
    setattr(replaced.pipeline, replaced.component, replaced.transformer)  # the memory of its own is free again
    return replaced


def digest_of(model: str, transformer: str | None = None) -> str:
    """What identifies a model's weights: SHA-256 over a folder's files, or the commit of a hub id, and that of the
    transformer that replaces its own.

    Raises ConfigError for what is no pipeline, or no transformer.
    """
    pipeline_index(model, "model")
    folder = Path(model).expanduser()
    if folder.is_dir():
        digest = _digest(folder)
    else:
        from huggingface_hub import hf_hub_download

        index = hf_hub_download(model, "model_index.json", local_files_only=True)  # it was fetched just now
        digest = f"{model}@{Path(index).parent.name}"
    return digest if transformer is None else f"{digest} with {_digest(find_transformer(transformer))}"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
