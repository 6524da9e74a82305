"""The public residual statistics against their definition."""

from __future__ import annotations

import pytest
import torch

import crd_fast

SHAPE = (4, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seeded", [True, False])
def test_definition(dtype, seeded):
    fwd = crd_fast.noise(torch.randn(SHAPE), torch.rand(4), seed=1)
    f = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    stats = crd_fast.residual_stats(f, fwd if seeded else fwd.target())
    error = f.double() - fwd.target().double()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert stats.mse.dtype == stats.mae.dtype == wanted
    torch.testing.assert_close(stats.mse.double(), error.square().mean((1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.mae.double(), error.abs().mean((1, 2)), rtol=1e-6, atol=0)


def test_mean_over_valid_elements_only():
    f, y = torch.randn(SHAPE), torch.randn(SHAPE)
    mask = torch.tensor([[True, False, True]] * 4)
    stats = crd_fast.residual_stats(f, y, mask=mask)
    error = (f - y)[:, [0, 2]]
    torch.testing.assert_close(stats.mse, error.square().mean((1, 2)))
    torch.testing.assert_close(stats.mae, error.abs().mean((1, 2)))


@pytest.mark.parametrize(("prediction", "factor"), [("x0", lambda s: 1 / s), ("eps", lambda s: 1 / (1 - s))])
def test_converted_to_velocity(prediction, factor):
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.9])
    fwd = crd_fast.noise(torch.randn(SHAPE), sigma, seed=1)
    f = torch.randn(SHAPE)
    error = f - (fwd.x0 if prediction == "x0" else fwd.epsilon())
    stats = crd_fast.residual_stats(f, fwd, prediction=prediction)
    torch.testing.assert_close(stats.mse, factor(sigma) ** 2 * error.square().mean((1, 2)))
    torch.testing.assert_close(stats.mae, factor(sigma) * error.abs().mean((1, 2)))


def test_mae_carries_no_gradient():
    f = torch.randn(SHAPE, requires_grad=True)
    stats = crd_fast.residual_stats(f, torch.randn(SHAPE))
    assert stats.mse.requires_grad and not stats.mae.requires_grad


def test_half_precision_does_not_overflow():
    """An error of 300 squares to 90000, beyond float16."""
    f = torch.full(SHAPE, 300.0, dtype=torch.float16)
    stats = crd_fast.residual_stats(f, torch.zeros(SHAPE, dtype=torch.float16))
    assert stats.mse.eq(90000).all()
