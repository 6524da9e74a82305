"""Predictions other than velocity, and targets made from the seed."""

from __future__ import annotations

import math

import pytest
import torch

import crd_fast
from crd_fast.reference import SIGMA_CLAMP

from .test_crd import assert_matches, run
from .truth import Case, random_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SIGMAS = [0.9, 0.5, 0.25, 0.75, 0.05, 0.6]


def seeded_case(prediction, dtype, sigmas=SIGMAS, **settings):
    """A case whose y is what the network predicts, and the Noised that stands for it."""
    n = len(sigmas)
    x0 = torch.randn(n, 3, 5, dtype=torch.float64).to(dtype)
    sigma = torch.tensor(sigmas, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    fwd = crd_fast.noise(x0, sigma, seed=11, sample_ids=torch.arange(n) * 7, stream=3)
    eps = fwd.epsilon(dtype if dtype == torch.float64 else torch.float32).double()
    levels = sigma.double().tolist()
    y, factors = {
        "v": (eps - x0.double(), [1.0] * n),
        "x0": (x0.double(), [-1 / max(s, SIGMA_CLAMP) for s in levels]),
        "eps": (eps, [1 / max(1 - s, SIGMA_CLAMP) for s in levels]),
    }[prediction]
    case = random_case(x0.shape, dtype=dtype, groups=[i % 2 for i in range(n)], prediction=prediction, **settings)
    offset = y - case.y.double()
    for name in ("f", "f_old", "ref", "ref_uncond"):
        setattr(case, name, (getattr(case, name).double() + offset).to(dtype))
    case.y, case.factors = y, factors
    return case, fwd


@pytest.mark.parametrize("temperature", [math.inf, 0.3])
@pytest.mark.parametrize("adaptive_weight", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_conversion(prediction, dtype, adaptive_weight, temperature):
    case, fwd = seeded_case(prediction, dtype, adaptive_weight=adaptive_weight, temperature=temperature)
    assert_matches(case, target=fwd)


@pytest.mark.parametrize(("prediction", "singular"), [("x0", 0.0), ("eps", 1.0)])
def test_sigma_is_kept_off_the_singular_end(prediction, singular):
    case, fwd = seeded_case(prediction, torch.float64, sigmas=[singular, 0.5, singular, 0.5])
    assert max(abs(factor) for factor in case.factors) == pytest.approx(1 / SIGMA_CLAMP)
    assert_matches(case, target=fwd)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_conversion_is_the_velocity_loss_of_the_converted_prediction(prediction):
    """v_hat = (x_t - x0_hat) / sigma = (eps_hat - x_t) / (1 - sigma) gives the loss of the prediction."""
    case, fwd = seeded_case(prediction, torch.float64)
    sigma = fwd.sigma.view(-1, 1, 1)

    def velocity(f):
        return (fwd.x_t - f) / sigma if prediction == "x0" else (f - fwd.x_t) / (1 - sigma)

    converted = Case(**{**vars(case), "settings": {}, "factors": None})
    for name in ("f", "f_old", "ref", "ref_uncond"):
        setattr(converted, name, velocity(getattr(case, name)))
    torch.testing.assert_close(run(case, target=fwd)[0].loss, run(converted, target=fwd)[0].loss)


def test_seeded_target_is_the_velocity_tensor():
    case, fwd = seeded_case("v", torch.bfloat16)
    seeded, tensor = run(case, target=fwd), run(case, target=fwd.target())
    assert seeded[0].loss == tensor[0].loss
    assert torch.equal(seeded[1], tensor[1])


def test_seeded_target_in_pieces(monkeypatch):
    case, fwd = seeded_case("x0", torch.float32)
    whole = run(case, target=fwd)[0].loss
    monkeypatch.setattr("crd_fast.reference._CHUNK_ELEMENTS", 30)
    torch.testing.assert_close(run(case, target=fwd)[0].loss, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_tensor_target_needs_velocity(prediction):
    case = random_case((3, 4))
    case.settings = {"prediction": prediction}
    with pytest.raises(ValueError, match=r"target: prediction='(x0|eps)' is converted with sigma.*Noised"):
        run(case)
