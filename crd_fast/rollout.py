"""Clean samples from a velocity model: the only thing training needs from a solver."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.errors import ConfigError
from crd_fast.forward_process import noise

# Stream of the draws that start a rollout; training draws count up from 0.
ROLLOUT_STREAM = 2**31 - 1

SOLVERS = ("euler", "multistep")


@dataclass(frozen=True)
class RolloutBatch:
    """What one epoch learns from: N samples in groups of one prompt each.

    latents (N, *latent) clean; prompt_ids (N,) into the prompt set; group_ids (N,) int64; sample_ids (N,) int64,
    unique over the whole run.
    """

    latents: Tensor
    prompt_ids: Tensor
    group_ids: Tensor
    sample_ids: Tensor


def initial_noise(backbone: Backbone, sample_ids: Tensor, seed: int) -> Tensor:
    """Gaussian start (N, *latent) of each sample; depends on (seed, sample id) alone, not on the batch."""
    zeros = torch.zeros(len(sample_ids), *backbone.latent_shape, device=backbone.device)
    ones = torch.ones(len(sample_ids), device=backbone.device)
    return noise(zeros, ones, seed=seed, sample_ids=sample_ids.to(backbone.device), stream=ROLLOUT_STREAM).x_t


def one_step(predict: Callable[[Tensor, Tensor], Tensor], backbone: Backbone, start: Tensor, share: float) -> Tensor:
    """x0 = x_t - sigma v(x_t, sigma), in fp32: clean latents (N, *latent) of a one-step generator.

    predict: (x_t, sigma (N,)) -> velocity. start: unit Gaussian. share: of the model's training time range, where the
    step begins: 1 is pure noise. With graph where gradients are enabled.
    """
    sigma = float(backbone.sigma_at(torch.tensor(share)))
    x_t = start.float() * backbone.one_step_scale(sigma)
    return x_t - sigma * predict(x_t, torch.full((len(x_t),), sigma, device=x_t.device)).float()


@torch.no_grad()
def generate(
    backbone: Backbone,
    conditioning: Conditioning,
    start: Tensor,
    *,
    steps: int,
    guidance_scale: float | None = None,
    solver: str = "euler",
    unconditional: Conditioning | None = None,
    batch: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    start_share: float | None = None,
) -> Tensor:
    """Clean latents (N, *latent) from Gaussian `start`, in steps between the pipeline's own noise levels.

    start_share: of a one-step generator, where its only step begins, see `one_step`; `steps` and `solver` are not used
    then, and there is no guidance.

    guidance_scale: as the pipeline understands it; None, or the family's `unguided_scale`, uses the conditional
    velocity alone, otherwise `unconditional`, the embeddings of one empty prompt, is needed. solver: "euler", or
    "multistep", which takes the slope between this velocity and the last into account (Adams-Bashforth of second
    order). batch: samples at a time. on_batch: called with samples done.

    Raises ValueError for an unknown solver, or guidance without `unconditional`; ConfigError for guidance that the
    family does not have.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}: expected one of {', '.join(SOLVERS)}")
    if start_share is not None:
        if guidance_scale is not None:
            raise ValueError(f"guidance_scale is {guidance_scale}: expected None, a one-step generator has no guidance")
        return _in_one_step(backbone, conditioning, start, start_share, batch or len(start), on_batch)
    scale = backbone.unguided_scale if guidance_scale is None else guidance_scale
    guided = backbone.is_guided(scale)
    if guided and unconditional is None:
        raise ValueError(f"guidance_scale is {scale}: give the unconditional embeddings, or leave guidance out")
    first = backbone.start_scale(steps)
    sigmas = backbone.rollout_sigmas(steps)
    if not bool(sigmas.isfinite().all()):
        raise ConfigError(
            f"steps is {steps}, for which the scheduler of this {backbone.family} has no noise levels: use 2 or more, "
            "or --one-step for a generator that takes one"
        )
    size = batch or len(start)
    clean = torch.empty_like(start)
    for begin in range(0, len(start), size):
        rows = slice(begin, min(begin + size, len(start)))
        x = start[rows].float() * first
        prompts = conditioning[rows]
        if guided and unconditional is not None:
            prompts = Conditioning.cat([unconditional.expand(len(x)), prompts])
        before: tuple[Tensor, float] | None = None  # velocity and step length
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            velocity = _velocity(backbone, x, sigma, prompts, scale, guided)
            step = following - sigma
            slope = velocity
            if solver == "multistep" and before is not None:
                slope = velocity + (velocity - before[0]) * (step / (2 * before[1]))
            x = x + step * slope
            before = velocity, step
        clean[rows] = x
        if on_batch is not None:
            on_batch(rows.stop)
    return clean


def _velocity(
    backbone: Backbone, x: Tensor, sigma: float, prompts: Conditioning, guidance_scale: float, guided: bool
) -> Tensor:
    if not guided:
        return backbone.predict(x, torch.full((len(x),), sigma, device=x.device), prompts).float()
    both = backbone.predict(torch.cat([x, x]), torch.full((2 * len(x),), sigma, device=x.device), prompts)
    unconditional, conditional = both.chunk(2)
    return backbone.guide(conditional, unconditional, guidance_scale)


def _in_one_step(
    backbone: Backbone,
    conditioning: Conditioning,
    start: Tensor,
    share: float,
    batch: int,
    on_batch: Callable[[int], None] | None,
) -> Tensor:
    clean = []
    for begin in range(0, len(start), batch):
        rows = slice(begin, min(begin + batch, len(start)))
        predict = functools.partial(_predict, backbone, conditioning[rows])
        clean.append(one_step(predict, backbone, start[rows], share))
        if on_batch is not None:
            on_batch(rows.stop)
    return torch.cat(clean)


def _predict(backbone: Backbone, conditioning: Conditioning, x_t: Tensor, sigma: Tensor) -> Tensor:
    return backbone.predict(x_t, sigma, conditioning)
