"""The images that the judge of the shapes world learns from, and what the exact detector says of them.

`train_judge.py` puts them together. Some are drawn, some are the base model's, and some are of the generator that
`shapes_judge` is a reward of: its samples, what the base model believes a noised one to be, as the diffused reward sees
it, and samples that were moved to please the judge, which is how a generator comes to fool it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crd_fast.backbones.base import Backbone
from crd_fast.rewards.geneval import relations
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.rollout import generate, initial_noise
from crd_fast.shapes import world
from crd_fast.shapes.judge import ACROSS, DOWN, MOST, PAIRS, SIZES, Judge, fact_scores, facts

UNKNOWN = -100  # a question that an image does not answer
CHUNK = 250
GROUND = torch.tensor(world.BACKGROUND).view(3, 1, 1) / 255


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


@torch.no_grad()
def make_one_step(generator: Backbone, entries: Sequence[world.Metadata], seed: int) -> Tensor:
    """Latents (N, *latent) that a one-step generator makes of noise, for the entries' prompts."""
    meter = Meter("one step", len(entries), "images")
    pieces = []
    for start in range(0, len(entries), CHUNK):
        chunk = entries[start : start + CHUNK]
        noise = initial_noise(generator, torch.arange(start, start + len(chunk)), seed)
        conditioning = generator.encode_prompts([entry["prompt"] for entry in chunk])
        pieces.append(noise - generator.predict(noise, torch.ones(len(chunk)), conditioning))
        meter(start + len(chunk))
    return torch.cat(pieces)


@torch.no_grad()
def make_estimates(
    backbone: Backbone, latents: Tensor, entries: Sequence[world.Metadata], latest: float, seed: int
) -> Tensor:
    """uint8 (N, 3, 64, 64): the base model's estimates of latents that were noised, at uniform t up to `latest`."""
    generator = torch.Generator().manual_seed(seed)
    meter = Meter("estimates", len(entries), "images")
    pieces = []
    for start in range(0, len(entries), CHUNK):
        clean, chunk = latents[start : start + CHUNK], entries[start : start + CHUNK]
        t = torch.rand(len(chunk), generator=generator) * (latest - 0.02) + 0.02
        level = t.view(-1, 1, 1, 1)
        noised = torch.lerp(clean, torch.randn(clean.shape, generator=generator), level)
        velocity = backbone.predict(noised, t, backbone.encode_prompts([entry["prompt"] for entry in chunk]))
        pieces.append(as_bytes(backbone.decode(noised - level * velocity)))
        meter(start + len(chunk))
    return torch.cat(pieces)


def make_pushed(
    judge: Judge, backbone: Backbone, latents: Tensor, entries: Sequence[world.Metadata], steps: int, length: float
) -> Tensor:
    """uint8 (N, 3, 64, 64): decodes of latents after up to `steps` steps up the judge's score, each of them `length`
    long as a root mean square."""
    meter = Meter("pushed", len(latents), "images")
    pieces, batch = [], 50
    for start in range(0, len(latents), batch):
        moved = latents[start : start + batch].clone()
        asked = [facts(entry) for entry in entries[start : start + batch]]
        wanted = 1 + torch.arange(len(moved)) % steps
        for step in range(steps):
            leaf = moved.requires_grad_()
            score = fact_scores(judge(backbone.decode_with_graph(leaf)), asked)[0]
            (slope,) = torch.autograd.grad(score.sum(), leaf)
            going = (wanted > step).view(-1, 1, 1, 1)
            unit = slope / slope.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
            moved = torch.where(going, moved.detach() + length * unit, moved.detach())
        pieces.append(as_bytes(backbone.decode(moved)))
        meter(start + len(moved))
    return torch.cat(pieces)
