"""From a folder or hub id to the adapter of its family."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from crd_fast.backbones.base import Backbone, LoadOptions
from crd_fast.errors import ConfigError, nearest

# pipeline class -> (family, module of its adapter, class): imported when such a pipeline is loaded
_ADAPTERS = {
    "Flux2KleinPipeline": ("flux2", "flux2", "Flux2Backbone"),
    "FluxPipeline": ("flux1", "flux1", "Flux1Backbone"),
    "QwenImagePipeline": ("qwen_image", "qwen_image", "QwenImageBackbone"),
    "StableDiffusion3Pipeline": ("sd3", "sd3", "SD3Backbone"),
    "StableDiffusionXLPipeline": ("sdxl", "sdxl", "SDXLBackbone"),
    "WanPipeline": ("wan", "wan", "WanBackbone"),
    "ZImagePipeline": ("z_image", "z_image", "ZImageBackbone"),
}


def available() -> list[str]:
    """Names of the model families with an adapter."""
    return sorted({family for family, _, _ in _ADAPTERS.values()})


def load(
    path: str, family: str | None = None, options: LoadOptions | None = None, *, key: str = "model.path"
) -> Backbone:
    """Load a diffusers pipeline from a local folder or hub id behind its family's adapter.

    family: checked against the pipeline's own class; None takes it from there. key: what messages call `path`.

    Raises ConfigError: no such folder and not a hub id that can be fetched (the wanted file is named), a pipeline of
    a family without an adapter, or `family` given and different.
    """
    index = pipeline_index(path, key)
    pipeline = str(index.get("_class_name"))
    if pipeline not in _ADAPTERS:
        raise ConfigError(f"{key} {path} is a {pipeline}: expected one of {', '.join(sorted(_ADAPTERS))}")
    found, module, adapter = _ADAPTERS[pipeline]
    if family is not None and family not in available():
        raise ConfigError(f"model.family is {family!r}{nearest(family, available())}")
    if family is not None and family != found:
        raise ConfigError(f"model.family is {family!r} but {path} is a {pipeline}: set model.family to {found!r}")
    backbone: type[Backbone] = getattr(import_module(f"crd_fast.backbones.{module}"), adapter)
    folder = Path(path).expanduser()  # diffusers takes a ~ for part of a name
    return backbone.from_pretrained(str(folder) if folder.is_dir() else path, index, options or LoadOptions())


def pipeline_index(path: str, key: str) -> dict[str, Any]:
    """The pipeline's model_index.json. key: what messages call `path`. Raises ConfigError, see `load`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        file = folder / "model_index.json"
        if not file.is_file():
            raise ConfigError(f"{key} {path} has no model_index.json: expected a folder saved by save_pretrained")
        return json.loads(file.read_text())
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir()
    if looks_local:
        raise ConfigError(f"{key} {path} is not a folder: give a pipeline folder or a hub id 'owner/name'")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return json.loads(Path(hf_hub_download(path, "model_index.json")).read_text())
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError(
            f"model_index.json of {path} could not be fetched ({type(error).__name__}: {error}): give a local folder, "
            "or download the model first"
        ) from error
