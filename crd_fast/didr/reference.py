"""The element-wise mathematics of DIDR's generator stage in plain PyTorch: the oracle of the fused operation.

"Diff-Instruct with Diffused Reward" (arXiv 2605.24001) minimises the integral over t of KL(q_t || p*_t), q_t the
generator's noised marginal and p*_t the noised reward-tilted reference. With x_t = alpha x0 + sigma eps the gradient
reaches the generator's sample x0 as

    (1)  alpha (s_psi - s_ref - s_r),

s_psi the score of q_t, s_ref of the reference, s_r the diffused reward score. Each s = (alpha x0_hat - x_t) / sigma^2
(Tweedie), so x_t cancels in the difference of the two model scores, and (1) equals

    (2)  (alpha^2 / sigma^2) D,    D = x0_psi - x0_ref - (sigma^2 / alpha) s_r.

A weighting a(t) and DMD2's normaliser N (arXiv 2405.14867, mean over a sample's elements) turn this into

    (3)  g = scale D,    scale = a / N,
         "ikl":      a = alpha^2 / sigma^2,          N = 1: the exact gradient (2),
         "bounded":  a = min(1, alpha^2 / sigma^2),  N = mean |x0 - x0_ref|,
         "dmd2":     a = 1,                          N = mean |x0 - x0_ref|.

The loss of a batch of B samples of dim elements is L = mean g^2 / 2, with dL/dx0 defined as g / (B dim).

Models predict what is affine in x0 at a given (x_t, t): x0_hat = shift x_t + slope p, with the same shift and slope (of
a sample) for the TA's prediction p_psi and the reference's p_ref, which is guided by w,

    (4)  p_ref = c + (w - 1)(c - u),    x0_psi - x0_ref = slope (p_psi - p_ref).

With slope 1 and shift 0 the predictions are clean estimates themselves. x_t is left in N alone.

Two passes over latents, with mathematics on (B,) vectors in between:

    statistics: reads p_psi, c, u, s_r once, and x0 and x_t where N is wanted, writes five numbers a sample;
    gradient:   reads p_psi, c, u, s_r once more, writes g once.

An element is invalid when its D is not finite. It adds to no sum, and its g is 0. A sample whose N is zero or
not finite (x0 equal to x0_ref everywhere, or an x0 or x_t that is not finite) has g = 0 altogether. Both are counted.
Subtraction and accumulation are float32, or float64 when a latent is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WEIGHTINGS = ("ikl", "bounded", "dmd2")


class GeneratorInputs(NamedTuple):
    """What both passes take, in the order of the registered schemas.

    ta, ref, s_r (B, *latent): p_psi, c and the diffused reward score, any float dtype each. ref_uncond: u like them, or
    None where p_ref is c. guidance_scale: w. slope (B,) of (4) and level (B,) = sigma^2 / alpha, in the dtype of the
    arithmetic.
    """

    ta: Tensor
    ref: Tensor
    ref_uncond: Tensor | None
    guidance_scale: float
    s_r: Tensor
    slope: Tensor
    level: Tensor


class Statistics(NamedTuple):
    """Sums over the valid elements of each sample, (B,) each.

    distance = sum |x0 - x0_ref|, 0 without x0; gap = sum (x0_psi - x0_ref)^2; correction = sum ((sigma^2/alpha) s_r)^2;
    difference = sum D^2; invalid: int64 count of elements whose D is not finite.
    """

    distance: Tensor
    gap: Tensor
    correction: Tensor
    difference: Tensor
    invalid: Tensor


class Scale(NamedTuple):
    """(B,) each: scale = a / N of (3), 0 where it or N is not finite; weight = a; normaliser = N; zeroed: int64 count
    of the elements whose gradient is replaced by 0."""

    scale: Tensor
    weight: Tensor
    normaliser: Tensor
    zeroed: Tensor


def generator_statistics(
    inputs: GeneratorInputs, x0: Tensor | None = None, x_t: Tensor | None = None, shift: Tensor | None = None
) -> Statistics:
    """First pass. x0, x_t (B, *latent), shift (B,): of N and (4); without x_t, the shift is 0."""
    guided, gap, correction = _terms(inputs)
    difference = gap - correction  # (B, dim)
    valid = difference.isfinite()

    def total(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum(1)

    distance = torch.zeros_like(inputs.level)
    if x0 is not None:
        estimate = inputs.slope[:, None] * guided
        if x_t is not None and shift is not None:
            estimate = shift[:, None] * _flat(x_t, inputs) + estimate
        distance = total((_flat(x0, inputs) - estimate).abs())
    return Statistics(
        distance=distance,
        gap=total(gap.square()),
        correction=total(correction.square()),
        difference=total(difference.square()),
        invalid=(~valid).sum(1),
    )


def generator_scale(statistics: Statistics, alpha: Tensor, sigma: Tensor, weighting: str, dim: int) -> Scale:
    """Between the passes, equation (3): mathematics on (B,) vectors. dim: elements a sample."""
    weight = (alpha / sigma).square()
    normaliser = torch.ones_like(weight)
    if weighting != "ikl":
        weight = weight.clamp(max=1.0) if weighting == "bounded" else torch.ones_like(weight)
        normaliser = statistics.distance / (dim - statistics.invalid).clamp(min=1)
    scale = weight / normaliser
    usable = scale.isfinite() & normaliser.isfinite()
    return Scale(
        scale=torch.where(usable, scale, 0.0),
        weight=weight,
        normaliser=normaliser,
        zeroed=torch.where(usable, statistics.invalid, dim),
    )


def generator_gradient(inputs: GeneratorInputs, scale: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Second pass: g of (3) times upstream, (), or None for 1, in `dtype` and the shape and layout of `ta`.

    0 where g is not finite, and in a sample with a scale of zero, whatever upstream is. scale: (B,).
    """
    _, gap, correction = _terms(inputs)
    scales = scale[:, None]
    g = scales * (gap - correction)
    kept = g.isfinite() & (scales != 0)
    if upstream is not None:
        g = upstream * g
    out = torch.empty_like(inputs.ta, dtype=dtype)
    return out.copy_(torch.where(kept, g, 0.0).view(out.shape))


def _terms(inputs: GeneratorInputs) -> tuple[Tensor, Tensor, Tensor]:
    """p_ref, x0_psi - x0_ref and (sigma^2 / alpha) s_r, (B, dim)."""
    guided = _flat(inputs.ref, inputs)
    if inputs.ref_uncond is not None:
        guided = guided + (inputs.guidance_scale - 1.0) * (guided - _flat(inputs.ref_uncond, inputs))
    gap = inputs.slope[:, None] * (_flat(inputs.ta, inputs) - guided)
    return guided, gap, inputs.level[:, None] * _flat(inputs.s_r, inputs)


def _flat(latents: Tensor, inputs: GeneratorInputs) -> Tensor:
    """(B, dim) in the dtype of the arithmetic."""
    return latents.to(inputs.level.dtype).flatten(1)
