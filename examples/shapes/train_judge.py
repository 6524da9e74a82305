"""Make `models/shapes-judge`: the network behind the reward `shapes_judge`, from nothing, in one go.

    python examples/shapes/train_judge.py --out models/shapes-judge

It learns what the exact detector says about true renders; renders that were mixed, cut, blurred, warped or recoloured;
the autoencoder's decodes of renders and of noisy latents; what the base model believes a noised latent to be; and the
base model's samples of 1 to 8 steps. Of these, images on which the detector changes its mind when contrast changes by a
few per cent are left out. It also learns the images that it will reward: a one-step generator's samples, and the base
model's estimates of noised ones. None of these is left out, so that it is unsure where the detector is.

While it trains, images get noise, and a part of every batch is the last one's after a step along the sign of the
loss's gradient (as in Shafahi et al., arXiv 1904.12843): a judge that such steps do not fool has gradients that draw
shapes. Twice the generator's samples are moved to please it, and what the detector says of them is learned as well.
One seed gives the same weights on one thread of one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from judge_images import (
    CHUNK,
    GROUND,
    UNKNOWN,
    Meter,
    as_bytes,
    confident_targets,
    draw_entries,
    make_decoded,
    make_denoised,
    make_edited,
    make_estimates,
    make_one_step,
    make_pushed,
    make_renders,
    make_samples,
    targets,
)
from safetensors.torch import save_file
from torch import Tensor

from crd_fast import backbones
from crd_fast.backbones.base import Backbone
from crd_fast.rewards.geneval import evaluate
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.shapes import world
from crd_fast.shapes.judge import LOGIT_CAP, SIZES, WEIGHTS, Judge, fact_scores, facts, log_probabilities

MoreImages = Callable[[Judge, int], tuple[Tensor, Tensor]]
"""(the judge so far, how often it was asked before) -> images uint8 (N, 3, 64, 64) and answers (N, 12)."""


@dataclass(frozen=True)
class Training:
    """Numbers of images and of steps; the defaults make the committed judge."""

    seed: int = 0
    base: str = "models/shapes-sd3"
    one_step: str = "models/shapes-one-step"
    renders: int = 20_000
    edited: int = 6_000
    decoded: int = 4_000
    denoised: int = 5_000
    sampled: tuple[tuple[int, int], ...] = ((1, 800), (3, 1200), (4, 1500), (8, 4000))  # steps, images
    generated: int = 6_000  # one step
    estimated: int = 6_000
    latest: float = 0.6  # of the times of these estimates
    pushed: int = 1_500  # each time
    pushes: int = 5  # steps at most
    push: float = 0.06  # length of one, of latents with unit variance
    pushed_weight: int = 3  # how often a pushed image counts
    cycles: tuple[tuple[int, float], ...] = ((3200, 3e-3), (1600, 1e-3))  # steps, and the learning rate they rise to
    held: float = 1.0  # weight of what holds logits near the cap
    batch: int = 48
    replayed: int = 14  # of a batch, seen before and moved against the judge
    attack: float = 10 / 255  # at most, in every pixel
    noise: float = 0.12
    weight_decay: float = 0.02
    checked: int = 600  # images of each kind for the agreement that is kept beside the weights


def make_bank(config: Training, backbone: Backbone, generator: Backbone) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) and the detector's answers int64 (N, 12)."""
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
    entries = draw_entries(config.generated, rng)
    images.append(decoded(backbone, make_one_step(generator, entries, config.seed + 200)))
    entries = draw_entries(config.estimated, rng)
    latents = make_one_step(generator, entries, config.seed + 201)
    images.append(make_estimates(backbone, latents, entries, config.latest, config.seed + 202))
    answers += [answers_of(batch) for batch in images[-2:]]
    return torch.cat(images), torch.cat(answers)


def pusher(config: Training, backbone: Backbone, generator: Backbone) -> MoreImages:
    """The generator's samples, moved to please a judge."""

    def make(judge: Judge, round_number: int) -> tuple[Tensor, Tensor]:
        entries = draw_entries(config.pushed, np.random.default_rng([config.seed, 3, round_number]))
        latents = make_one_step(generator, entries, config.seed + 300 + round_number)
        images = make_pushed(judge, backbone, latents, entries, config.pushes, config.push)
        print("pushed, by the judge that they please:", agreement(judge, images.float() / 255, entries), flush=True)
        weight = config.pushed_weight
        return images.repeat(weight, 1, 1, 1), answers_of(images).repeat(weight, 1)

    return make


def answers_of(images: Tensor) -> Tensor:
    """The detector's answers int64 (N, 12) on images uint8 (N, 3, 64, 64)."""
    return torch.cat([targets(chunk.float() / 255) for chunk in images.split(CHUNK)])


def decoded(backbone: Backbone, latents: Tensor) -> Tensor:
    """uint8 (N, 3, 64, 64)."""
    return torch.cat([as_bytes(backbone.decode(chunk)) for chunk in latents.split(CHUNK)])


def answer_loss(log_probs: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy per image, summed over the questions it answers."""
    groups = log_probs.split(SIZES, -1)
    return sum(
        F.nll_loss(group, answer, ignore_index=UNKNOWN, reduction="none")
        for group, answer in zip(groups, answers.unbind(1), strict=True)
    )  # (B,)


def train(config: Training, images: Tensor, answers: Tensor, more: MoreImages | None = None) -> Judge:
    """A judge after all cycles. more: asked for images after a half and three quarters of the steps of each, which it
    sees beside `images` until the cycle ends."""
    torch.manual_seed(config.seed)
    judge = Judge()
    for number in range(len(config.cycles)):
        train_cycle(config, judge, number, images, answers, more)
    return judge


def train_cycle(
    config: Training, judge: Judge, number: int, images: Tensor, answers: Tensor, more: MoreImages | None = None
) -> None:
    """One cycle of `train`, in place: the learning rate rises and falls once. It depends on the judge's weights, not on
    how they were made."""
    steps, learning_rate = config.cycles[number]
    generator = torch.Generator().manual_seed(config.seed + 1 + 1000 * number)
    judge.to(memory_format=torch.channels_last).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    fresh = config.batch - config.replayed
    order = torch.randperm(len(images), generator=generator)
    replay, replay_answers = None, None
    taken, smooth = 0, None
    meter = Meter(f"cycle {number + 1}", steps, "steps")
    rounds = [steps // 2, steps * 3 // 4]
    for step in range(steps):
        if more is not None and step in rounds:
            found = more(judge.eval(), 2 * number + rounds.index(step))
            judge.train()
            images, answers = torch.cat([images, found[0]]), torch.cat([answers, found[1]])
            order, taken = torch.randperm(len(images), generator=generator), 0
        if taken + config.batch > len(order):
            order, taken = torch.randperm(len(images), generator=generator), 0
        size = config.batch if replay is None else fresh
        rows = order[taken : taken + size]
        taken += size
        batch, wanted = _augmented(images[rows], config.noise, generator), answers[rows]
        if replay is not None:
            batch, wanted = torch.cat([batch, replay]), torch.cat([wanted, replay_answers])
        batch = batch.contiguous(memory_format=torch.channels_last).requires_grad_()
        read = judge.read(batch)
        beyond = (read.abs() / LOGIT_CAP - 1).clamp(min=0)  # where the cap takes the gradient away
        loss = answer_loss(log_probabilities(read), wanted).mean() + config.held * beyond.square().mean()
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
    judge.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


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


def check(judge: Judge, backbone: Backbone, generator: Backbone, config: Training) -> dict[str, Any]:
    """Agreement on renders, half of them of a corrupted prompt, and on samples, none of them trained on."""
    rng = np.random.default_rng([config.seed, 2])
    entries = draw_entries(config.checked, rng)
    shown = [world.corrupt(entry, rng) if i % 2 else entry for i, entry in enumerate(entries)]
    images = torch.from_numpy(world.render([world.sample_scene(entry, rng) for entry in shown], rng))
    figures = {"renders": agreement(judge, images, entries)}
    for steps, _ in config.sampled:
        images = make_samples(backbone, entries, steps, config.seed + 1000 + steps, guidance_scale=4.0).float() / 255
        figures[f"samples of {steps} steps"] = agreement(judge, images, entries)
    latents = make_one_step(generator, entries, config.seed + 1200)
    figures["one-step generator"] = agreement(judge, decoded(backbone, latents).float() / 255, entries)
    pushed = make_pushed(judge, backbone, latents, entries, config.pushes, config.push)
    figures["one-step generator, pushed"] = agreement(judge, pushed.float() / 255, entries)
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
    generator = backbone.with_model(config.one_step)
    images, answers = make_bank(config, backbone, generator)
    judge = train(config, images, answers, pusher(config, backbone, generator))
    figures = check(judge, backbone, generator, config)
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
