"""The generator's loss: its gradient is g / numel in x0 and nothing elsewhere, and g is that of the integral KL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from crd_fast import checks
from crd_fast.didr import diffused_reward_score, generator_loss, reference_x0
from crd_fast.didr.reference import WEIGHTINGS
from crd_fast.schedules import VP, RectifiedFlow

from .closed_forms import Gaussian, Mixture, column, normal_grid, sdxl_alphas_cumprod

SDXL = VP(sdxl_alphas_cumprod())
FLOW = RectifiedFlow()
SCHEDULES = [FLOW, SDXL]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def case(shape, *, schedule=FLOW, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("x0", "x_t", "x0_ta", "x0_ref", "s_r")
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name in names}
    t = (0.02 + 0.96 * torch.rand(shape[0], generator=generator, dtype=torch.float64)) * schedule.horizon
    return tensors | {"t": t, "schedule": schedule}


def truth(case, weighting):
    """g in float64, one sample and one element at a time, from alpha and sigma alone."""
    alphas, sigmas = (level.tolist() for level in case["schedule"].levels(case["t"], torch.float64))
    rows = [case[name].double().flatten(1).tolist() for name in ("x0", "x0_ta", "x0_ref", "s_r")]
    g = []
    for alpha, sigma, x0, ta, ref, s_r in zip(alphas, sigmas, *rows, strict=True):
        weight = {"ikl": alpha**2 / sigma**2, "bounded": min(1.0, alpha**2 / sigma**2), "dmd2": 1.0}[weighting]
        normaliser = 1.0
        if weighting != "ikl":
            normaliser = sum(abs(a - b) for a, b in zip(x0, ref, strict=True)) / len(x0)
        g.append([weight * (p - q - sigma**2 / alpha * r) / normaliser for p, q, r in zip(ta, ref, s_r, strict=True)])
    return torch.tensor(g, dtype=torch.float64).view(case["x0"].shape)


def gradients(case, weighting, upstream=1.0):
    """The output, and the gradient in every tensor argument, None where nothing arrived."""
    leaves = {name: value.clone().requires_grad_() for name, value in case.items() if name not in ("t", "schedule")}
    out = generator_loss(**case | leaves, weighting=weighting)
    (upstream * out.loss).backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


shapes = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
)


@settings(max_examples=150)
@given(
    shape=shapes,
    schedule=st.sampled_from(SCHEDULES),
    weighting=st.sampled_from(WEIGHTINGS),
    seed=st.integers(0, 2**20),
    upstream=st.sampled_from([1.0, -2.5, 1024.0]),
)
def test_gradient_is_g_over_numel_and_only_in_x0(shape, schedule, weighting, seed, upstream):
    given_case = case(shape, schedule=schedule, seed=seed)
    out, grads = gradients(given_case, weighting, upstream)
    g = truth(given_case, weighting)
    torch.testing.assert_close(grads.pop("x0"), upstream * g / g.numel(), rtol=1e-11, atol=1e-13)
    assert all(grad is None for grad in grads.values())
    torch.testing.assert_close(out.loss.detach(), g.square().mean() / 2, rtol=1e-11, atol=0)


@settings(max_examples=60)
@given(
    shape=shapes,
    schedule=st.sampled_from(SCHEDULES),
    weighting=st.sampled_from(WEIGHTINGS),
    dtype=st.sampled_from(DTYPES[1:]),
    seed=st.integers(0, 2**20),
)
def test_low_precision_inputs_are_subtracted_in_float32(shape, schedule, weighting, dtype, seed):
    """Only the result is rounded: to half precision, once."""
    given_case = case(shape, schedule=schedule, dtype=dtype, seed=seed)
    out, grads = gradients(given_case, weighting)
    exact = truth(given_case, weighting)
    error = (grads["x0"].double() - exact / exact.numel()).abs()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() / exact.numel()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    arithmetic = 1e-5 * (1 + exact.abs().max()) / exact.numel()
    assert (error <= rounding + arithmetic + smallest).all()
    assert grads["x0"].dtype == dtype and out.loss.dtype == torch.float32


def test_close_bfloat16_estimates_do_not_cancel():
    """Estimates one bfloat16 step apart have that step as difference; bfloat16 arithmetic would lose the reward."""
    shape = (1, 4)
    step = 2.0**-7
    ref = torch.full(shape, 1.0, dtype=torch.bfloat16)
    ta = torch.full(shape, 1.0 + step, dtype=torch.bfloat16)
    s_r = torch.full(shape, 2.0**-12)
    x0 = torch.zeros(shape, requires_grad=True)
    t = torch.tensor([0.5])
    generator_loss(x0, ref, t, ta, ref, s_r, schedule=FLOW).loss.backward()
    assert x0.grad.tolist() == [[(step - 2.0**-13) / 4] * 4]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_mixed_dtypes_and_layouts(weighting):
    """bfloat16 samples, float32 estimates, channels-last and strided memory."""
    plain = case((2, 3, 4, 5), dtype=torch.float32)
    plain["x0"] = plain["x0"].bfloat16()
    want = gradients(plain, weighting)[1]["x0"]
    other = dict(plain)
    other["x0"] = plain["x0"].to(memory_format=torch.channels_last)
    other["x0_ta"] = plain["x0_ta"].transpose(1, 2).contiguous().transpose(1, 2)
    other["s_r"] = torch.stack((plain["s_r"], plain["s_r"]), -1)[..., 0]
    got = gradients(other, weighting)[1]["x0"]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_two_calls_agree_to_the_bit(weighting):
    given_case = case((3, 1000), dtype=torch.bfloat16)
    (one, first), (two, second) = gradients(given_case, weighting), gradients(given_case, weighting)
    assert torch.equal(one.loss, two.loss) and torch.equal(first["x0"], second["x0"])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_sample_does_not_depend_on_its_batch(weighting):
    given_case = case((4, 7))
    whole = gradients(given_case, weighting)[1]["x0"]
    alone = {k: v[1:2] if isinstance(v, torch.Tensor) else v for k, v in given_case.items()}
    torch.testing.assert_close(4 * whole[1:2], gradients(alone, weighting)[1]["x0"], rtol=1e-14, atol=0)


# --- values that are not finite ---


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ["x0_ta", "x0_ref", "s_r"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_elements_that_are_not_finite_become_zero_and_are_counted(weighting, name, value):
    clean = case((3, 8))
    dirty = dict(clean) | {name: clean[name].clone()}
    dirty[name][1, 2] = dirty[name][1, 5] = value
    out, grads = gradients(dirty, weighting)
    assert out.zeroed.tolist() == [0, 2, 0] and out.metrics["nonfinite"].item() == 2
    assert out.loss.isfinite() and all(metric.isfinite() for metric in out.metrics.values())
    keep = [0, 1, 3, 4, 6, 7]  # the sample without its two elements, as if it had six
    kept = {k: v[:, keep] if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in clean.items()}
    torch.testing.assert_close(grads["x0"][1, keep] * 24, truth(kept, weighting)[1], rtol=1e-11, atol=1e-13)
    assert grads["x0"][1, [2, 5]].tolist() == [0.0, 0.0]
    whole = truth(clean, weighting) / 24
    torch.testing.assert_close(grads["x0"][[0, 2]], whole[[0, 2]], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("weighting", ["bounded", "dmd2"])
def test_a_normaliser_that_is_zero_or_not_finite_drops_its_sample(weighting):
    for name, value in (("x0_ref", None), ("x0", math.nan), ("x0", math.inf)):
        dirty = case((2, 5))
        dirty["x0"] = dirty["x0"].clone()
        if value is None:
            dirty["x0_ref"] = torch.cat((dirty["x0"][:1], dirty["x0_ref"][1:]))  # sample 0 equals its estimate
        else:
            dirty["x0"][0, 3] = value
        out, grads = gradients(dirty, weighting)
        assert out.zeroed.tolist() == [5, 0], name
        assert grads["x0"][0].tolist() == [0.0] * 5
        assert grads["x0"][1].abs().min() > 0 and out.loss.isfinite()


def test_a_sample_without_a_finite_element():
    dirty = case((2, 4))
    dirty["s_r"] = dirty["s_r"].clone()
    dirty["s_r"][0] = math.nan
    for weighting in WEIGHTINGS:
        out, grads = gradients(dirty, weighting)
        assert out.zeroed.tolist() == [4, 0] and grads["x0"][0].tolist() == [0.0] * 4 and out.loss.isfinite()


def test_a_product_beyond_float32_is_zero():
    x0 = torch.full((1, 2), 1e-30, requires_grad=True)
    zero = torch.zeros(1, 2)
    generator_loss(
        x0, zero, torch.tensor([0.5]), torch.tensor([[1e10, 1.0]]), zero, zero, schedule=FLOW, weighting="dmd2"
    ).loss.backward()
    assert x0.grad[0, 0] == 0 and x0.grad[0, 1] > 0


# --- closed forms ---


def generator_gradients(schedule, t, mean, spread, prior, s_r, target=None, weighting="ikl", side=12):
    """dL/dmean and dL/dspread of x0 = mean + spread z, with exact estimates, as integrals over z, eps, mean over t."""
    z, eps = normal_grid(side)
    count = t.numel()
    mean = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
    spread = torch.tensor(spread, dtype=torch.float64, requires_grad=True)
    x0 = (mean + spread * z).expand(count, -1)
    x_t = schedule.add_noise(x0.detach(), eps.expand(count, -1), t)
    alpha, sigma = (column(level) for level in schedule.levels(t, torch.float64))
    own = Gaussian(mean.item(), spread.item() ** 2)
    x0_ta = schedule.to_x0(own.score(x_t, alpha, sigma), x_t, t, "score")
    x0_ref = reference_x0(prior.score(x_t, alpha, sigma), x_t, t, schedule=schedule, kind="score")
    out = generator_loss(x0, x_t, t, x0_ta, x0_ref, s_r(x_t, alpha, sigma), schedule=schedule, weighting=weighting)
    out.loss.backward()
    return mean.grad.item(), spread.grad.item(), out


def kl(schedule, t, mean, spread, optimum):
    """Mean over t of KL(N(alpha mean, alpha^2 spread^2 + sigma^2) || the noised optimum)."""
    alpha, sigma = schedule.levels(t, torch.float64)
    own, other = alpha**2 * spread**2 + sigma**2, alpha**2 * optimum.variance + sigma**2
    distance = alpha**2 * (mean - optimum.mean) ** 2
    return (0.5 * (own / other - 1 - torch.log(own / other) + distance / other)).mean().item()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_gradient_is_that_of_the_integral_kl(schedule):
    """Finite differences of the KL in mean and spread; in the mean also alpha^2 (mean - m) / (alpha^2 c + sigma^2)."""
    prior, kappa, y = Gaussian(0.3, 1.4), 2.0, 2.0
    optimum = prior.tilted_quadratic(kappa, y)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64) * schedule.horizon
    mean, spread, h = -0.4, 0.8, 1e-5

    def exact(x_t, alpha, sigma):
        return prior.quadratic_drs(x_t, alpha, sigma, kappa, y)

    in_mean, in_spread, _ = generator_gradients(schedule, t, mean, spread, prior, exact)
    by_mean = (kl(schedule, t, mean + h, spread, optimum) - kl(schedule, t, mean - h, spread, optimum)) / (2 * h)
    by_spread = (kl(schedule, t, mean, spread + h, optimum) - kl(schedule, t, mean, spread - h, optimum)) / (2 * h)
    assert in_mean == pytest.approx(by_mean, rel=1e-8)
    assert in_spread == pytest.approx(by_spread, rel=1e-8)
    alpha, sigma = schedule.levels(t, torch.float64)
    formula = alpha**2 * (mean - optimum.mean) / (alpha**2 * optimum.variance + sigma**2)
    assert in_mean == pytest.approx(formula.mean().item(), rel=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_moves_at_the_optimum(schedule, weighting):
    """q = p* and the exact score of the reward: g = 0 at every sample, not only on average."""
    prior, kappa, y = Gaussian(), 2.0, 2.0
    optimum = prior.tilted_quadratic(kappa, y)
    assert (optimum.mean, optimum.variance) == pytest.approx((4 / 3, 1 / 3))
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * schedule.horizon
    *_, out = generator_gradients(
        schedule, t, optimum.mean, optimum.variance**0.5, prior,
        lambda x_t, alpha, sigma: prior.quadratic_drs(x_t, alpha, sigma, kappa, y), weighting=weighting,
    )  # fmt: skip
    assert out.metrics["gradient_rms"].item() < 1e-9
    assert out.gap.min().item() > 1e-5  # two terms that cancel, not two that vanish
    torch.testing.assert_close(out.gap, out.correction, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_moves_at_the_optimum_of_a_mixture(schedule, weighting):
    """Samples of the tilted mixture with the DRS s_tilted - s_ref."""
    prior = Mixture((0.3, 0.7), (-1.5, 1.0), (0.4, 0.2))
    optimum = prior.tilted_linear(1.3)
    t = torch.linspace(0.02, 0.98, 12, dtype=torch.float64) * schedule.horizon
    alpha, sigma = (column(level) for level in schedule.levels(t))
    x0 = torch.randn(12, 30, dtype=torch.float64, requires_grad=True)
    x_t = schedule.add_noise(x0.detach(), torch.randn_like(x0), t)
    tilted, reference = optimum.score(x_t, alpha, sigma), prior.score(x_t, alpha, sigma)
    x0_ta, x0_ref = (schedule.to_x0(score, x_t, t, "score") for score in (tilted, reference))
    out = generator_loss(x0, x_t, t, x0_ta, x0_ref, tilted - reference, schedule=schedule, weighting=weighting)
    out.loss.backward()
    assert x0.grad.abs().max() * x0.numel() < 1e-9
    assert out.gap.min() > 1e-4


def test_the_loss_is_stationary_only_with_the_exact_score():
    """The proxy with one step moves the optimum: what the damping is for."""
    prior, kappa, y = Gaussian(), 2.0, 2.0
    optimum = prior.tilted_quadratic(kappa, y)
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * SDXL.horizon

    def proxy(x_t, alpha, sigma):
        return diffused_reward_score(
            x_t,
            t,
            lambda x, t: prior.denoise(x, *(column(level) for level in SDXL.levels(t))),
            lambda x0: -kappa / 2 * (x0 - y).square().sum(1),
            beta=1.0,
            schedule=SDXL,
        )

    in_mean, _, _ = generator_gradients(SDXL, t, optimum.mean, optimum.variance**0.5, prior, proxy)
    assert in_mean < -0.05


# --- outputs and errors ---


def test_metrics_are_what_they_say():
    given_case = case((3, 10), schedule=SDXL)
    out, _ = gradients(given_case, "bounded")
    alpha, sigma = SDXL.levels(given_case["t"], torch.float64)
    gap = given_case["x0_ta"] - given_case["x0_ref"]
    correction = column(sigma**2 / alpha) * given_case["s_r"]

    def rms(x):
        return x.square().mean(1).sqrt()

    torch.testing.assert_close(out.gap, rms(gap))
    torch.testing.assert_close(out.correction, rms(correction))
    torch.testing.assert_close(out.normaliser, (given_case["x0"] - given_case["x0_ref"]).abs().mean(1))
    want = {
        "loss": truth(given_case, "bounded").square().mean() / 2,
        "gradient_rms": rms(truth(given_case, "bounded")).mean(),
        "gap_rms": rms(gap).mean(),
        "correction_rms": rms(correction).mean(),
        "correction_ratio": (rms(correction) / rms(gap)).mean(),
        "normaliser": out.normaliser.mean(),
        "weight": (alpha / sigma).square().clamp(max=1).mean(),
        "nonfinite": torch.tensor(0),
    }
    assert want.keys() == out.metrics.keys()
    for name, value in want.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)
        assert not out.metrics[name].requires_grad
    assert out.loss.requires_grad and out.loss.ndim == 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_value_ever_reaches_the_host(monkeypatch, weighting):
    """Fake tensors have no values: an .item() or an if on one, which waits for an accelerator, raises."""
    monkeypatch.setattr(checks, "values_are_checked", lambda device: False)
    with FakeTensorMode():
        x0 = torch.empty((2, 3, 4), dtype=torch.bfloat16, requires_grad=True)
        other, t = torch.empty(2, 3, 4), torch.empty(2)
        out = generator_loss(x0, other, t, other, other, other, schedule=FLOW, weighting=weighting)
        out.loss.backward()
        assert x0.grad.shape == x0.shape and x0.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_traces_as_one_graph(schedule):
    given_case = case((2, 3, 4), schedule=schedule)
    t, tensors = given_case["t"], [given_case[name] for name in ("x_t", "x0_ta", "x0_ref", "s_r")]

    def compute(x0, x_t, x0_ta, x0_ref, s_r):
        return generator_loss(x0, x_t, t, x0_ta, x0_ref, s_r, schedule=schedule, weighting="bounded").loss

    x0 = given_case["x0"].requires_grad_()
    (eager,) = torch.autograd.grad(compute(x0, *tensors), x0)
    traced = torch.compile(compute, fullgraph=True, backend="aot_eager")
    (compiled,) = torch.autograd.grad(traced(x0, *tensors), x0)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.randn(3)}, "x0: expected a .* tensor"),
        ({"x0": torch.randn(0, 3)}, "x0: the batch is empty"),
        ({"x_t": torch.randn(2, 4)}, r"x_t: expected shape \(2, 3\) on cpu like x0"),
        ({"x0_ta": torch.randn(1, 3)}, "x0_ta: expected shape"),
        ({"x0_ref": torch.zeros(2, 3, dtype=torch.int64)}, "x0_ref: expected"),
        ({"s_r": None}, "s_r: expected .* got NoneType"),
        ({"t": torch.tensor(0.5)}, r"t: expected shape \(2,\)"),
        ({"t": torch.tensor([3, 5])}, "t: expected shape .* float32 or float64"),
        ({"t": torch.tensor([0.5, 1.5])}, r"t: expected times in \[0, 1\]"),
        ({"t": torch.tensor([0.5, 0.0])}, "t: expected times at which alpha and sigma are positive, got .* 0.0 to 0.5"),
        ({"t": torch.tensor([0.5, 1.0])}, "t: expected times at which alpha and sigma are positive"),
        ({"weighting": "dmd"}, "weighting: expected one of .*did you mean 'dmd2'"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        generator_loss(**case((2, 3)) | changes)
