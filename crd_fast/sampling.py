"""`crd-fast sample`: images from a model and an adapter, through the same solver that training rolls out with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from crd_fast import backbones
from crd_fast.errors import ConfigError
from crd_fast.lora import LoRABank
from crd_fast.lora_file import read_adapter
from crd_fast.rollout import generate, initial_noise
from crd_fast.snapshots import BASE, TRAINED


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
    adapter = None if lora is None else read_adapter(lora)
    bank = LoRABank.like(backbone.transformer, adapter, backbone.lora_targets)
    if adapter is not None:
        bank.load(adapter)
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
