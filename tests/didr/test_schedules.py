"""alpha, sigma and conversions between predictions, against the definition x_t = alpha x0 + sigma eps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import crd_fast
from crd_fast import checks
from crd_fast.errors import ConfigError
from crd_fast.schedules import KINDS, VP, RectifiedFlow

from .closed_forms import Gaussian, sdxl_alphas_cumprod

SDXL = VP(sdxl_alphas_cumprod())
FLOW = RectifiedFlow()
SCHEDULES = [FLOW, SDXL]


def case(schedule, count=40, dtype=torch.float64):
    """x0, eps, x_t and t between 2 and 98 % of the range, with what each kind of prediction must be."""
    t = torch.linspace(0.02, 0.98, count, dtype=torch.float64) * schedule.horizon
    x0, eps = torch.randn(2, count, 3, 2, dtype=dtype)
    alpha, sigma = (level[:, None, None].to(dtype) for level in schedule.levels(t))
    v = eps - x0 if schedule is FLOW else alpha * eps - sigma * x0
    return t, alpha * x0 + sigma * eps, {"eps": eps, "v": v, "x0": x0, "score": -eps / sigma}


def test_importing_the_package_gives_the_schedules():
    assert crd_fast.schedules.RectifiedFlow is RectifiedFlow
    assert "didr" in crd_fast.__all__ and "schedules" in crd_fast.__all__


def test_rectified_flow_levels():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert FLOW.alpha(t).tolist() == [1.0, 0.75, 0.0]
    assert FLOW.sigma(t).tolist() == [0.0, 0.25, 1.0]


def test_vp_levels_are_the_tables_at_integers():
    signal = sdxl_alphas_cumprod()
    every = torch.arange(1000)
    for t in (every.double(), every):
        alpha, sigma = SDXL.levels(t, torch.float64)
        torch.testing.assert_close(alpha.square(), signal, rtol=1e-14, atol=0)
        torch.testing.assert_close(sigma.square(), 1 - signal, rtol=1e-13, atol=0)
    assert SDXL.alpha(every).dtype == torch.float32 and SDXL.alpha(every.double()).dtype == torch.float64


def test_vp_between_two_timesteps_is_linear_in_sigma_over_alpha():
    alpha, sigma = SDXL.levels(torch.tensor([499.0, 499.25, 500.0], dtype=torch.float64))
    low, between, high = (sigma / alpha).tolist()
    assert between == pytest.approx(0.75 * low + 0.25 * high, rel=1e-14)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_add_noise_and_targets_are_the_definition(schedule):
    t, x_t, truth = case(schedule)
    torch.testing.assert_close(schedule.add_noise(truth["x0"], truth["eps"], t), x_t, rtol=0, atol=1e-14)
    for kind in KINDS:
        target = schedule.target(truth["x0"], truth["eps"], t, kind)
        torch.testing.assert_close(target, truth[kind], rtol=1e-14, atol=1e-14)
    native = schedule.target(truth["x0"], truth["eps"], t)
    torch.testing.assert_close(native, truth["v" if schedule is FLOW else "eps"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_conversions(schedule, source, to):
    t, x_t, truth = case(schedule)
    converted = schedule.convert(truth[source], x_t, t, to=to, kind=source)
    torch.testing.assert_close(converted, truth[to], rtol=1e-12, atol=1e-12)
    back = schedule.convert(converted, x_t, t, to=source, kind=to)
    torch.testing.assert_close(back, truth[source], rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 2**20), share=st.floats(0.02, 0.98), pair=st.permutations(KINDS))
def test_round_trips_of_any_value(seed, share, pair):
    """Also of predictions that fit no x0 and eps, at any time, around all four kinds."""
    generator = torch.Generator().manual_seed(seed)
    value, x_t = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    for schedule in SCHEDULES:
        t = torch.tensor([share * schedule.horizon], dtype=torch.float64)
        around = value
        for source, to in zip(pair, pair[1:] + pair[:1], strict=True):
            around = schedule.convert(around, x_t, t, to=to, kind=source)
        torch.testing.assert_close(around, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_add_score_adds_to_the_score(schedule, kind):
    t, x_t, truth = case(schedule)
    added = torch.randn_like(x_t)
    changed = schedule.add_score(truth[kind], added, t, kind)
    score = schedule.to_score(changed, x_t, t, kind)
    torch.testing.assert_close(score, truth["score"] + added, rtol=1e-11, atol=1e-11)


def test_table_of_the_method():
    """x0, score and adding a score as published for eps under VP and velocity under rectified flow."""
    t, x_t, truth = case(SDXL)
    eps, s = truth["eps"], torch.randn_like(x_t)
    alpha, sigma = (level[:, None, None] for level in SDXL.levels(t))
    torch.testing.assert_close(SDXL.to_x0(eps, x_t, t), (x_t - sigma * eps) / alpha)
    torch.testing.assert_close(SDXL.to_score(eps, x_t, t), -eps / sigma)
    torch.testing.assert_close(SDXL.add_score(eps, s, t), eps - sigma * s)
    t, x_t, truth = case(FLOW)
    v, s, time = truth["v"], torch.randn_like(x_t), t[:, None, None]
    torch.testing.assert_close(FLOW.to_x0(v, x_t, t), x_t - time * v)
    torch.testing.assert_close(FLOW.to_score(v, x_t, t), -(x_t + (1 - time) * v) / time)
    torch.testing.assert_close(FLOW.add_score(v, s, t), v - time / (1 - time) * s)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_scores_are_those_of_the_noised_density(schedule):
    """The best prediction for a Gaussian, turned into a score, is the gradient of the noised log-density."""
    prior = Gaussian(0.7, 1.9)
    t = torch.linspace(0.02, 0.98, 9, dtype=torch.float64) * schedule.horizon
    x_t = torch.randn(9, 4, dtype=torch.float64)
    alpha, sigma = (level[:, None] for level in schedule.levels(t))
    score = schedule.to_score(prior.denoise(x_t, alpha, sigma), x_t, t, "x0")
    torch.testing.assert_close(score, prior.score(x_t, alpha, sigma), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_half_precision_is_converted_in_float32(schedule):
    t, x_t, truth = case(schedule)
    low, x_low = truth[schedule.kind].bfloat16(), x_t.bfloat16()
    converted = schedule.to_x0(low, x_low, t.float())
    assert converted.dtype == torch.float32
    exact = schedule.to_x0(low.double(), x_low.double(), t.float())
    torch.testing.assert_close(converted.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_conversions_are_differentiable(schedule):
    t, x_t, truth = case(schedule, count=3)
    for source in KINDS:
        value = truth[source].clone().requires_grad_()
        for to in KINDS:
            assert torch.autograd.gradcheck(
                lambda p, source=source, to=to: schedule.convert(p, x_t, t, to=to, kind=source), value
            )


def test_ends_of_the_range():
    """No division, no complaint: x0 from velocity at pure noise, eps from velocity without any."""
    x_t, v = torch.randn(2, 2, 3, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(FLOW.to_x0(v, x_t, ends), torch.stack((x_t[0], x_t[1] - v[1])))
    torch.testing.assert_close(FLOW.convert(v, x_t, ends, to="eps"), torch.stack((x_t[0] + v[0], x_t[1])))
    with pytest.raises(ValueError, match="t: sigma is 0 at t = 0, where score cannot be had from v"):
        FLOW.to_score(v, x_t, ends)
    with pytest.raises(ValueError, match="t: alpha is 0 at t = 1, where x0 cannot be had from eps"):
        FLOW.to_x0(v, x_t, ends, "eps")
    with pytest.raises(ValueError, match="t: alpha is 0 at t = 1"):
        FLOW.add_score(v, x_t, ends)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: FLOW.to_x0(x, x, torch.tensor([0.5])), r"t: expected shape \(2,\), float32 or float64, on cpu, got"),
        (lambda x: FLOW.to_x0(x, x, torch.tensor([1, 2])), "t: expected shape .* got shape .*int64"),
        (lambda x: FLOW.to_x0(x, x, torch.tensor([0.5, 500.0])), r"t: expected times in \[0, 1\] of RectifiedFlow\(\)"),
        (lambda x: FLOW.to_x0(x, x, torch.tensor([0.5, float("nan")])), r"t: expected times in \[0, 1\]"),
        (
            lambda x: SDXL.to_x0(x, x, torch.tensor([0, 1000])),
            r"t: expected times in \[0, 999\] of VP\(1000 timesteps\)",
        ),
        (lambda x: SDXL.to_x0(x, x, torch.tensor([0, -1])), "t: expected times"),
        (lambda x: SDXL.to_x0(x, x, 3), "t: expected shape .* got int 3"),
        (lambda x: SDXL.alpha(torch.tensor(5)), r"t: expected shape \(B,\), int64 or int32 or float32 or float64"),
        (lambda x: FLOW.to_x0(x, x, torch.rand(2), "epsilon"), "kind: expected one of .*did you mean 'eps'"),
        (lambda x: FLOW.convert(x, x, torch.rand(2), to="xo"), "to: expected one of .*got 'xo'; did you mean 'x0'"),
        (lambda x: FLOW.convert(x, x, torch.rand(2), to=None), "to: expected one of .*got None"),
        (lambda x: FLOW.to_x0(x, x[:, :2], torch.rand(2)), "x_t: expected shape"),
        (lambda x: FLOW.to_x0(x.long(), x, torch.rand(2)), "predicted: expected"),
        (lambda x: FLOW.add_score(x, x[:1], torch.rand(2)), "score: expected shape"),
        (lambda x: FLOW.add_noise(x, x[:1], torch.rand(2)), "eps: expected shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3))


@pytest.mark.parametrize("signal", [[0.5], [0.4, 0.5], [0.9, 0.0], [1.0, 0.5], [[0.9, 0.5]], [0.9, float("nan")]])
def test_bad_tables(signal):
    with pytest.raises(ConfigError, match="alphas_cumprod: expected at least two numbers that fall"):
        VP(signal)


def test_values_are_not_looked_at_on_accelerators(monkeypatch):
    """A tensor without values passes through every method: nothing waits for the device."""
    schedules = RectifiedFlow(), VP(sdxl_alphas_cumprod())
    monkeypatch.setattr(checks, "values_are_checked", lambda device: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, t = torch.empty(2, 3), torch.empty(2)
        for schedule in schedules:
            for kind in KINDS:
                assert schedule.to_x0(x, x, t, kind).shape == x.shape
                assert schedule.to_score(x, x, t, kind).shape == x.shape
                assert schedule.add_score(x, x, t, kind).shape == x.shape
