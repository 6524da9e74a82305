"""Prompt embeddings: computed once, kept on disk by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning


def embed(backbone: Backbone, prompts: Sequence[str], folder: Path, key: str, batch: int = 64) -> Conditioning:
    """Embeddings of all prompts, from `folder` if they are there and whole.

    key: whatever else the embeddings depend on (model, text length, dtype).
    """
    digest = hashlib.sha256(json.dumps([key, list(prompts)]).encode()).hexdigest()[:24]
    file = folder / f"{digest}.safetensors"
    tensors = _read(file)
    if tensors is None:
        parts = [backbone.encode_prompts(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        made = Conditioning.cat(parts)
        folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".tmp")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in made.tensors.items()}
        save_file(tensors, aside)
        os.replace(aside, file)
    return Conditioning(tensors).to(backbone.device, backbone.dtype)


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        return None


def model_key(path: str, max_sequence_length: int | None, dtype: torch.dtype) -> str:
    """Identifies the text encoders: the path, and for a folder the sizes and times of its weight files."""
    folder = Path(path)
    files = sorted(folder.glob("text_encoder*/*")) if folder.is_dir() else []
    stamps = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return json.dumps([path, max_sequence_length, str(dtype), stamps])
