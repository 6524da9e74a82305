"""LoRA files as diffusers and peft write them, read into one form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from crd_fast.errors import CheckpointError

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIXES = ("base_model.model.", "transformer.", "unet.")
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings inside the file


def find_adapter(path: str) -> Path:
    """The adapter file under a LoRA folder, a checkpoint or a run directory. Raises CheckpointError where none is."""
    folder = Path(path).expanduser()
    candidates = [folder, *(folder / name for name in (WEIGHTS, f"lora/{WEIGHTS}", PEFT_WEIGHTS))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"no LoRA at {path}: expected {WEIGHTS} or {PEFT_WEIGHTS} in it, or a finished run directory")


def read_adapter(path: str) -> dict[str, Tensor]:
    """An adapter in `LoRABank.load`'s form: `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank).

    The scale alpha / rank, which files keep apart in three ways, is folded into B.

    Raises CheckpointError: no file, not a safetensors file, or nothing in it that is a LoRA.
    """
    file = find_adapter(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except Exception as error:  # safetensors raises its own, unnamed kinds
        raise CheckpointError(f"LoRA file {file} cannot be read: {error}") from error
    settings = _settings(file, metadata)
    state: dict[str, Tensor] = {}
    other = []
    for name, tensor in tensors.items():
        layer, side = _parse(name)
        if side is None:
            if not name.endswith(".alpha"):
                other.append(name)
            continue
        if side == "B":
            tensor = tensor.float() * _scale(layer, tensor.shape[1], tensors, settings)
        state[f"{layer}.lora_{side}.weight"] = tensor
    if not state:
        raise CheckpointError(f"LoRA file {file} has no *.lora_A.weight: it holds {sorted(tensors)[:3]}")
    if other:
        raise CheckpointError(
            f"LoRA file {file} holds {sorted(other)[0]}: DoRA magnitudes, biases and whole layers "
            "cannot be read; train the adapter without them"
        )
    return state


def _parse(name: str) -> tuple[str, str | None]:
    """Layer and side, "A" or "B", of a tensor's name; no side for anything else."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for side in "AB":
        for ending in (f".lora_{side}.weight", f".lora_{side}.default.weight"):
            if name.endswith(ending):
                return name.removesuffix(ending), side
    return name, None


def _settings(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """peft's settings of the adapter: beside the file, or inside it, or none."""
    beside = file.with_name(PEFT_CONFIG)
    try:
        if beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
        inside = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError as error:
        raise CheckpointError(f"the settings of LoRA file {file} are not JSON: {error}") from error
    return {key.removeprefix("transformer.").removeprefix("unet."): value for key, value in inside.items()}


def _scale(layer: str, rank: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> float:
    for prefix in ("", *_PREFIXES):
        if f"{prefix}{layer}.alpha" in tensors:
            return float(tensors[f"{prefix}{layer}.alpha"]) / rank
    if "lora_alpha" not in settings:
        return 1.0
    alpha = next(
        (v for k, v in (settings.get("alpha_pattern") or {}).items() if re.match(rf"(?:.*\.)?(?:{k})$", layer)), None
    )
    alpha = settings["lora_alpha"] if alpha is None else alpha
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
