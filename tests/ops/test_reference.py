"""The PyTorch formulas: Philox and normals against a second implementation, residuals against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast import reference
from crd_fast.reference import ResidualInputs

# Known answers for philox4x32-10 distributed with Random123: counter, key, output.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 2**32 - 1)


def philox_of_integers(counter, key):
    """Philox4x32-10 on Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def epsilon_of_integers(element, sample_id, seed, stream):
    """One normal from the definition, in Python floats."""
    words = philox_of_integers(
        ((element // 4) % 2**32, stream, sample_id % 2**32, (sample_id % 2**64) >> 32),
        (seed % 2**32, seed >> 32),
    )
    wa, wb = words[:2] if element % 4 < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(((wa >> 9) + 0.5) / 2**23))
    angle = 2 * math.pi * (wb >> 8) / 2**24
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_published_vectors(counter, key, expected):
    words = reference.philox_words(*(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_of_any_counter(counter, key):
    words = reference.philox_words(*(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == philox_of_integers(counter, key)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 3, 2**63 + 11, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 5, 2**31 - 1])
def test_epsilon_is_its_definition(seed, stream):
    ids = [0, 1, 2**32 + 1, 2**62, -1, -(2**40)]
    eps = reference.epsilon(torch.tensor(ids), (6, 3, 5), seed, stream, torch.float32)
    expected = [[epsilon_of_integers(e, i, seed, stream) for e in range(15)] for i in ids]
    torch.testing.assert_close(eps.flatten(1).double(), torch.tensor(expected, dtype=torch.float64), rtol=6e-8, atol=0)
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert torch.equal(reference.epsilon(torch.tensor(ids), (6, 3, 5), signed, stream, torch.float32), eps)


@pytest.mark.parametrize(("quarter", "cosine", "sine"), [(0, 1.0, 0.0), (1, 0.0, 1.0), (2, -1.0, 0.0), (3, 0.0, -1.0)])
def test_quarter_turns_are_exact(quarter, cosine, sine):
    radius_word = 2**31
    radius = math.sqrt(-2 * math.log((2**22 + 0.5) / 2**23))
    even, odd = reference._box_muller(torch.tensor([radius_word]), torch.tensor([quarter << 30]))
    assert even.item() == pytest.approx(cosine * radius, abs=0, rel=1e-15)
    assert odd.item() == pytest.approx(sine * radius, abs=0, rel=1e-15)


def test_extreme_words_are_finite():
    words = torch.tensor([0, 2**32 - 1])
    normals = torch.cat(reference._box_muller(words, words))
    assert normals.isfinite().all()
    assert normals.abs().max() < 5.8  # u1 is at least 2^-24


def test_epsilon_in_pieces(monkeypatch):
    ids = torch.arange(7)
    whole = reference.epsilon(ids, (7, 33), 1, 2, torch.float32)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 70)
    assert torch.equal(reference.epsilon(ids, (7, 33), 1, 2, torch.float32), whole)


def test_rounding_to_half_is_one_rounding():
    ids = torch.arange(3)
    full = reference.epsilon(ids, (3, 50), 1, 0, torch.float32)
    assert torch.equal(reference.epsilon(ids, (3, 50), 1, 0, torch.bfloat16), full.bfloat16())


# --- residuals --------------------------------------------------------------------------------------------


def residual_inputs(shape=(4, 3, 5), *, dtype=torch.float64, seeded=False, prediction="v", masked=False, guided=True):
    target = None if seeded else torch.randn(shape, dtype=torch.float64).to(dtype)
    x0 = torch.randn(shape, dtype=torch.float64).to(dtype)
    return ResidualInputs(
        predicted=torch.randn(shape, dtype=torch.float64).to(dtype),
        target=target,
        x0=x0 if seeded else None,
        sigma=torch.linspace(0.2, 0.8, shape[0]) if seeded else None,
        sample_ids=torch.arange(shape[0]) if seeded else None,
        seed=3,
        stream=1,
        ref=torch.randn(shape, dtype=torch.float64).to(dtype),
        ref_uncond=torch.randn(shape, dtype=torch.float64).to(dtype) if guided else None,
        guidance_scale=4.5 if guided else 1.0,
        mask=torch.rand(shape[:2])[:, :, None] < 0.7 if masked else None,
        prediction=prediction,
    )


VARIANTS = [
    {"seeded": False},
    {"seeded": False, "masked": True},
    {"seeded": False, "guided": False},
    {"seeded": True},
    {"seeded": True, "masked": True, "prediction": "x0"},
    {"seeded": True, "masked": True, "prediction": "eps"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradient_is_that_of_the_statistics(variant):
    """residual_grad against autograd through E and K written out here."""
    inputs = residual_inputs(**variant)
    f = inputs.predicted.clone().requires_grad_()
    if inputs.target is None:
        eps = reference.epsilon(inputs.sample_ids, f.shape, 3, 1, torch.float32).double()
        sigma = inputs.sigma.double().view(-1, 1, 1)
        y, factor = {
            "v": (eps - inputs.x0, torch.ones_like(sigma)),
            "x0": (inputs.x0, 1 / sigma),
            "eps": (eps, 1 / (1 - sigma)),
        }[inputs.prediction]
    else:
        y, factor = inputs.target, torch.ones(4, 1, 1, dtype=torch.float64)
    anchor = inputs.ref
    if inputs.ref_uncond is not None:
        anchor = 4.5 * inputs.ref - 3.5 * inputs.ref_uncond
    valid = torch.ones_like(f) if inputs.mask is None else inputs.mask.double().expand(f.shape)

    def mean(x):
        return (x * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)

    mse, mae, kl = (
        mean((factor * (f - y)) ** 2),
        mean((factor * (f - y)).abs()),
        mean((factor * (f - anchor)) ** 2),
    )
    torch.testing.assert_close(reference.residual_stats(inputs)[:3], (mse.detach(), mae.detach(), kl.detach()))
    alpha, gamma = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    (expected,) = torch.autograd.grad((alpha * mse + gamma * kl).sum(), f)
    torch.testing.assert_close(reference.residual_grad(inputs, alpha, gamma), expected)


def test_without_reference_kl_is_zero():
    inputs = residual_inputs()._replace(ref=None, ref_uncond=None, guidance_scale=1.0)
    assert reference.residual_stats(inputs)[2].eq(0).all()
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(reference.residual_grad(inputs, ones, ones), 2 / 15 * (inputs.predicted - inputs.target))


def test_coefficient_zero_drops_the_term():
    inputs = residual_inputs()
    inputs.predicted[1] = torch.nan
    inputs.ref[2] = torch.nan
    alpha = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    gamma = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    grad = reference.residual_grad(inputs, alpha, gamma)
    assert grad.isfinite().all() and grad[1].eq(0).all() and grad[2].ne(0).any()
    assert reference.residual_grad(inputs, alpha, torch.ones_like(gamma))[2].isnan().all()


def test_half_precision_is_accumulated_in_float32():
    inputs = residual_inputs((2, 1, 60000), dtype=torch.float16, guided=False)
    mse = reference.residual_stats(inputs)[0]
    exact = (inputs.predicted.double() - inputs.target.double()).square().mean((1, 2))
    assert mse.dtype == torch.float32
    torch.testing.assert_close(mse.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["predicted", "ref", "ref_uncond"])
def test_one_double_prediction_makes_the_statistics_double(name):
    inputs = residual_inputs(dtype=torch.float32)
    assert reference.residual_stats(inputs)[0].dtype == torch.float32
    doubled = inputs._replace(**{name: getattr(inputs, name).double()})
    assert all(statistic.dtype == torch.float64 for statistic in reference.residual_stats(doubled))


def test_incomplete_seeded_target_is_an_error():
    with pytest.raises(ValueError, match="expected a target tensor, or all of x0, sigma and sample_ids"):
        reference.residual_stats(residual_inputs(seeded=True)._replace(sigma=None))
