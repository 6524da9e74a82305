"""Stage I of DIDR: the TA network follows the generator by denoising score matching.

The TA ("teaching assistant") is the model psi of the generator's own samples; its score at x_t is s_psi of the
generator's gradient ("Diff-Instruct with Diffused Reward", arXiv 2605.24001). It predicts without guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crd_fast import checks
from crd_fast.errors import nearest
from crd_fast.forward_process import PREDICTIONS, Noised, residual_stats
from crd_fast.reference import SIGMA_CLAMP
from crd_fast.schedules import Schedule


@dataclass(frozen=True)
class TAOutput:
    """loss: scalar, the mean over samples; it carries the graph. errors (B,): mean squared error of each sample,
    detached."""

    loss: Tensor
    errors: Tensor


def ta_loss(
    predicted: Tensor, x0: Tensor, eps: Tensor, t: Tensor, *, schedule: Schedule, kind: str | None = None
) -> TAOutput:
    """Mean squared error of the TA's prediction at alpha x0 + sigma eps: denoising score matching.

    Args:
        predicted: (B, *latent) prediction of the TA network, any float dtype. Gradients flow to it alone.
        x0: (B, *latent) sample of the generator. eps: (B, *latent) the noise that was added. t: (B,) times.
        schedule: of t; its `target` is what is regressed onto: eps (VP) or eps - x0 (rectified flow).
        kind: of `predicted`, "eps", "v" or "x0"; None is the schedule's own.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown kind.
        ExtensionMissingError: see `crd_fast.ops`.
    """
    checks.require_latents("predicted", predicted)
    for name, other in (("x0", x0), ("eps", eps)):
        checks.require_like(name, other, "predicted", predicted)
    target = schedule.target(x0.detach(), eps.detach(), t, kind)
    errors = residual_stats(predicted, target).mse
    return TAOutput(loss=errors.mean(), errors=errors.detach())


def ta_loss_of_noised(predicted: Tensor, noised: Noised, *, kind: str = "v") -> TAOutput:
    """`ta_loss` with noise that is made again: the prediction and the clean sample are all that is read.

    Args:
        predicted: (B, *latent) prediction of the TA network, any float dtype. Gradients flow to it alone.
        noised: what it was predicted from, or a multiple of that, such as `crd_fast.didr.noising.noised` gives.
        kind: of `predicted`, and of the error: "v" (eps - x0), "eps" or "x0".

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a kind whose error is not the noise's and the
            sample's: the velocity of a variance-preserving schedule needs `ta_loss`.
        ExtensionMissingError: see `crd_fast.ops`.
    """
    if kind not in PREDICTIONS:
        raise ValueError(f"kind: expected one of {PREDICTIONS}, got {kind!r}{nearest(str(kind), PREDICTIONS)}")
    errors = residual_stats(predicted, noised, prediction=kind).mse  # of the velocity
    if kind != "v":
        level = noised.sigma if kind == "x0" else 1.0 - noised.sigma
        errors = level.clamp(min=SIGMA_CLAMP).square() * errors
    return TAOutput(loss=errors.mean(), errors=errors.detach())
