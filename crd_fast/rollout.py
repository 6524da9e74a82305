"""Clean samples from a velocity model: the only thing training needs from a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.forward_process import noise

# Stream of the draws that start a rollout; training draws count up from 0.
ROLLOUT_STREAM = 2**31 - 1


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


@torch.no_grad()
def generate(
    backbone: Backbone,
    conditioning: Conditioning,
    start: Tensor,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    batch: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Clean latents (N, *latent) from Gaussian `start` by Euler steps on the pipeline's own noise levels.

    guidance_scale: w of u + w (c - u); 1 uses the conditional velocity alone, otherwise `unconditional`, the
    embeddings of one empty prompt, is needed. batch: samples at a time. on_batch: called with samples done.

    Raises ValueError when guidance is asked for without `unconditional`.
    """
    if guidance_scale != 1.0 and unconditional is None:
        raise ValueError(f"guidance_scale is {guidance_scale}: give the unconditional embeddings, or use 1")
    sigmas = backbone.rollout_sigmas(steps)
    size = batch or len(start)
    clean = torch.empty_like(start)
    for begin in range(0, len(start), size):
        rows = slice(begin, min(begin + size, len(start)))
        x = start[rows].float()
        prompts = conditioning[rows]
        count = len(x)
        if guidance_scale != 1.0 and unconditional is not None:
            prompts = Conditioning.cat([unconditional.expand(count), prompts])
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            x = x + (following - sigma) * _velocity(backbone, x, sigma, prompts, guidance_scale)
        clean[rows] = x
        if on_batch is not None:
            on_batch(rows.stop)
    return clean


def _velocity(backbone: Backbone, x: Tensor, sigma: float, prompts: Conditioning, guidance_scale: float) -> Tensor:
    if guidance_scale == 1.0:
        return backbone.predict(x, torch.full((len(x),), sigma, device=x.device), prompts).float()
    both = backbone.predict(torch.cat([x, x]), torch.full((2 * len(x),), sigma, device=x.device), prompts)
    unconditional, conditional = both.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
