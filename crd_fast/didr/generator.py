"""The generator's loss: a scalar whose gradient in the generator's sample is the DIDR direction.

Source: "Diff-Instruct with Diffused Reward" (arXiv 2605.24001). The mathematics is in `crd_fast.didr.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast import checks
from crd_fast.didr import ops, reference
from crd_fast.didr.reference import GeneratorInputs, Statistics
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
        ExtensionMissingError: see `crd_fast.ops`.
    """
    checks.require_latents("x0", x0)
    for name, other in (("x_t", x_t), ("x0_ta", x0_ta), ("x0_ref", x0_ref), ("s_r", s_r)):
        checks.require_like(name, other, "x0", x0)
    alpha, sigma = _levels(t, schedule, weighting, x0, x0_ta, x0_ref, s_r)
    inputs = GeneratorInputs(
        ta=checks.savable(x0_ta.detach()),
        ref=checks.savable(x0_ref.detach()),
        ref_uncond=None,
        guidance_scale=1.0,
        s_r=checks.savable(s_r.detach()),
        slope=torch.ones_like(alpha),
        level=sigma.square() / alpha,
    )
    return _output(x0, inputs, alpha, sigma, weighting, x_t=None, shift=None)


def generator_loss_of_predictions(
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    ta: Tensor,
    conditional: Tensor,
    s_r: Tensor,
    *,
    schedule: Schedule,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    kind: str | None = None,
    weighting: str = "ikl",
    max_correction: float | None = None,
) -> GeneratorOutput:
    """`generator_loss` of what the models predict: guidance and both clean estimates are made on the way.

    Equivalent to, but the latents are read once for the value and once for the gradient, and no estimate is stored::

        x0_ta = schedule.to_x0(ta, x_t, t, kind)
        x0_ref = reference_x0(conditional, x_t, t, schedule=schedule, unconditional=unconditional,
                              guidance_scale=guidance_scale, kind=kind)
        generator_loss(x0, x_t, t, x0_ta, x0_ref, s_r, schedule=schedule, weighting=weighting)

    x_t cancels in x0_ta - x0_ref before anything is rounded; it is read for the normaliser N alone.

    Args:
        x0, t, s_r, schedule, weighting: as in `generator_loss`.
        x_t: (B, *latent) noising of x0 at t, at which the models predicted; not read where kind is "x0".
        ta: (B, *latent) prediction of the TA network. conditional, unconditional: (B, *latent) those of the frozen
            reference; the second is needed unless guidance_scale is 1, and is not read then.
        guidance_scale: w of the prediction u + w (c - u), see `reference_x0`.
        kind: of all three predictions, "eps", "v", "x0" or "score"; None is the schedule's own.
        max_correction: > 0; where (sigma^2/alpha) s_r of a sample is longer than this many times its x0_ta - x0_ref, it
            is shortened to that. None leaves it.

    Returns:
        `GeneratorOutput`, with metrics as in `generator_loss`.

    Raises:
        ValueError: as in `generator_loss` and `reference_x0`.
        ExtensionMissingError: see `crd_fast.ops`.
    """
    checks.require_latents("x0", x0)
    for name, other in (("x_t", x_t), ("ta", ta), ("conditional", conditional), ("s_r", s_r)):
        checks.require_like(name, other, "x0", x0)
    weight = checks.require_finite_number("guidance_scale", guidance_scale)
    uncond = None if weight == 1.0 else _require_unconditional(unconditional, guidance_scale, x0)
    latents = [x0, x_t, ta, conditional, s_r] + ([] if uncond is None else [uncond])
    alpha, sigma = _levels(t, schedule, weighting, *latents)
    with torch.no_grad():
        one, zero = torch.ones_like(alpha)[:, None], torch.zeros_like(alpha)[:, None]  # (B, 1)
        shift, slope = (schedule.to_x0(*probe, t, kind).flatten() for probe in ((zero, one), (one, zero)))
    inputs = GeneratorInputs(
        ta=checks.savable(ta.detach()),
        ref=checks.savable(conditional.detach()),
        ref_uncond=None if uncond is None else checks.savable(uncond.detach()),
        guidance_scale=weight,
        s_r=checks.savable(s_r.detach()),
        slope=slope,
        level=sigma.square() / alpha,
    )
    if max_correction is not None:
        if checks.require_finite_number("max_correction", max_correction) <= 0:
            raise ValueError(f"max_correction: expected a number > 0, or None, got {max_correction!r}")
        inputs = _shortened(inputs, max_correction)
    if (kind or schedule.kind) == "x0":  # predictions are the estimates, whatever x_t holds
        return _output(x0, inputs, alpha, sigma, weighting, x_t=None, shift=None)
    return _output(x0, inputs, alpha, sigma, weighting, x_t=x_t.detach(), shift=shift)


@torch.no_grad()
def _shortened(inputs: GeneratorInputs, most: float) -> GeneratorInputs:
    """With a level at which a sample's correction is at most `most` times as long as its gap."""
    statistics = Statistics(*ops.generator_statistics(*inputs, None, None, None))
    length, allowed = statistics.correction.sqrt(), most * statistics.gap.sqrt()
    return inputs._replace(level=inputs.level * torch.where(length > allowed, allowed / length, 1.0))


def _require_unconditional(unconditional: Tensor | None, guidance_scale: float, x0: Tensor) -> Tensor:
    if unconditional is None:
        raise ValueError(
            f"unconditional: expected a prediction because guidance_scale is {guidance_scale}, got None; pass the "
            "prediction of the empty prompt, or guidance_scale=1"
        )
    return checks.require_like("unconditional", unconditional, "x0", x0)


def _levels(t: Tensor, schedule: Schedule, weighting: str, *latents: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (B,) at checked times, in the dtype of the arithmetic."""
    if weighting not in reference.WEIGHTINGS:
        raise ValueError(
            f"weighting: expected one of {reference.WEIGHTINGS}, got {weighting!r}"
            f"{nearest(str(weighting), reference.WEIGHTINGS)}"
        )
    schedule.require_times(t, latents[0].shape[0], latents[0].device)
    with torch.no_grad():
        alpha, sigma = schedule.levels(t, compute_dtype(*latents))
    _require_inside(alpha, sigma, t)
    return alpha, sigma


def _output(
    x0: Tensor,
    inputs: GeneratorInputs,
    alpha: Tensor,
    sigma: Tensor,
    weighting: str,
    *,
    x_t: Tensor | None,
    shift: Tensor | None,
) -> GeneratorOutput:
    with torch.no_grad():
        dim = x0.shape[1:].numel()
        normalised = (None, None, None) if weighting == "ikl" else (x0.detach(), x_t, shift)
        statistics = Statistics(*ops.generator_statistics(*inputs, *normalised))
        scale = reference.generator_scale(statistics, alpha, sigma, weighting, dim)
        energy = scale.scale.square() * statistics.difference / dim  # (B,) mean g^2
        gap, correction = (statistics.gap / dim).sqrt(), (statistics.correction / dim).sqrt()
        value = energy.mean() / 2.0
    return GeneratorOutput(
        loss=ops.generator_value(x0, value, *inputs, scale.scale),
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


def _require_inside(alpha: Tensor, sigma: Tensor, t: Tensor) -> None:
    if checks.values_are_checked(t.device) and bool(((alpha == 0) | (sigma == 0)).any()):
        raise ValueError(
            f"t: expected times at which alpha and sigma are positive, got values from {t.min().item()} to "
            f"{t.max().item()}; draw them from 2 to 98 % of the range, as sample_times does"
        )
