"""`crd-fast sample`: images from a model and an adapter, through the same solver that training rolls out with."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from crd_fast.backbones import LoadOptions
from crd_fast.errors import ConfigError
from crd_fast.evaluation.candidates import start_of_run
from crd_fast.evaluation.folders import open_folder
from crd_fast.evaluation.models import load_model
from crd_fast.evaluation.pictures import to_pixels
from crd_fast.evaluation.settings import require_sampler
from crd_fast.lora import LoRABank
from crd_fast.lora_file import read_adapter
from crd_fast.ranks import choose_device
from crd_fast.rollout import generate, initial_noise
from crd_fast.snapshots import BASE, TRAINED
from crd_fast.whole_files import write_whole

BATCH = 16
STEPS = 20


def sample_to_folder(
    *,
    model: str,
    transformer: str | None,
    lora: str | None,
    prompts: Sequence[str],
    out: Path,
    count: int,
    steps: int | None,
    guidance_scale: float | None,
    max_sequence_length: int | None,
    seed: int,
    device: str | None,
    one_step: float | None = None,
) -> Iterator[Path]:
    """Write `count` PNGs a prompt, animated ones of videos, to `out`, and yield each path once its file is there.

    A seed gives the same again. transformer: see `evaluation.models.load_model`. steps: None is `STEPS`, and one of
    what crd-fast didr trained, from where its run says. one_step: share of the time range where that begins.

    Raises ConfigError or CheckpointError for a model, LoRA, device or number that does not fit, and for a folder that
    cannot be written to or has such files; NonFiniteError for NaN pixels.
    """
    if count < 1:
        raise ConfigError(f"count is {count}: expected at least 1")
    if one_step is not None and steps is not None:
        raise ConfigError(f"--steps {steps} does not go with --one-step: leave one of them out")
    if one_step is None and steps is None:
        one_step = start_of_run([lora, transformer])
    steps = STEPS if steps is None else steps
    require_sampler(steps, guidance_scale, max_sequence_length, seed, one_step)
    chosen = choose_device(device)
    adapter = None if lora is None else read_adapter(lora)
    files = _new_files(out, len(prompts) * count)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    backbone = load_model(model, transformer, LoadOptions(chosen, dtype, max_sequence_length))
    bank = LoRABank.like(backbone.transformer, adapter, backbone.lora_targets)
    if adapter is not None:
        bank.load(adapter)
    embedded = backbone.encode_prompts(["", *prompts])
    with bank.merged(BASE if adapter is None else TRAINED):
        for ids in torch.arange(len(files)).split(BATCH):
            latents = generate(
                backbone,
                embedded[1:][(ids // count).to(backbone.device)],
                initial_noise(backbone, ids, seed),
                steps=steps,
                guidance_scale=guidance_scale,
                unconditional=embedded[:1],
                start_share=one_step,
            )
            for index, latent in zip(ids.tolist(), latents.split(1), strict=True):
                pictures = backbone.decode(latent)[0]  # (3, H, W), or (F, 3, H, W) of a video
                _write(files[index], to_pixels(pictures if pictures.ndim == 4 else pictures[None]))
                yield files[index]


def _new_files(out: Path, number: int) -> list[Path]:
    """Files to write in `out`, which is made. Raises ConfigError where there is one already."""
    open_folder(out)
    files = [out / f"{index:05d}.png" for index in range(number)]
    there = [file.name for file in files if file.exists()]
    if there:
        raise ConfigError(f"{out} has {there[0]} already: give another --out, or move the images that are in it")
    return files


def _write(file: Path, frames: np.ndarray) -> None:
    """A PNG of uint8 (F, H, W, 3), animated where there are several frames."""
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    first.save(buffer, "PNG", save_all=bool(others), append_images=others, duration=1000 // 16, loop=0)
    write_whole(file, buffer.getvalue())
