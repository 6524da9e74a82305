"""Make `models/shapes-judge`: the network behind the reward `shapes_judge`, from nothing, in one go.

    python examples/shapes/train_judge.py --out models/shapes-judge

It learns what the exact detector says about five kinds of images: true renders; renders that were mixed, cut, blurred,
warped or recoloured; the autoencoder's decodes of renders and of noisy latents; what the base model believes a noised
latent to be, as the diffused reward sees it; and the base model's samples of 1 to 8 steps. Images on which the detector
changes its mind when contrast changes by a few per cent are left out.

While it trains, images get noise, and a part of every batch is the last one's after a step along the sign of the
loss's gradient (as in Shafahi et al., arXiv 1904.12843): a judge that such steps do not fool has gradients that draw
shapes. One seed gives the same weights on one thread of one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor

from crd_fast import backbones
from crd_fast.backbones.base import Backbone
from crd_fast.rewards.geneval import evaluate, relations
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.rollout import generate, initial_noise
from crd_fast.shapes import world
from crd_fast.shapes.judge import ACROSS, DOWN, MOST, PAIRS, SIZES, WEIGHTS, Judge, fact_scores, facts

UNKNOWN = -100  # a question that an image does not answer
CHUNK = 250
GROUND = torch.tensor(world.BACKGROUND).view(3, 1, 1) / 255


@dataclass(frozen=True)
class Training:
    """Numbers of images and of steps; the defaults make the committed judge."""

    seed: int = 0
    base: str = "models/shapes-sd3"
    renders: int = 24_000
    edited: int = 8_000
    decoded: int = 5_000
    denoised: int = 6_000
    sampled: tuple[tuple[int, int], ...] = ((1, 1000), (3, 2000), (4, 2000), (8, 4000))  # steps, images
    steps: int = 3200
    batch: int = 48
    replayed: int = 14  # of a batch, seen before and moved against the judge
    attack: float = 10 / 255  # at most, in every pixel
    noise: float = 0.12
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    checked: int = 600  # images of each kind for the agreement that is kept beside the weights


class Meter:
    """A line now and then: how much is done, how fast it goes, when it will be over."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._started = self._said = time.monotonic()

    def __call__(self, done: int, more: str = "") -> None:
        now = time.monotonic()
        if now - self._said < 10 and done < self._total:
            return
        self._said = now
        rate = done / max(now - self._started, 1e-9)
        left = (self._total - done) / max(rate, 1e-9)
        print(
            f"{self._name} {done}/{self._total}  {rate:.0f} {self._unit}/s  {left:.0f} s left  {more}".rstrip(),
            flush=True,
        )


def targets(images: Tensor) -> Tensor:
    """The detector's answers (B, 12) to the judge's questions about images (B, 3, 64, 64), UNKNOWN where there is none.

    int64, each the index of an outcome.
    """
    rows = []
    for found in detect_shapes(images):
        of = {shape: [d for d in found if d.label == shape] for shape in world.SHAPES}
        row = [min(len(of[shape]), MOST + 1) for shape in world.SHAPES]
        for shape in world.SHAPES:
            colors = {d.color for d in of[shape]}
            row.append(
                UNKNOWN
                if not colors
                else len(world.COLORS)
                if len(colors) > 1
                else list(world.COLORS).index(str(*colors))
            )
        for outcomes in (ACROSS, DOWN):
            for a, b in PAIRS:
                one, other = of[world.SHAPES[a]], of[world.SHAPES[b]]
                if len(one) == len(other) == 1:
                    held = relations(one[0].box, other[0].box)
                    row.append(next((i for i, name in enumerate(outcomes) if name in held), 1))
                else:
                    row.append(UNKNOWN)
        rows.append(row)
    return torch.tensor(rows).view(-1, len(SIZES))


def confident_targets(images: Tensor) -> tuple[Tensor, Tensor]:
    """`targets`, and whether (B,) they stay the same when the contrast to the ground changes by 7 %."""
    found = targets(images)
    sure = torch.ones(len(images), dtype=torch.bool)
    for gain in (0.93, 1.07):
        changed = (GROUND + gain * (images - GROUND)).clamp(0, 1)
        sure &= (targets(changed) == found).all(1)
    return found, sure


def draw_entries(count: int, rng: np.random.Generator) -> list[world.Metadata]:
    """`count` prompts of the six tasks, every task as often but counting twice as often, the hardest to learn."""
    by_task = [world.prompts("all", [task]) for task in (*world.GENEVAL_TASKS, "counting")]
    return [entries[rng.integers(len(entries))] for entries in (by_task[i % len(by_task)] for i in range(count))]


def _free_entry(rng: np.random.Generator) -> world.Metadata:
    """Up to five of one kind or two, also as many as no prompt asks for."""
    total = int(rng.choice([1, 2, 3, 4, 5], p=(0.1, 0.15, 0.25, 0.3, 0.2)))
    first = total if rng.random() < 0.6 else int(rng.integers(1, total + 1))
    shapes = [str(shape) for shape in rng.permutation(world.SHAPES)]
    include = [{"class": shapes[0], "count": first}]
    if total > first:
        include.append({"class": shapes[1], "count": total - first})
    return {"tag": "free", "include": include}


def make_scenes(count: int, rng: np.random.Generator) -> list[world.Scene]:
    """Scenes of prompts, of corrupted prompts, free and crowded ones, signs, empty ground."""
    signs = world.prompts("all", ["text"])
    scenes = []
    for entry, kind in zip(draw_entries(count, rng), rng.random(count), strict=True):
        if kind < 0.35:
            scenes.append(world.sample_scene(entry, rng))
        elif kind < 0.5:
            scenes.append(world.sample_scene(world.corrupt(entry, rng), rng))
        elif kind < 0.82:
            scenes.append(world.sample_scene(_free_entry(rng), rng))
        elif kind < 0.96:
            scenes.append(world.crowded_scene(rng))
        else:
            scenes.append(world.Scene() if kind > 0.99 else world.sample_scene(signs[rng.integers(len(signs))], rng))
    return scenes


def as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def make_renders(count: int, rng: np.random.Generator) -> Tensor:
    """uint8 (count, 3, 64, 64)."""
    meter = Meter("renders", count, "images")
    pieces = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        pieces.append(as_bytes(torch.from_numpy(world.render(make_scenes(size, rng), rng))))
        meter(start + size)
    return torch.cat(pieces)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Images (B, 3, H, W) after a Gaussian of `sigma` pixels, at most 3, cut at 6."""
    reach = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.softmax(-reach.square() / (2 * sigma**2), 0)
    padded = F.pad(images.flatten(0, 1)[:, None], (6, 6, 6, 6), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(images)


def edit(images: Tensor, others: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (B, 3, 64, 64) in [0, 1], each after one change: blend, cut and paste, blur, warp or new colours."""
    edited = images.clone()
    size = world.SIZE
    for i, kind in enumerate(rng.integers(5, size=len(images))):
        image, other = images[i : i + 1], others[i : i + 1]
        if kind == 0:
            edited[i : i + 1] = torch.lerp(image, other, float(rng.uniform(0.02, 0.5)))
        elif kind == 1:
            (x0, y0), (width, height) = rng.integers(0, size - 8, 2), rng.integers(8, size, 2)
            edited[i, :, y0 : y0 + height, x0 : x0 + width] = other[0, :, y0 : y0 + height, x0 : x0 + width]
        elif kind == 2:
            edited[i : i + 1] = blur(image, float(rng.uniform(0.4, 3.0)))
        elif kind == 3:
            matrix = np.eye(2) + rng.uniform(-0.45, 0.45, (2, 2))
            affine = torch.tensor(np.c_[matrix, rng.uniform(-0.3, 0.3, 2)], dtype=torch.float32)
            grid = F.affine_grid(affine[None], [1, 3, size, size], align_corners=False)
            edited[i : i + 1] = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
        else:
            mix = torch.tensor(np.eye(3) + rng.uniform(-0.35, 0.35, (3, 3)), dtype=torch.float32)
            edited[i] = GROUND + torch.einsum("ij,jhw->ihw", mix, image[0] - GROUND)
    return edited.clamp(0, 1)


def make_edited(renders: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    meter = Meter("edited", count, "images")
    pieces = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        pairs = renders[torch.from_numpy(rng.integers(len(renders), size=(2, size)))].float() / 255
        pieces.append(as_bytes(edit(pairs[0], pairs[1], rng)))
        meter(start + size)
    return torch.cat(pieces)


@torch.no_grad()
def _encode(backbone: Backbone, images: Tensor) -> Tensor:
    vae = backbone.pipeline.vae
    mean = vae.encode(images * 2 - 1).latent_dist.mean
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def make_decoded(backbone: Backbone, renders: Tensor, count: int, seed: int) -> Tensor:
    """Decodes of renders' latents with noise of a standard deviation up to 0.6."""
    generator = torch.Generator().manual_seed(seed)
    meter = Meter("decoded", count, "images")
    pieces = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        chosen = torch.randint(len(renders), (size,), generator=generator)
        latents = _encode(backbone, renders[chosen].float() / 255)
        spread = 0.6 * torch.rand(size, 1, 1, 1, generator=generator)
        pieces.append(as_bytes(backbone.decode(latents + spread * torch.randn(latents.shape, generator=generator))))
        meter(start + size)
    return torch.cat(pieces)


@torch.no_grad()
def make_denoised(backbone: Backbone, count: int, rng: np.random.Generator) -> Tensor:
    """The base model's estimate of what is behind x_t, for renders and uniform t; a third have a wrong caption."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    meter = Meter("denoised", count, "images")
    pieces = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        entries = draw_entries(size, rng)
        shown = [world.corrupt(entry, rng) if rng.random() < 1 / 3 else entry for entry in entries]
        images = torch.from_numpy(world.render([world.sample_scene(entry, rng) for entry in shown], rng))
        latents = _encode(backbone, images)
        t = torch.rand(size, generator=generator) * 0.98 + 0.01
        level = t.view(-1, 1, 1, 1)
        noised = torch.lerp(latents, torch.randn(latents.shape, generator=generator), level)
        velocity = backbone.predict(noised, t, backbone.encode_prompts([entry["prompt"] for entry in entries]))
        pieces.append(as_bytes(backbone.decode(noised - level * velocity)))
        meter(start + size)
    return torch.cat(pieces)


@torch.no_grad()
def make_samples(
    backbone: Backbone, entries: Sequence[world.Metadata], steps: int, seed: int, guidance_scale: float | None = None
) -> Tensor:
    """uint8 samples (N, 3, 64, 64) of the base model for the entries' prompts."""
    meter = Meter(f"samples of {steps} steps", len(entries), "images")
    unconditional = backbone.encode_prompts([""])
    pieces = []
    for start in range(0, len(entries), CHUNK):
        chunk = entries[start : start + CHUNK]
        latents = generate(
            backbone,
            backbone.encode_prompts([entry["prompt"] for entry in chunk]),
            initial_noise(backbone, torch.arange(start, start + len(chunk)), seed),
            steps=steps,
            guidance_scale=guidance_scale,
            unconditional=unconditional,
        )
        pieces.append(as_bytes(backbone.decode(latents)))
        meter(start + len(chunk))
    return torch.cat(pieces)


def make_bank(config: Training, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) on which the detector is sure, and its answers int64 (N, 12)."""
    rng = np.random.default_rng([config.seed, 1])
    renders = make_renders(config.renders, rng)
    kinds = {
        "renders": renders,
        "edited": make_edited(renders, config.edited, rng),
        "decoded": make_decoded(backbone, renders, config.decoded, config.seed + 1),
        "denoised": make_denoised(backbone, config.denoised, rng),
    }
    for steps, count in config.sampled:
        entries = draw_entries(count, rng)
        half = len(entries) // 2
        plain = make_samples(backbone, entries[:half], steps, config.seed + steps)
        guided = make_samples(backbone, entries[half:], steps, config.seed + 100 + steps, guidance_scale=4.0)
        kinds[f"samples of {steps} steps"] = torch.cat([plain, guided])
    images, answers = [], []
    for name, batch in kinds.items():
        labelled = [confident_targets(chunk.float() / 255) for chunk in batch.split(CHUNK)]
        sure = torch.cat([keep for _, keep in labelled])
        print(f"{name}: the detector is sure of {sure.float().mean():.1%} of {len(batch)}", flush=True)
        images.append(batch[sure])
        answers.append(torch.cat([found for found, _ in labelled])[sure])
    return torch.cat(images), torch.cat(answers)


def answer_loss(log_probs: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy per image, summed over the questions it answers."""
    groups = log_probs.split(SIZES, -1)
    return sum(
        F.nll_loss(group, answer, ignore_index=UNKNOWN, reduction="none")
        for group, answer in zip(groups, answers.unbind(1), strict=True)
    )  # (B,)


def train(config: Training, images: Tensor, answers: Tensor) -> Judge:
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed + 1)
    judge = Judge().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.15
    )
    fresh = config.batch - config.replayed
    order = torch.randperm(len(images), generator=generator)
    replay, replay_answers = None, None
    taken, smooth = 0, None
    meter = Meter("training", config.steps, "steps")
    for step in range(config.steps):
        if taken + config.batch > len(order):
            order, taken = torch.randperm(len(images), generator=generator), 0
        size = config.batch if replay is None else fresh
        rows = order[taken : taken + size]
        taken += size
        batch, wanted = _augmented(images[rows], config.noise, generator), answers[rows]
        if replay is not None:
            batch, wanted = torch.cat([batch, replay]), torch.cat([wanted, replay_answers])
        batch = batch.contiguous(memory_format=torch.channels_last).requires_grad_()
        loss = answer_loss(judge(batch), wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        reach = config.attack * torch.rand(config.replayed, 1, 1, 1, generator=generator)
        direction = batch.grad[: config.replayed].sign()
        replay = (batch.detach()[: config.replayed] + reach * direction).clamp(0, 1)
        replay_answers = wanted[: config.replayed]
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        meter(step + 1, f"loss {smooth:.3f}")
    return judge.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _augmented(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Float images with a slightly other contrast and, two times of three, noise."""
    shape = (len(images), 1, 1, 1)
    gain = 1 + 0.12 * (torch.rand(shape, generator=generator) - 0.5)
    spread = noise * torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 2 / 3)
    changed = GROUND + gain * (images.float() / 255 - GROUND)
    return (changed + spread * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def agreement(judge: Judge, images: Tensor, entries: Sequence[world.Metadata]) -> dict[str, float]:
    """How often the judge's strict verdict on images (N, 3, 64, 64) in [0, 1] is the detector's.

    agree: share of all; right: share of images that the detector passes; agree_right, agree_wrong: share among
    those that pass and among the others, left out where there are none.
    """
    log_probs = torch.cat([judge(chunk) for chunk in images.split(CHUNK)])
    held = fact_scores(log_probs, [facts(entry) for entry in entries])[1].exp() > 0.5
    found = detect_shapes(images)
    exact = torch.tensor([evaluate(boxes, entry).strict > 0 for boxes, entry in zip(found, entries, strict=True)])
    same = (held == exact).float()
    figures = {"n": len(entries), "agree": same.mean().item(), "right": exact.float().mean().item()}
    figures |= {"agree_right": same[exact].mean().item()} if exact.any() else {}
    return figures | ({"agree_wrong": same[~exact].mean().item()} if not exact.all() else {})


def check(judge: Judge, backbone: Backbone, config: Training) -> dict[str, Any]:
    """Agreement on renders, half of them of a corrupted prompt, and on samples, none of them trained on."""
    rng = np.random.default_rng([config.seed, 2])
    entries = draw_entries(config.checked, rng)
    shown = [world.corrupt(entry, rng) if i % 2 else entry for i, entry in enumerate(entries)]
    images = torch.from_numpy(world.render([world.sample_scene(entry, rng) for entry in shown], rng))
    figures = {"renders": agreement(judge, images, entries)}
    for steps, _ in config.sampled:
        images = make_samples(backbone, entries, steps, config.seed + 1000 + steps, guidance_scale=4.0).float() / 255
        figures[f"samples of {steps} steps"] = agreement(judge, images, entries)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--seed", type=int, default=Training.seed)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # the silent third text encoder's tokenizer cuts every prompt
    started = time.monotonic()
    config = Training(seed=arguments.seed)
    backbone = backbones.load(config.base)
    images, answers = make_bank(config, backbone)
    judge = train(config, images, answers)
    figures = check(judge, backbone, config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, arguments.out / WEIGHTS)
    made = {
        "command": f"python examples/shapes/train_judge.py --out {arguments.out.as_posix()} --seed {config.seed}",
        "training": asdict(config),
        "agreement": {name: {key: round(value, 4) for key, value in row.items()} for name, row in figures.items()},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    (arguments.out / "judge.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made["agreement"], indent=2))
    print(f"saved {arguments.out} after {made['minutes']} minutes")


if __name__ == "__main__":
    main()
