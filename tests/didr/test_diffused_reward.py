"""The diffused reward score against references and rewards whose exact one is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crd_fast.didr import GaussianDamping, diffused_reward, diffused_reward_score, proxy_steps
from crd_fast.schedules import VP, RectifiedFlow

from .closed_forms import Gaussian, Mixture, sdxl_alphas_cumprod

SDXL = VP(sdxl_alphas_cumprod())
FLOW = RectifiedFlow()
SCHEDULES = [FLOW, SDXL]
PRIOR = Gaussian(mean=0.7, variance=1.9)
LAMBDA, BETA, Y = 1.2, 0.6, 2.0
KAPPA = LAMBDA / BETA


def times(schedule, count=9):
    return torch.linspace(0.02, 0.98, count, dtype=torch.float64) * schedule.horizon


def levels(schedule, t):
    return tuple(level[:, None] for level in schedule.levels(t, torch.float64))


def denoiser(schedule, prior=PRIOR):
    return lambda x, t: prior.denoise(x, *levels(schedule, t))


def quadratic(x0):
    return -LAMBDA / 2 * (x0 - Y).square().flatten(1).sum(1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_linear_reward_is_exact(schedule):
    """r = b x tilts N(m, c) to N(m + c b / beta, c); DRS = K b / beta, at every x_t."""
    t, b = times(schedule), -1.3
    x_t = torch.randn(9, 5, dtype=torch.float64)
    s_r = diffused_reward_score(x_t, t, denoiser(schedule), lambda x0: b * x0.sum(1), beta=BETA, schedule=schedule)
    alpha, sigma = levels(schedule, t)
    torch.testing.assert_close(s_r, (PRIOR.gain(alpha, sigma) * b / BETA).expand(9, 5), rtol=1e-12, atol=0)
    tilted = PRIOR.tilted_linear(b / BETA)
    exact = tilted.score(x_t, alpha, sigma) - PRIOR.score(x_t, alpha, sigma)
    torch.testing.assert_close(s_r, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_quadratic_reward_is_too_large_by_one_plus_kappa_v(schedule):
    t = times(schedule)
    x_t = torch.randn(9, 5, dtype=torch.float64)
    alpha, sigma = levels(schedule, t)
    tilted = PRIOR.tilted_quadratic(KAPPA, Y)
    exact = tilted.score(x_t, alpha, sigma) - PRIOR.score(x_t, alpha, sigma)
    torch.testing.assert_close(PRIOR.quadratic_drs(x_t, alpha, sigma, KAPPA, Y), exact, rtol=1e-9, atol=1e-9)
    arguments = (x_t, t, denoiser(schedule), quadratic)
    proxy = diffused_reward_score(*arguments, beta=BETA, schedule=schedule)
    excess = 1 + KAPPA * PRIOR.left(alpha, sigma)
    torch.testing.assert_close(proxy, excess * exact, rtol=1e-9, atol=1e-9)
    assert excess.max() > 2  # the excess is not a rounding error

    damping = GaussianDamping(schedule, KAPPA, PRIOR.variance)
    torch.testing.assert_close(damping(t), 1 / excess[:, 0], rtol=1e-12, atol=0)
    for given in (damping, damping(t)):
        damped = diffused_reward_score(*arguments, beta=BETA, schedule=schedule, damping=given)
        torch.testing.assert_close(damped, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_mixture_with_linear_reward(schedule):
    """The tilt of a mixture is a mixture; log E_ref[exp(r/beta) | x_t] by quadrature has its score as gradient."""
    reference, b = Mixture((0.3, 0.7), (-1.5, 1.0), (0.4, 0.2)), 0.8
    tilted = reference.tilted_linear(b / BETA)
    t = times(schedule, 5)
    alpha, sigma = levels(schedule, t)
    x = (alpha * torch.randn(5, 3, dtype=torch.float64)).requires_grad_()
    exact = tilted.score(x, alpha, sigma) - reference.score(x, alpha, sigma)

    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    prior = reference.log_density(grid, one, none)
    likelihood = -((x[..., None] - alpha[..., None] * grid) ** 2) / (2 * sigma[..., None] ** 2)
    joint = prior + likelihood
    expected = torch.logsumexp(joint + b / BETA * grid, -1) - torch.logsumexp(joint, -1)
    (by_definition,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(exact, by_definition, rtol=1e-7, atol=1e-7)

    def denoise(x, t):
        alpha, sigma = levels(schedule, t)
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        total = reference.log_density(leaf, alpha, sigma).sum()
        (score,) = torch.autograd.grad(total, leaf, create_graph=True)
        return schedule.to_x0(score, leaf, t, "score")

    proxy = diffused_reward_score(x.detach(), t, denoise, lambda x0: b * x0.sum(1), beta=BETA, schedule=schedule)
    # grad of E[x0 | x_t] is alpha/sigma^2 Var[x0 | x_t]: the first cumulant of the exact one, all of it as b -> 0
    small = 1e-4
    faint = reference.tilted_linear(small / BETA).score(x, alpha, sigma) - reference.score(x, alpha, sigma)
    torch.testing.assert_close(proxy * small / b, faint.detach(), rtol=2e-3, atol=1e-9)
    assert (proxy - exact).abs().max() > 0.05  # and not exact otherwise


def slope(schedule, t, steps, prior):
    """d x0_k / d x_t for a Gaussian reference: the product of the DDIM steps' slopes."""
    t = torch.tensor([t], dtype=torch.float64)
    total, now = 1.0, t
    for left in range(steps - 1, 0, -1):
        then = t * left / steps
        (a, s), (a_then, s_then) = schedule.levels(now), schedule.levels(then)
        gain = prior.gain(a, s)
        total, now = total * (a_then * gain + s_then * (1 - a * gain) / s), then
    return (total * prior.gain(*schedule.levels(now))).item()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_steps_are_ddim(schedule, steps):
    """Of a linear reward the score is the slope of the k-step estimate."""
    share = 0.399
    t = torch.full((2,), share * schedule.horizon, dtype=torch.float64)
    x_t = torch.randn(2, 3, dtype=torch.float64)
    s_r = diffused_reward_score(
        x_t, t, denoiser(schedule), lambda x0: x0.sum(1), beta=1.0, schedule=schedule, steps=steps
    )
    want = slope(schedule, share * schedule.horizon, steps, PRIOR)
    torch.testing.assert_close(s_r, torch.full_like(s_r, want), rtol=1e-11, atol=0)


def test_more_steps_are_a_larger_proxy():
    """J_k / K = 1, 1.25, 1.38 at t = 399 of SDXL's schedule with a standard normal reference."""
    x_t, t = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([399.0], dtype=torch.float64)
    denoise = denoiser(SDXL, Gaussian())
    scores = [
        diffused_reward_score(x_t, t, denoise, lambda x0: x0.sum(1), beta=1.0, schedule=SDXL, steps=k).item()
        for k in (1, 2, 4)
    ]
    assert [score / scores[0] for score in scores] == pytest.approx([1.0, 1.25, 1.38], abs=0.005)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_steps_of_each_sample(schedule):
    """A batch of different counts is each sample's own call; the first estimate is that of (x_t, t)."""
    counts = torch.tensor([1, 3, 2, 1])
    t, x_t = times(schedule, 4), torch.randn(4, 3, dtype=torch.float64)
    denoise = denoiser(schedule)
    together = diffused_reward(x_t, t, denoise, quadratic, beta=BETA, schedule=schedule, steps=counts)
    for i, count in enumerate(counts.tolist()):
        row = slice(i, i + 1)
        alone = diffused_reward(x_t[row], t[row], denoise, quadratic, beta=BETA, schedule=schedule, steps=count)
        torch.testing.assert_close(together.score[row], alone.score, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.x0[row], alone.x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.reward[row], alone.reward, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.first_x0, denoise(x_t, t), rtol=0, atol=0)
    torch.testing.assert_close(together.reward, quadratic(together.x0), rtol=1e-12, atol=1e-12)


def test_number_of_passes_and_their_times():
    seen = []

    def denoise(x, t):
        seen.append(t.tolist())
        return PRIOR.denoise(x, *(level.float() for level in levels(SDXL, t)))

    t = torch.tensor([400, 800])
    diffused_reward(torch.randn(2, 3), t, denoise, quadratic, beta=BETA, schedule=SDXL, steps=4)
    assert seen == [[400, 800], [300.0, 600.0], [200.0, 400.0], [100.0, 200.0]]
    seen.clear()
    diffused_reward(torch.randn(2, 3), t, denoise, quadratic, beta=BETA, schedule=SDXL)
    assert seen == [[400, 800]]


def test_default_steps_by_time():
    assert proxy_steps(torch.tensor([20, 399, 400, 980]), SDXL).tolist() == [1, 1, 2, 2]
    assert proxy_steps(torch.tensor([0.1, 0.39, 0.41, 0.98]), FLOW).tolist() == [1, 1, 2, 2]
    assert proxy_steps(torch.tensor([0.1, 0.39]), FLOW, split=0.2, late=3).tolist() == [1, 3]
    assert proxy_steps(torch.tensor([0.5]), FLOW).dtype == torch.int64


def test_rewards_are_summed_not_averaged():
    """A sample's score does not depend on how many others are in the batch."""
    t, x_t = times(FLOW, 6), torch.randn(6, 3, dtype=torch.float64)
    whole = diffused_reward_score(x_t, t, denoiser(FLOW), quadratic, beta=BETA, schedule=FLOW)
    part = diffused_reward_score(x_t[:2], t[:2], denoiser(FLOW), quadratic, beta=BETA, schedule=FLOW)
    torch.testing.assert_close(whole[:2], part, rtol=1e-14, atol=0)


def test_weights_and_x_t_keep_no_gradient():
    """Trainable weights of both networks and the graph of x_t are left alone, also under no_grad."""
    reference, decoder = nn.Linear(3, 3), nn.Linear(3, 1)
    source = torch.randn(2, 3, requires_grad=True)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            out = diffused_reward(
                source * 2,
                torch.tensor([0.3, 0.6]),
                lambda x, t: reference(x),
                lambda x0: decoder(x0)[:, 0],
                beta=0.5,
                schedule=FLOW,
            )
        for tensor in (out.score, out.reward, out.x0, out.first_x0):
            assert not tensor.requires_grad
        torch.testing.assert_close(out.score, 2 * (decoder.weight @ reference.weight).detach().expand(2, 3))
    assert source.grad is None
    assert all(p.grad is None for module in (reference, decoder) for p in module.parameters())


def test_half_precision_latents_give_a_float32_score():
    """Dividing by a small beta happens in float32: the score of 2^-10 / 2^-130 has no float16 nor bfloat16."""
    x_t = torch.zeros(2, 3, dtype=torch.float16)
    s_r = diffused_reward_score(
        x_t, torch.tensor([0.3, 0.6]), lambda x, t: x, lambda x0: x0.sum(1) / 1024, beta=2.0**-30, schedule=FLOW
    )
    assert s_r.dtype == torch.float32
    assert s_r.tolist() == [[2.0**20] * 3] * 2


def call(**changes):
    arguments = {
        "x_t": torch.randn(2, 3), "t": torch.tensor([0.3, 0.6]), "denoise": lambda x, t: x,
        "reward": lambda x0: x0.sum(1), "beta": 1.0, "schedule": FLOW,
    } | changes  # fmt: skip
    return diffused_reward_score(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_t": torch.randn(3)}, "x_t: expected"),
        ({"t": torch.tensor([0.3])}, r"t: expected shape \(2,\)"),
        ({"t": torch.tensor([0.3, 1.6])}, r"t: expected times in \[0, 1\]"),
        ({"beta": 0.0}, "beta: expected a number > 0, got 0.0"),
        ({"beta": float("nan")}, "beta: expected a finite number"),
        ({"steps": 0}, "steps: expected an int >= 1"),
        ({"steps": 1.5}, "steps: expected an int >= 1"),
        ({"steps": torch.tensor([1, 0])}, "steps: expected an int >= 1"),
        ({"steps": torch.tensor([1, 2, 1])}, r"steps: expected shape \(2,\), int64"),
        ({"damping": torch.ones(3)}, r"damping: expected shape \(2,\)"),
        ({"damping": lambda t: 1.0}, r"damping: expected shape \(2,\)"),
        ({"reward": lambda x0: x0.sum()}, r"reward\(x0\): expected shape \(2,\)"),
        ({"reward": lambda x0: x0.detach().sum(1)}, "reward: its value does not depend on x_t"),
        ({"denoise": lambda x, t: torch.ones_like(x).requires_grad_()}, "reward: its value does not depend on x_t"),
        ({"denoise": lambda x, t: x[:, :2]}, r"denoise\(x, t\): expected shape \(2, 3\)"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianDamping(FLOW, -1.0), "curvature: expected a number >= 0"),
        (lambda: GaussianDamping(FLOW, 1.0, 0.0), "variance: expected a number > 0"),
        (lambda: proxy_steps(torch.tensor([0.5]), FLOW, split=1.5), "split: expected a share"),
        (lambda: proxy_steps(torch.tensor([0.5]), FLOW, late=0), "late: expected an int >= 1"),
        (lambda: proxy_steps(torch.tensor([5]), FLOW), "t: expected shape"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
