"""The guided clean estimate of the frozen reference."""

from __future__ import annotations

import torch
from torch import Tensor

from crd_fast import checks
from crd_fast.schedules import Schedule, compute_dtype


@torch.no_grad()
def reference_x0(
    conditional: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    schedule: Schedule,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    kind: str | None = None,
) -> Tensor:
    """x0_ref (B, *latent) of the prediction u + w (c - u), without graph; in float32, or float64 for float64 latents.

    Predictions of every kind are affine in x0 at a given (x_t, t), so guiding them and guiding their clean estimates
    are the same. With w = 1 the result is that of c, to the bit. DIDR has the optimum of reward maximisation on clean
    samples at w = 1 (arXiv 2605.24001); a larger w tilts the reference besides.

    Args:
        conditional, unconditional: (B, *latent) predictions c and u at (x_t, t). u is needed unless w is 1, and is not
            read then.
        x_t: (B, *latent) noised samples. t: (B,) times of `schedule`.
        guidance_scale: w. Pipelines that define guidance as c + g (c - u), as that of Z-Image, mean w = 1 + g.
        kind: of the predictions, "eps", "v", "x0" or "score"; None is the schedule's own.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown kind, or no u where w is not 1.
    """
    checks.require_latents("conditional", conditional)
    checks.require_like("x_t", x_t, "conditional", conditional)
    weight = checks.require_finite_number("guidance_scale", guidance_scale)
    predicted = conditional
    if weight != 1.0:
        if unconditional is None:
            raise ValueError(
                f"unconditional: expected a prediction because guidance_scale is {guidance_scale}, got None; pass the "
                "prediction of the empty prompt, or guidance_scale=1"
            )
        checks.require_like("unconditional", unconditional, "conditional", conditional)
        dtype = compute_dtype(conditional, unconditional, x_t)
        predicted = conditional.to(dtype) + (weight - 1.0) * (conditional.to(dtype) - unconditional.to(dtype))
    return schedule.to_x0(predicted, x_t, t, kind)
