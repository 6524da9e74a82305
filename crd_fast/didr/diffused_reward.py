"""The diffused reward score: what a reward of clean samples adds to the score of noised ones.

"Diff-Instruct with Diffused Reward" (arXiv 2605.24001). Tilting the reference by exp(r / beta) adds to its score at t

    DRS = grad log E_ref[exp(r(x0) / beta) | x_t].

Its proxy moves the expectation inside, to a k-step estimate of x0:

    DRP = (1 / beta) grad_{x_t} r(x0_k(x_t)).

For a reward that is linear in x0 and a Gaussian reference DRP with k = 1 is exact. For a quadratic reward of curvature
lambda it ignores that x0 given x_t still varies, with variance V, and is too large by 1 + kappa V, kappa = lambda/beta;
`GaussianDamping` divides by that. More steps make x0_k sharper, which rewards of images need, and the proxy larger
still.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast import checks
from crd_fast.schedules import Schedule, compute_dtype, per_sample

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, *latent), t (B,)) -> clean estimate (B, *latent), with graph."""
Reward = Callable[[Tensor], Tensor]
"""clean latents (B, *latent) -> rewards (B,), with graph."""
Damping = Callable[[Tensor], Tensor] | Tensor
"""t (B,) -> factor (B,), or the factor."""


@dataclass(frozen=True)
class DiffusedReward:
    """What `diffused_reward` returns; nothing carries a graph.

    score (B, *latent): s_r in float32, float64 for float64 latents. reward (B,): r of the estimate. x0 (B, *latent):
    the estimate that was rewarded. first_x0 (B, *latent): `denoise` at (x_t, t), which also serves as the reference's
    conditional estimate.
    """

    score: Tensor
    reward: Tensor
    x0: Tensor
    first_x0: Tensor


def diffused_reward_score(
    x_t: Tensor,
    t: Tensor,
    denoise: Denoise,
    reward: Reward,
    *,
    beta: float,
    schedule: Schedule,
    steps: int | Tensor = 1,
    damping: Damping | None = None,
) -> Tensor:
    """s_r (B, *latent), the score that the reward adds at x_t: `diffused_reward(...).score`."""
    return diffused_reward(x_t, t, denoise, reward, beta=beta, schedule=schedule, steps=steps, damping=damping).score


def diffused_reward(
    x_t: Tensor,
    t: Tensor,
    denoise: Denoise,
    reward: Reward,
    *,
    beta: float,
    schedule: Schedule,
    steps: int | Tensor = 1,
    damping: Damping | None = None,
) -> DiffusedReward:
    """The diffused reward proxy (1 / beta) grad r(x0_k(x_t)), with what its computation yields besides.

    The rewards are summed over the batch before they are differentiated, so each sample has the gradient of its own.
    Only x_t is differentiated in: weights of `denoise` and `reward` get no gradient, whether frozen or not.

    Args:
        x_t: (B, *latent) noised samples; their graph, if any, is left alone.
        t: (B,) times of `schedule`.
        denoise: (x, t) -> clean estimate with graph, of the frozen reference.
        reward: clean latents -> (B,) rewards with graph; it decodes them if it looks at pixels.
        beta: > 0, temperature of the tilt exp(r / beta).
        steps: deterministic (DDIM) steps k >= 1 of the estimate, at t, t (k-1)/k, .., t/k; from the second on, times
            are float. Or an int64 (B,) tensor of such counts on the CPU, see `proxy_steps`: the whole batch then takes
            as many passes as its largest count.
        damping: a factor (B,) of the score, or a callable that gives it at t, such as `GaussianDamping`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, beta or steps out of range, or a reward that does not
            depend on x_t.
    """
    checks.require_latents("x_t", x_t)
    batch = x_t.shape[0]
    schedule.require_times(t, batch, x_t.device)
    if checks.require_finite_number("beta", beta) <= 0:
        raise ValueError(f"beta: expected a number > 0, got {beta!r}")
    counts = _counts(steps, batch)
    with torch.enable_grad():
        leaf = x_t.detach().requires_grad_()
        estimate, first = _estimate(leaf, t, denoise, schedule, counts)
        values = reward(estimate)
        checks.require_per_sample("reward(x0)", values, batch, x_t.device)
        (slope,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True) if values.requires_grad else (None,)
    if slope is None:
        raise ValueError(
            "reward: its value does not depend on x_t; expected denoise and reward to keep the graph, so run both "
            "without torch.no_grad() and without detach()"
        )
    score = slope.to(compute_dtype(x_t)) / beta
    if damping is not None:
        factor = damping(t) if callable(damping) else damping
        checks.require_per_sample("damping", factor, batch, x_t.device)
        score = per_sample(factor.detach().to(score.dtype), score) * score
    return DiffusedReward(score=score, reward=values.detach(), x0=estimate.detach(), first_x0=first.detach())


def proxy_steps(t: Tensor, schedule: Schedule, *, split: float = 0.4, late: int = 2) -> Tensor:
    """Steps of the estimate by time, int64 (B,): 1 below split T, where one step is sharp, `late` from there on.

    split: share of the time range in [0, 1]. late: >= 1; more than 2 adds bias. t: (B,), on the CPU.

    Raises:
        ValueError: times elsewhere than on the CPU, or a number out of range.
    """
    schedule.require_times(t, device=torch.device("cpu"))
    if not 0 <= checks.require_finite_number("split", split) <= 1:
        raise ValueError(f"split: expected a share of the time range in [0, 1], got {split!r}")
    if not isinstance(late, int) or isinstance(late, bool) or late < 1:
        raise ValueError(f"late: expected an int >= 1, got {late!r}")
    return torch.where(t < split * schedule.horizon, 1, late)


@dataclass(frozen=True)
class GaussianDamping:
    """1 / (1 + kappa V(t)), V = c sigma^2 / (alpha^2 c + sigma^2): what makes DRP with one step exact where the
    reference is Gaussian with variance c and the reward quadratic with curvature lambda = kappa beta.

    Elsewhere a model of it: V is then the variance of x0 that is left at t, and kappa the reward's typical curvature
    over beta. Call it with t (B,) for the factor (B,).

    schedule: of t. curvature: kappa = lambda / beta >= 0, in 1 / latent^2. variance: c > 0, of a latent element.

    Raises:
        ValueError: a number out of range.
    """

    schedule: Schedule
    curvature: float
    variance: float = 1.0

    def __post_init__(self) -> None:
        if checks.require_finite_number("curvature", self.curvature) < 0:
            raise ValueError(f"curvature: expected a number >= 0, got {self.curvature!r}")
        if checks.require_finite_number("variance", self.variance) <= 0:
            raise ValueError(f"variance: expected a number > 0, got {self.variance!r}")

    def __call__(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.levels(t)
        left = self.variance * sigma.square() / (alpha.square() * self.variance + sigma.square())
        return 1.0 / (1.0 + self.curvature * left)


def _counts(steps: int | Tensor, batch: int) -> list[int]:
    if isinstance(steps, Tensor):
        checks.require_per_sample("steps", steps, batch, torch.device("cpu"), dtypes=(torch.int64,))
        counts = steps.tolist()
    else:
        counts = [steps] * batch
    for count in counts:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"steps: expected an int >= 1, or an int64 (B,) tensor of such, got {steps!r}")
    return counts


def _estimate(x_t: Tensor, t: Tensor, denoise: Denoise, schedule: Schedule, counts: list[int]) -> tuple[Tensor, Tensor]:
    """x0_k of each sample's own k, and the estimate of the first step; both (B, *latent)."""
    first = checks.require_like("denoise(x, t)", denoise(x_t, t), "x_t", x_t)
    estimate, x, now = first, x_t, t
    for done in range(1, max(counts)):
        # samples that have had their steps go along at x_t and keep the estimate that they have
        going = torch.tensor([count > done for count in counts]).to(t.device)
        shares = [(count - done) / count if count > done else 1.0 for count in counts]
        then = t.to(compute_dtype(t, x_t)) * torch.tensor(shares, dtype=compute_dtype(t, x_t)).to(t.device)
        alpha, sigma = (per_sample(level, x_t) for level in schedule.levels(then, compute_dtype(x_t)))
        eps = schedule.convert(estimate, x, now, to="eps", kind="x0")
        chosen = per_sample(going, x_t)
        x = torch.where(chosen, (alpha * estimate + sigma * eps).to(x_t.dtype), x_t)
        now = then
        estimate = torch.where(chosen, checks.require_like("denoise(x, t)", denoise(x, now), "x_t", x_t), estimate)
    return estimate, first
