"""From a folder or hub id to the adapter of its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from crd_fast.backbones.base import Backbone
from crd_fast.errors import ConfigError, nearest

_PIPELINES = {"StableDiffusion3Pipeline": "sd3"}


def available() -> list[str]:
    """Names of the model families with an adapter."""
    return sorted(set(_PIPELINES.values()))


def load(
    path: str,
    family: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int | None = None,
    resolution: int | None = None,
) -> Backbone:
    """Load a diffusers pipeline from a local folder or hub id behind its family's adapter.

    family: checked against the pipeline's own class; None takes it from there.
    max_sequence_length: text tokens of encoders that pad (T5); None is the pipeline's default.
    resolution: image height and width in pixels; None is the model's own.

    Raises ConfigError: no such folder and not a hub id that can be fetched (the wanted file is named), a pipeline of
    a family without an adapter, or `family` given and different.
    """
    index = _pipeline_index(path)
    pipeline = index.get("_class_name")
    found = _PIPELINES.get(str(pipeline))
    if found is None:
        raise ConfigError(f"model.path {path} is a {pipeline}: expected one of {', '.join(sorted(_PIPELINES))}")
    if family is not None and family not in available():
        raise ConfigError(f"model.family is {family!r}{nearest(family, available())}")
    if family is not None and family != found:
        raise ConfigError(f"model.family is {family!r} but {path} is a {pipeline}: set model.family to {found!r}")
    from crd_fast.backbones.sd3 import SD3Backbone

    return SD3Backbone.from_pretrained(
        path,
        index,
        device=torch.device(device),
        dtype=dtype,
        max_sequence_length=max_sequence_length,
        resolution=resolution,
    )


def _pipeline_index(path: str) -> dict[str, Any]:
    """The pipeline's model_index.json."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        file = folder / "model_index.json"
        if not file.is_file():
            raise ConfigError(f"model.path {path} has no model_index.json: expected a folder saved by save_pretrained")
        return json.loads(file.read_text())
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir()
    if looks_local:
        raise ConfigError(f"model.path {path} is not a folder: give a pipeline folder or a hub id 'owner/name'")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return json.loads(Path(hf_hub_download(path, "model_index.json")).read_text())
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError(
            f"model_index.json of {path} could not be fetched ({type(error).__name__}: {error}): give a local folder, "
            "or download the model first"
        ) from error
