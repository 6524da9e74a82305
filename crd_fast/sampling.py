"""`crd-fast sample`: images from a model and an adapter, through the same solver that training rolls out with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from crd_fast import backbones
from crd_fast.errors import CheckpointError, ConfigError
from crd_fast.lora import BASE, TRAINED, LoRABank
from crd_fast.rollout import generate, initial_noise

WEIGHTS = "pytorch_lora_weights.safetensors"


def find_lora(path: str) -> Path:
    """The adapter file under a LoRA folder, a checkpoint or a run directory. Raises CheckpointError where none is."""
    folder = Path(path)
    candidates = [folder, folder / WEIGHTS, folder / "lora" / WEIGHTS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"no LoRA at {path}: expected {WEIGHTS} in it, or a finished run directory")


def sample_to_folder(
    *,
    model: str,
    lora: str | None,
    prompts: Sequence[str],
    out: Path,
    count: int,
    steps: int,
    guidance_scale: float | None,
    max_sequence_length: int | None,
    seed: int,
    device: str | None,
) -> list[Path]:
    """Write `count` PNGs a prompt, animated ones of videos, to `out`; returns their paths. A seed gives the same again.

    Raises ConfigError or CheckpointError for a model, LoRA or number that does not fit.
    """
    if count < 1 or steps < 1:
        raise ConfigError(f"count {count} and steps {steps}: expected at least 1")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if chosen.startswith("cuda") else torch.float32
    options = backbones.LoadOptions(torch.device(chosen), dtype, max_sequence_length)
    backbone = backbones.load(model, options=options)
    adapter = None if lora is None else load_file(find_lora(lora))
    bank = _bank(backbone, adapter)
    embedded = backbone.encode_prompts(["", *prompts])
    rows = torch.arange(len(prompts), device=backbone.device).repeat_interleave(count)
    start = initial_noise(backbone, torch.arange(len(rows)), seed)
    with bank.merged(BASE if adapter is None else TRAINED):
        latents = generate(
            backbone,
            embedded[1:][rows],
            start,
            steps=steps,
            guidance_scale=guidance_scale,
            unconditional=embedded[:1],
            batch=16,
        )
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    files = []
    for index, latent in enumerate(latents.split(1)):
        pictures = backbone.decode(latent)[0]  # (3, H, W), or (F, 3, H, W) of a video
        frames = pictures if pictures.ndim == 4 else pictures[None]
        pixels = (frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        first, *others = (Image.fromarray(frame) for frame in pixels)
        files.append(out / f"{index:05d}.png")
        # more than one frame makes an animated PNG
        first.save(files[-1], save_all=bool(others), append_images=others, duration=1000 // 16, loop=0)
    return files


def _bank(backbone: backbones.Backbone, adapter: dict[str, torch.Tensor] | None) -> LoRABank:
    if adapter is None:
        return LoRABank(backbone.transformer, backbone.lora_targets, rank=1, alpha=1.0, seed=0)
    downs = {name: tensor for name, tensor in adapter.items() if name.endswith(".lora_A.weight")}
    if not downs:
        raise CheckpointError(f"the LoRA file has no *.lora_A.weight: it holds {sorted(adapter)[:3]}")
    names = [name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in downs]
    rank = next(iter(downs.values())).shape[0]
    bank = LoRABank(backbone.transformer, names, rank=rank, alpha=float(rank), seed=0)
    bank.load(adapter)
    return bank
