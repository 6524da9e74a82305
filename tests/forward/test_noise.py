"""`noise` and `Noised`: the formula, independence of everything but the definition, and the checks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import crd_fast

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 7), (2, 3, 5, 4), (3, 6, 4), (2, 2, 3, 4, 5), (1, 1)]


@pytest.fixture(params=["auto", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("CRD_FAST_BACKEND", request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_formula(shape, dtype, out_dtype):
    x0, sigma = torch.randn(shape, dtype=torch.float64).to(dtype), torch.rand(shape[0])
    fwd = crd_fast.noise(x0, sigma, seed=3, dtype=out_dtype)
    level = sigma.double().view(-1, *(1,) * (len(shape) - 1))
    expected = (1 - level) * x0.double() + level * fwd.epsilon().double()
    assert fwd.x_t.dtype == (out_dtype or dtype)
    assert fwd.x_t.shape == shape and fwd.x_t.is_contiguous()
    step = torch.finfo(fwd.x_t.dtype).eps
    tolerance = max(step, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(fwd.x_t.double(), expected, rtol=tolerance, atol=4 * tolerance)
    target = fwd.target()
    assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(target.double(), fwd.epsilon().double() - x0.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_ends_of_the_path():
    x0 = torch.randn(2, 3, 4)
    fwd = crd_fast.noise(x0, torch.tensor([0.0, 1.0]), seed=0)
    assert torch.equal(fwd.x_t[0], x0[0])
    assert torch.equal(fwd.x_t[1], fwd.epsilon()[1])


@pytest.mark.usefixtures("backend")
def test_noise_of_a_sample_does_not_depend_on_its_batch():
    x0, sigma = torch.randn(6, 4, 5), torch.rand(6)
    ids = torch.tensor([3, -1, 2**40, 2**62, 0, 77])
    whole = crd_fast.noise(x0, sigma, seed=9, sample_ids=ids, stream=2)
    order = torch.tensor([4, 1, 3])
    part = crd_fast.noise(x0[order], sigma[order], seed=9, sample_ids=ids[order], stream=2)
    assert torch.equal(part.x_t, whole.x_t[order])
    assert torch.equal(part.epsilon(), whole.epsilon()[order])


@pytest.mark.usefixtures("backend")
def test_noise_does_not_depend_on_layout():
    x0, sigma = torch.randn(3, 4, 5, 6), torch.rand(3)
    fwd = crd_fast.noise(x0, sigma, seed=1)
    padded = torch.full((3, 2, 4, 5, 6), torch.nan)
    padded[:, 1] = x0
    for same in (
        x0.to(memory_format=torch.channels_last),
        padded[:, 1],
        x0.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not same.is_contiguous()
        assert torch.equal(crd_fast.noise(same, sigma, seed=1).x_t, fwd.x_t)


@pytest.mark.usefixtures("backend")
def test_everything_in_the_definition_matters():
    x0, sigma = torch.zeros(2, 64), torch.ones(2)

    def eps(**changes):
        return crd_fast.noise(x0, sigma, **({"seed": 5, "stream": 1} | changes)).epsilon()

    base = eps()
    for changes in ({"seed": 6}, {"seed": 5 + 2**32}, {"stream": 2}, {"sample_ids": torch.tensor([2, 3])},
                    {"sample_ids": torch.tensor([2**32, 2**32 + 1])}):  # fmt: skip
        assert (eps(**changes) != base).float().mean() > 0.99
    assert (base[0] != base[1]).float().mean() > 0.99
    assert torch.equal(eps(sample_ids=torch.arange(2)), base)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_of_all_64_bits(seed):
    x0, sigma = torch.randn(2, 16), torch.rand(2)
    fwd = crd_fast.noise(x0, sigma, seed=seed)
    assert fwd.seed == seed
    assert fwd.epsilon().isfinite().all()
    lower = crd_fast.noise(x0, sigma, seed=seed ^ (1 << 63))
    assert not torch.equal(lower.epsilon(), fwd.epsilon())


def test_backends_agree(monkeypatch):
    x0, sigma = torch.randn(3, 1001), torch.rand(3)
    compiled = crd_fast.noise(x0, sigma, seed=2**63 + 5, sample_ids=torch.tensor([5, -3, 2**40]), stream=2**31 - 1)
    eps = compiled.epsilon()
    monkeypatch.setenv("CRD_FAST_BACKEND", "reference")
    torch.testing.assert_close(eps, compiled.epsilon(), rtol=5e-7, atol=0)
    again = crd_fast.noise(x0, sigma, seed=2**63 + 5, sample_ids=compiled.sample_ids, stream=2**31 - 1)
    torch.testing.assert_close(compiled.x_t, again.x_t, rtol=1e-6, atol=1e-6)


def test_moments():
    eps = crd_fast.noise(torch.zeros(8, 2**16), torch.ones(8), seed=0).epsilon().double()
    n = eps.numel()
    assert abs(eps.mean()) < 4 / n**0.5
    assert abs(eps.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((eps**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((eps[:, :-1] * eps[:, 1:]).mean()) < 4 / n**0.5


@pytest.mark.usefixtures("backend")
def test_gradient_reaches_x0():
    x0, sigma = torch.randn(3, 4, 2, requires_grad=True), torch.tensor([0.0, 0.25, 1.0])
    weight = torch.randn(3, 4, 2)
    (crd_fast.noise(x0, sigma, seed=1).x_t * weight).sum().backward()
    torch.testing.assert_close(x0.grad, weight * (1 - sigma).view(3, 1, 1))


@pytest.mark.parametrize(
    "rows", [slice(1, 3), [2, 0], torch.tensor([3, 3]), torch.tensor([True, False, False, True])], ids=str
)
def test_some_of_the_samples(rows):
    """Rows of a Noised are a Noised whose noise is made again, and whose residuals are those rows of the whole's."""
    x0, f = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    whole = crd_fast.noise(x0, torch.rand(4), seed=5, stream=2, sample_ids=torch.tensor([7, 8, 9, 2**40]))
    part = whole[rows]
    assert isinstance(part, crd_fast.Noised) and len(part) == 2 and len(whole) == 4
    assert torch.equal(part.epsilon(), whole.epsilon()[rows]) and torch.equal(part.target(), whole.target()[rows])
    assert torch.equal(part.x_t, whole.x_t[rows])
    stats, wanted = crd_fast.residual_stats(f[rows].contiguous(), part), crd_fast.residual_stats(f, whole)[rows]
    assert torch.equal(stats.mse, wanted.mse) and torch.equal(stats.mae, wanted.mae) and len(wanted) == 2


def test_statistics_of_batches_are_put_together():
    whole = crd_fast.residual_stats(torch.randn(5, 3), torch.randn(5, 3))
    again = crd_fast.ResidualStats.cat([whole[:2], whole[2:]])
    assert torch.equal(again.mse, whole.mse) and torch.equal(again.mae, whole.mae)


@pytest.mark.parametrize("rows", [1, torch.tensor(1), torch.ones(2, 2, dtype=torch.bool), None])
def test_one_row_is_asked_for_as_a_slice(rows):
    given = crd_fast.noise(torch.randn(4, 3), torch.rand(4), seed=0)
    for batch in (given, crd_fast.residual_stats(torch.randn(4, 3), given)):
        with pytest.raises(TypeError, match=r"expected a slice, indices or a bool mask, as x\[2:3\] for one"):
            batch[rows]


def test_frozen_and_complete():
    x0, sigma = torch.randn(2, 3), torch.rand(2, dtype=torch.float64)
    fwd = crd_fast.noise(x0, sigma, seed=4, stream=6)
    assert fwd.x0 is x0 and fwd.stream == 6
    assert fwd.sigma.dtype == torch.float32
    assert torch.equal(fwd.sample_ids, torch.arange(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        fwd.seed = 1


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
def test_element_noise_does_not_depend_on_the_number_of_elements(short, more, seed, stream):
    """Elements are numbered, so a longer sample starts with the noise of a shorter one."""
    one = crd_fast.noise(torch.zeros(2, short), torch.ones(2), seed=seed, stream=stream).epsilon()
    two = crd_fast.noise(torch.zeros(2, short + more), torch.ones(2), seed=seed, stream=stream).epsilon()
    assert torch.equal(two[:, :short], one)


GOOD = {"x0": torch.randn(3, 4), "sigma": torch.rand(3), "seed": 1}
BAD = [
    ({"x0": torch.arange(12).view(3, 4)}, r"x0: expected a \(B, \*latent\) tensor.*int64"),
    ({"x0": torch.randn(3)}, r"x0: .*\(3,\)"),
    ({"x0": torch.randn(0, 4), "sigma": torch.rand(0)}, r"x0: the batch is empty"),
    ({"sigma": torch.rand(3, 1)}, r"sigma: expected shape \(3,\).*\(3, 1\)"),
    ({"sigma": torch.tensor(0.5)}, r"sigma: expected shape \(3,\)"),
    ({"sigma": 0.5}, r"sigma: .*float 0.5"),
    ({"sigma": torch.tensor([0, 1, 1])}, r"sigma: .*int64"),
    ({"sigma": torch.tensor([0.1, 1.1, 0.2])}, r"sigma: expected noise levels in \[0, 1\].*divide"),
    ({"sigma": torch.tensor([0.1, -0.1, 0.2])}, r"sigma: expected noise levels"),
    ({"sigma": torch.tensor([0.1, torch.nan, 0.2])}, r"sigma: expected noise levels"),
    ({"sigma": torch.rand(3).to("meta")}, r"sigma: expected .*on cpu, got .*meta"),
    ({"seed": -1}, r"seed: expected an int in \[0, 2\*\*64\), got int -1"),
    ({"seed": 2**64}, r"seed: expected an int"),
    ({"seed": 1.0}, r"seed: .*float 1.0"),
    ({"seed": True}, r"seed: .*bool"),
    ({"stream": -1}, r"stream: expected an int in \[0, 2\*\*31\)"),
    ({"stream": 2**31}, r"stream: expected"),
    ({"stream": torch.arange(3)}, r"stream: expected one int .*sample_ids, such as ids \+ \(draw << 40\)"),
    ({"sample_ids": torch.arange(4)}, r"sample_ids: expected shape \(3,\)"),
    ({"sample_ids": torch.arange(3).int()}, r"sample_ids: .*int64.*int32"),
    ({"sample_ids": torch.arange(3.0)}, r"sample_ids: .*int64"),
    ({"dtype": torch.int32}, r"dtype: expected float16"),
    ({"dtype": torch.complex64}, r"dtype: expected float16"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        crd_fast.noise(**(GOOD | changes))


def test_draws_of_one_call_are_told_apart_by_ids():
    x0, ids = torch.randn(4, 3, 5), torch.arange(4) + 100
    stacked = torch.cat([ids + (draw << 40) for draw in range(3)])
    eps = crd_fast.noise(x0.repeat(3, 1, 1), torch.rand(12), seed=0, sample_ids=stacked).epsilon()
    assert len(eps.flatten(1).unique(dim=0)) == 12
