"""The TA's loss, the guided reference and the times of both stages."""

from __future__ import annotations

import math

import pytest
import torch

from crd_fast.didr import reference_x0, sample_times, ta_loss
from crd_fast.schedules import KINDS, VP, RectifiedFlow

from .closed_forms import Gaussian, column, normal_grid, sdxl_alphas_cumprod

SDXL = VP(sdxl_alphas_cumprod())
FLOW = RectifiedFlow()
SCHEDULES = [FLOW, SDXL]


def mid_times(schedule, count):
    return torch.linspace(0.1, 0.9, count, dtype=torch.float64) * schedule.horizon


# --- the TA's loss ---


@pytest.mark.parametrize("kind", [None, "eps", "v", "x0"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_ta_loss_is_the_mean_squared_error(schedule, kind):
    t = mid_times(schedule, 4)
    x0, eps = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    predicted = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    out = ta_loss(predicted, x0, eps, t, schedule=schedule, kind=kind)
    name = kind or ("v" if schedule is FLOW else "eps")
    alpha, sigma = (level[:, None, None] for level in schedule.levels(t))
    velocity = eps - x0 if schedule is FLOW else alpha * eps - sigma * x0
    target = {"eps": eps, "x0": x0, "v": velocity}[name].detach()
    errors = (predicted - target).square().mean((1, 2))
    torch.testing.assert_close(out.errors, errors.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, errors.mean(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(out.loss, predicted, retain_graph=True)
    torch.testing.assert_close(grad, 2 * (predicted - target).detach() / predicted.numel(), rtol=1e-12, atol=1e-15)
    assert not out.errors.requires_grad
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(out.loss, (x0, eps))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_ta_loss_is_least_at_the_score_of_the_samples(schedule):
    """Denoising score matching: the best affine prediction is that of the samples' own noised density."""
    own = Gaussian(0.7, 0.4)
    z, eps = (nodes[None].expand(3, -1) for nodes in normal_grid(6))
    t = mid_times(schedule, 3)
    alpha, sigma = (column(level) for level in schedule.levels(t))
    x0 = own.mean + math.sqrt(own.variance) * z
    x_t = schedule.add_noise(x0, eps, t)
    scale, offset = (torch.randn(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([scale, offset], max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = ta_loss(scale * x_t + offset, x0, eps, t, schedule=schedule).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    learned = schedule.to_score((scale * x_t + offset).detach(), x_t, t)
    torch.testing.assert_close(learned, own.score(x_t, alpha, sigma), rtol=1e-5, atol=1e-5)


def test_ta_loss_of_half_precision_predictions():
    x0, eps, predicted = torch.randn(3, 2, 4, 8).bfloat16()
    t = torch.tensor([0.3, 0.6])
    out = ta_loss(predicted, x0, eps, t, schedule=FLOW)
    exact = (predicted.double() - (eps.double() - x0.double())).square().mean((1, 2))
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.errors.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicted": torch.randn(2)}, "predicted: expected"),
        ({"x0": torch.randn(2, 4)}, "x0: expected shape"),
        ({"eps": torch.randn(1, 3)}, "eps: expected shape"),
        ({"t": torch.rand(3)}, r"t: expected shape \(2,\)"),
        ({"kind": "noise"}, "kind: expected one of"),
    ],
)
def test_ta_loss_bad_input(changes, message):
    given = {"predicted": torch.randn(2, 3), "x0": torch.randn(2, 3), "eps": torch.randn(2, 3), "t": torch.rand(2)}
    with pytest.raises(ValueError, match=message):
        ta_loss(**given | changes, schedule=FLOW)


# --- the guided reference ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_guidance_is_linear_in_predictions_of_every_kind(schedule, kind):
    t = mid_times(schedule, 3)
    x_t, c, u = torch.randn(3, 3, 5, dtype=torch.float64)
    for weight in (0.0, 1.0, 4.5, 7.5):
        guided = reference_x0(c, x_t, t, schedule=schedule, unconditional=u, guidance_scale=weight, kind=kind)
        want = schedule.to_x0(u + weight * (c - u), x_t, t, kind)
        torch.testing.assert_close(guided, want, rtol=1e-11, atol=1e-11)
        clean_c, clean_u = (schedule.to_x0(p, x_t, t, kind) for p in (c, u))
        torch.testing.assert_close(guided, clean_u + weight * (clean_c - clean_u), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_scale_one_is_the_conditional_prediction_to_the_bit(schedule, dtype):
    t = mid_times(schedule, 3).float()
    x_t, c, u = torch.randn(3, 3, 5).to(dtype)
    alone = reference_x0(c, x_t, t, schedule=schedule)
    with_unconditional = reference_x0(c, x_t, t, schedule=schedule, unconditional=u * math.nan, guidance_scale=1.0)
    assert torch.equal(alone, schedule.to_x0(c, x_t, t)) and torch.equal(alone, with_unconditional)
    assert alone.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_guidance_of_half_precision_subtracts_in_float32():
    x_t, t = torch.zeros(1, 2), torch.tensor([1.0])
    c, u = torch.full((1, 2), 1.0 + 2**-7).bfloat16(), torch.ones(1, 2).bfloat16()
    guided = reference_x0(c, x_t, t, schedule=FLOW, unconditional=u, guidance_scale=1.5)
    assert guided.tolist() == [[-(1.0 + 1.5 * 2**-7)] * 2]


def test_reference_keeps_no_graph():
    c = torch.randn(2, 3, requires_grad=True)
    assert not reference_x0(c, c, torch.rand(2), schedule=FLOW).requires_grad


def test_guidance_bad_input():
    x, t = torch.randn(2, 3), torch.rand(2)
    with pytest.raises(
        ValueError, match="unconditional: expected a prediction because guidance_scale is 4.5, got None"
    ):
        reference_x0(x, x, t, schedule=FLOW, guidance_scale=4.5)
    with pytest.raises(ValueError, match="unconditional: expected shape"):
        reference_x0(x, x, t, schedule=FLOW, unconditional=x[:1], guidance_scale=4.5)
    with pytest.raises(ValueError, match="guidance_scale: expected a finite number"):
        reference_x0(x, x, t, schedule=FLOW, guidance_scale=math.nan)
    with pytest.raises(ValueError, match="x_t: expected shape"):
        reference_x0(x, x[:1], t, schedule=FLOW)


# --- times ---


def draw(count=4000, **changes):
    arguments = {"schedule": FLOW, "seed": 3, "step": 5} | changes
    return sample_times(count, **arguments)


def test_vp_times_are_every_integer_of_the_range():
    t = draw(961 * 40, schedule=SDXL)
    assert t.dtype == torch.int64
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == list(range(20, 981))
    assert counts.min() >= 38 and counts.max() <= 42  # strata: about 40 each
    few = draw(1000, schedule=VP([0.9, 0.8, 0.7, 0.6, 0.5]), low=0.2, high=0.6)
    assert few.unique().tolist() == [1, 2, 3]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("strategy", ["uniform", "logit_normal"])
def test_flow_times_have_the_conditioned_distribution(strategy, shift):
    """Their empirical distribution function is the strategy's, restricted to [0.1, 0.9], within one stratum."""
    mean, std = 0.4, 0.8
    t = draw(strategy=strategy, shift=shift, mean=mean, std=std, low=0.1, high=0.9).double().sort().values

    def distribution(t):
        before = t / (shift + (1 - shift) * t)
        return before if strategy == "uniform" else torch.special.ndtr((torch.logit(before) - mean) / std)

    low, high = (distribution(torch.tensor(end, dtype=torch.float64)) for end in (0.1, 0.9))
    share = (distribution(t) - low) / (high - low)
    expected = (torch.arange(len(t), dtype=torch.float64) + 0.5) / len(t)
    assert (share - expected).abs().max() < 1 / len(t)
    assert t[0] >= 0.1 - 1e-7 and t[-1] <= 0.9 + 1e-7


def test_times_depend_on_seed_and_step_alone():
    state = torch.get_rng_state()
    first = draw()
    torch.manual_seed(7)
    assert torch.equal(first, draw()) and first.dtype == torch.float32
    assert not torch.equal(first, draw(step=6)) and not torch.equal(first, draw(seed=4))
    torch.set_rng_state(state)
    assert 0.02 <= first.min() < 0.021 and 0.979 < first.max() <= 0.98


def test_extreme_times_stay_finite_and_inside():
    t = draw(strategy="logit_normal", mean=30.0, std=0.1)
    assert t.isfinite().all() and t.min() >= 0.02 and t.max() <= 0.98


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "logitnormal"}, "strategy: .*did you mean 'logit_normal'"),
        ({"low": 0.0}, "low, high: expected 0 < low < high < 1, got 0.0 and 0.98"),
        ({"low": 0.5, "high": 0.4}, "low, high: expected"),
        ({"high": 1.0}, "low, high: expected"),
        ({"shift": 0.0}, "shift: expected a number > 0"),
        ({"std": -1.0}, "std: expected a number > 0"),
        ({"mean": math.inf}, "mean: expected a finite number"),
        ({"count": 0}, "count: expected an int >= 1"),
        ({"seed": -1}, "seed: "),
        ({"schedule": SDXL, "shift": 3.0}, "strategy, shift: a VP schedule draws its timesteps uniformly"),
        ({"schedule": SDXL, "strategy": "logit_normal"}, "strategy, shift: a VP schedule"),
        ({"schedule": VP([0.9, 0.1]), "low": 0.1, "high": 0.4}, "low, high: no timestep of .* lies in"),
    ],
)
def test_times_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(**{"count": 4} | changes)
