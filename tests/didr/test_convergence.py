"""Trained until it stands still, an affine generator is where the mathematics says, for each weighting and proxy.

The generator is x0 = mean + spread z with the exact score of its own marginals as TA network. z and eps are quadrature
nodes and each row is one time, so the gradient has no noise; a row of many independent elements is also what DMD2's
normaliser sees in a large latent, where mean |x0 - x0_ref| is its expectation.
"""

from __future__ import annotations

import math

import pytest
import torch

from crd_fast.didr import GaussianDamping, diffused_reward_score, generator_loss, reference_x0
from crd_fast.schedules import VP, RectifiedFlow

from .closed_forms import Gaussian, column, normal_grid, sdxl_alphas_cumprod

SDXL = VP(sdxl_alphas_cumprod())
FLOW = RectifiedFlow()
PRIOR, KAPPA, Y = Gaussian(), 2.0, 2.0
EVERY = torch.arange(20, 981, dtype=torch.float64)  # 2 to 98 % of SDXL's timesteps
HUNDRED = torch.linspace(0.02 * 999, 0.98 * 999, 108, dtype=torch.float64)
COARSE = torch.linspace(20, 980, 49, dtype=torch.float64)


def quadratic(x0):
    return -KAPPA / 2 * (x0 - Y).square().sum(1)


def train(schedule, t, weighting, score, *, prior=PRIOR, side=2, iterations=300, rate=0.08):
    """Mean and variance after Adam with a decaying rate; score(x_t, t) is what the reward adds.

    Without a normaliser the gradient is quadratic in z and eps, for which two nodes of each are exact.
    """
    z, eps = (nodes.expand(t.numel(), -1) for nodes in normal_grid(side))
    mean = torch.tensor(prior.mean, dtype=torch.float64, requires_grad=True)
    spread = torch.tensor(prior.variance**0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mean, spread], lr=rate, betas=(0.8, 0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: math.exp(-6 * max(0, i / iterations - 0.4)))
    alpha, sigma = (column(level) for level in schedule.levels(t))
    for _ in range(iterations):
        x0 = mean + spread * z
        x_t = schedule.add_noise(x0.detach(), eps, t)
        own = Gaussian(mean.item(), spread.item() ** 2)
        x0_ta = schedule.to_x0(own.score(x_t, alpha, sigma), x_t, t, "score")
        x0_ref = reference_x0(prior.score(x_t, alpha, sigma), x_t, t, schedule=schedule, kind="score")
        out = generator_loss(x0, x_t, t, x0_ta, x0_ref, score(x_t, t), schedule=schedule, weighting=weighting)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        decay.step()
    return mean.item(), spread.item() ** 2


def proxy(schedule, steps=1, damping=None, reward=quadratic, prior=PRIOR):
    def denoise(x, t):
        return prior.denoise(x, *(column(level) for level in schedule.levels(t)))

    return lambda x_t, t: diffused_reward_score(
        x_t, t, denoise, reward, beta=1.0, schedule=schedule, steps=steps, damping=damping
    )


def exact_quadratic(schedule, prior=PRIOR):
    return lambda x_t, t: prior.quadratic_drs(x_t, *(column(level) for level in schedule.levels(t)), KAPPA, Y)


# --- fixed points on paper ---


def slopes(t, steps):
    """J_k, the slope of the k-step estimate in x_t under PRIOR = N(0, 1), where D(x) = alpha x."""
    total, now = torch.ones_like(t), t
    for left in range(steps - 1, 0, -1):
        then = t * left / steps
        (a, s), (a_then, s_then) = SDXL.levels(now), SDXL.levels(then)
        total, now = total * (a_then * a + s_then * (1 - a * a) / s), then
    return total * SDXL.alpha(now)


def fixed_point(t, steps, weight, damping=1.0):
    """Mean and variance where the gradient in both vanishes, for N(0, 1) and reward -kappa/2 (x0 - y)^2.

    With s_r = kappa J (y - J x_t), x_t = alpha (mean + spread z) + sigma eps, the expected gradient of the samples is
        in the mean:      sum over t of w [alpha mean + kappa J (J alpha mean - y)],
        times z (spread): sum over t of w alpha spread [1 - 1/(alpha^2 spread^2 + sigma^2) + kappa J^2],
    w the weight of the score difference at t. The second grows with the variance: bisection. w may depend on both.
    """
    alpha, sigma = SDXL.levels(t)
    jump = slopes(t, steps)
    strength = KAPPA * damping * jump
    mean, variance = 1.5, 0.3
    for _ in range(200):
        w = weight(alpha, sigma, mean, variance)
        new_mean = ((w * strength * Y).sum() / (w * alpha * (1 + strength * jump)).sum()).item()
        low, high = 0.0, 4.0
        for _ in range(45):
            middle = (low + high) / 2
            spread = w * alpha * (1 - 1 / (alpha**2 * middle + sigma**2) + strength * jump)
            low, high = (middle, high) if spread.sum() < 0 else (low, middle)
        if abs(new_mean - mean) + abs(middle - variance) < 1e-12:
            break
        mean, variance = (mean + new_mean) / 2, (variance + middle) / 2
    return mean, variance


def ikl(alpha, sigma, mean, variance):
    return alpha


def dmd2(alpha, sigma, mean, variance):
    """sigma^2/alpha over E |x0 - x0_ref|, x0 - x0_ref = sigma^2 x0 - alpha sigma eps a normal: its folded mean."""
    center, width = sigma**2 * mean, (sigma**4 * variance + alpha**2 * sigma**2).sqrt()
    tail = torch.erf(center / (width * math.sqrt(2)))
    folded = width * math.sqrt(2 / math.pi) * torch.exp(-(center**2) / (2 * width**2)) + center * tail
    return sigma**2 / alpha / folded


def bounded(alpha, sigma, mean, variance):
    return dmd2(alpha, sigma, mean, variance) * (alpha / sigma).square().clamp(max=1)


def idealised(alpha, sigma, mean, variance):
    """DMD2 with a normaliser of sigma, what mean |x0 - x0_ref| is proportional to for most of a trajectory."""
    return sigma / alpha


# --- exact rewards ---


@pytest.mark.parametrize("weighting", ["ikl", "bounded", "dmd2"])
@pytest.mark.parametrize("schedule", [FLOW, SDXL], ids=repr)
def test_exact_score_reaches_the_optimum(schedule, weighting):
    """Mean 4/3 and variance 1/3, whatever weighs the times."""
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * schedule.horizon
    mean, variance = train(schedule, t, weighting, exact_quadratic(schedule))
    optimum = PRIOR.tilted_quadratic(KAPPA, Y)
    assert mean == pytest.approx(optimum.mean, rel=0.01)
    assert variance == pytest.approx(optimum.variance, rel=0.05)


@pytest.mark.parametrize("schedule", [FLOW, SDXL], ids=repr)
def test_linear_reward_reaches_the_optimum_through_the_proxy(schedule):
    prior, slope = Gaussian(0.5, 1.5), -0.6
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * schedule.horizon
    score = proxy(schedule, reward=lambda x0: slope * x0.sum(1), prior=prior)
    mean, variance = train(schedule, t, "ikl", score, prior=prior)
    optimum = prior.tilted_linear(slope)
    assert mean == pytest.approx(optimum.mean, rel=0.01)
    assert variance == pytest.approx(optimum.variance, rel=0.05)


@pytest.mark.parametrize("weighting", ["ikl", "dmd2"])
def test_damping_makes_the_proxy_exact(weighting):
    score = proxy(SDXL, damping=GaussianDamping(SDXL, KAPPA))
    mean, variance = train(SDXL, COARSE, weighting, score)
    optimum = PRIOR.tilted_quadratic(KAPPA, Y)
    assert mean == pytest.approx(optimum.mean, rel=0.01)
    assert variance == pytest.approx(optimum.variance, rel=0.05)


# --- the proxy's bias ---


@pytest.mark.parametrize(("steps", "mean", "variance"), [(1, 1.732, 0.240), (2, 1.858, 0.191), (4, 1.893, 0.166)])
def test_bias_of_the_integral_kl(steps, mean, variance):
    """On a hundred times from 2 to 98 % the fixed points are the known ones; training on them reaches them."""
    on_paper = fixed_point(HUNDRED, steps, ikl)
    assert on_paper == pytest.approx((mean, variance), abs=1e-3)
    assert train(SDXL, HUNDRED, "ikl", proxy(SDXL, steps)) == pytest.approx(on_paper, rel=2e-3)


def test_bias_of_the_integral_kl_at_every_timestep():
    """One step, every timestep from 20 to 980: (1.737, 0.238)."""
    assert fixed_point(EVERY, 1, ikl) == pytest.approx((1.737, 0.238), abs=1e-3)
    assert train(SDXL, EVERY, "ikl", proxy(SDXL)) == pytest.approx((1.737, 0.238), abs=2e-3)


@pytest.mark.parametrize(("steps", "mean", "variance"), [(1, 2.618, 0.144), (2, 4.527, 0.012), (4, 4.954, 0.0)])
def test_bias_with_a_normaliser_of_sigma(steps, mean, variance):
    """The known fixed points of DMD2's weighting have sigma in the place of its normaliser."""
    assert fixed_point(HUNDRED, steps, idealised) == pytest.approx((mean, variance), abs=2e-3)


@pytest.mark.parametrize(("weighting", "weight"), [("dmd2", dmd2), ("bounded", bounded)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_bias_with_the_normaliser(weighting, weight, steps):
    on_paper = fixed_point(COARSE, steps, weight)
    trained = train(SDXL, COARSE, weighting, proxy(SDXL, steps), side=24)
    assert trained[0] == pytest.approx(on_paper[0], rel=0.01)
    assert trained[1] == pytest.approx(on_paper[1], rel=0.05)


def test_dmd2_overshoots_the_rewards_own_optimum():
    """The reward is largest at 2: the integral KL stays below with every proxy, DMD2's weighting does not."""
    for steps in (1, 2, 4):
        assert 4 / 3 < fixed_point(COARSE, steps, ikl)[0] < Y
        assert 4 / 3 < fixed_point(COARSE, steps, bounded)[0] < Y
        assert fixed_point(COARSE, steps, dmd2)[0] > Y + 0.3
    exact = 1 / (1 + KAPPA * (1 - SDXL.alpha(COARSE) ** 2))
    for weight in (ikl, bounded, dmd2):
        assert fixed_point(COARSE, 1, weight, damping=exact) == pytest.approx((4 / 3, 1 / 3), abs=1e-9)
