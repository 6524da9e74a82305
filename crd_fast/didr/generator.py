"""The generator's loss: a scalar whose gradient in the generator's sample is the DIDR direction.

Source: "Diff-Instruct with Diffused Reward" (arXiv 2605.24001). The mathematics is in `crd_fast.didr.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crd_fast import checks
from crd_fast.didr import reference
from crd_fast.errors import nearest
from crd_fast.schedules import Schedule, compute_dtype


@dataclass(frozen=True)
class GeneratorOutput:
    """What `generator_loss` returns.

    loss: scalar mean g^2 / 2; it carries the graph, everything else is detached.
    gap (B,) = rms over a sample of x0_ta - x0_ref; correction (B,) = rms of (sigma^2/alpha) s_r; normaliser (B,): N,
    1 for "ikl"; zeroed (B,) int64: elements whose gradient was not finite and became 0.
    metrics: name -> scalar on the device, made without synchronisation; means over samples.
    """

    loss: Tensor
    gap: Tensor
    correction: Tensor
    normaliser: Tensor
    zeroed: Tensor
    metrics: dict[str, Tensor]


def generator_loss(
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    x0_ta: Tensor,
    x0_ref: Tensor,
    s_r: Tensor,
    *,
    schedule: Schedule,
    weighting: str = "ikl",
) -> GeneratorOutput:
    """Stage II of DIDR: the loss of the generator's samples (arXiv 2605.24001).

    Equivalent to, with level = sigma^2 / alpha at t::

        g = a * (x0_ta - x0_ref - level * s_r) / N        # no gradient; not-finite elements become 0
        loss = g.square().mean() / 2                      # as a value
        x0.backward(g / x0.numel())                       # as a gradient

    Args:
        x0: (B, *latent) sample of the generator, any float dtype. Gradients flow to it alone.
        x_t: (B, *latent) its noising at t, at which the other three were computed. It cancels in the difference of the
            two model scores, so only its shape is looked at.
        t: (B,) times of `schedule`.
        x0_ta: (B, *latent) clean estimate at (x_t, t) of the TA network, the model of the generator's own samples.
        x0_ref: (B, *latent) clean estimate of the frozen reference, guided: see `reference_x0`.
        s_r: (B, *latent) diffused reward score: see `diffused_reward_score`.
        schedule: of t.
        weighting: "ikl": a = alpha^2 / sigma^2 and N = 1, the gradient of the integral of KL over t as it is.
            "bounded": a = min(1, alpha^2 / sigma^2), "dmd2": a = 1, both with DMD2's normaliser N = mean |x0 - x0_ref|
            of a sample. A proxy of the reward score errs most at large t, which "dmd2" weights most: it lets the
            generator overshoot the reward's own optimum.

    Returns:
        `GeneratorOutput`. Metrics: loss, gradient_rms, gap_rms, correction_rms, correction_ratio (correction / gap),
        normaliser, weight, nonfinite (a count).

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown weighting, a time out of range or at an end
            of it, where alpha or sigma is 0 (times are looked at on CPU, elsewhere with CRD_FAST_CHECKS=1).
    """
    checks.require_latents("x0", x0)
    for name, other in (("x_t", x_t), ("x0_ta", x0_ta), ("x0_ref", x0_ref), ("s_r", s_r)):
        checks.require_like(name, other, "x0", x0)
    if weighting not in reference.WEIGHTINGS:
        raise ValueError(
            f"weighting: expected one of {reference.WEIGHTINGS}, got {weighting!r}"
            f"{nearest(str(weighting), reference.WEIGHTINGS)}"
        )
    schedule.require_times(t, x0.shape[0], x0.device)
    with torch.no_grad():
        alpha, sigma = schedule.levels(t, compute_dtype(x0, x0_ta, x0_ref, s_r))
        _require_inside(alpha, sigma, t)
        level = sigma.square() / alpha
        sample, ta, ref, added = (latents.detach().flatten(1) for latents in (x0, x0_ta, x0_ref, s_r))  # (B, dim)
        dim = sample.shape[1]
        statistics = reference.generator_statistics(sample, ta, ref, added, level)
        scale = reference.generator_scale(statistics, alpha, sigma, weighting, dim)
        energy = scale.scale.square() * statistics.difference / dim  # (B,) mean g^2
        gap, correction = (statistics.gap / dim).sqrt(), (statistics.correction / dim).sqrt()
        value = energy.mean() / 2.0
    return GeneratorOutput(
        loss=_WithGradient.apply(x0, ta, ref, added, level, scale.scale, value),
        gap=gap,
        correction=correction,
        normaliser=scale.normaliser,
        zeroed=scale.zeroed,
        metrics={
            "loss": value,
            "gradient_rms": energy.sqrt().mean(),
            "gap_rms": gap.mean(),
            "correction_rms": correction.mean(),
            "correction_ratio": (correction / gap.clamp(min=torch.finfo(gap.dtype).tiny)).mean(),
            "normaliser": scale.normaliser.mean(),
            "weight": scale.weight.mean(),
            "nonfinite": scale.zeroed.sum(),
        },
    )


class _WithGradient(torch.autograd.Function):
    """The number `value`, whose derivative in x0 is g / numel."""

    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, x0_ta: Tensor, x0_ref: Tensor, s_r: Tensor, level: Tensor, scale: Tensor, value: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x0_ta, x0_ref, s_r, level, scale)
        ctx.shape, ctx.dtype = x0.shape, x0.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient = reference.generator_gradient(*ctx.saved_tensors)  # (B, dim)
        gradient = gradient * (upstream / gradient.numel())
        return gradient.view(ctx.shape).to(ctx.dtype), None, None, None, None, None, None


def _require_inside(alpha: Tensor, sigma: Tensor, t: Tensor) -> None:
    if checks.values_are_checked(t.device) and bool(((alpha == 0) | (sigma == 0)).any()):
        raise ValueError(
            f"t: expected times at which alpha and sigma are positive, got values from {t.min().item()} to "
            f"{t.max().item()}; draw them from 2 to 98 % of the range, as sample_times does"
        )
