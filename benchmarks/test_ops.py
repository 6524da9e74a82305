"""Operations of the loss against the formulas they replace, side by side: `make bench`.

The eager side is what a trainer writes today: `randn_like` and `lerp` for noising, and the published loss section in
plain PyTorch. Every pair checks that both sides agree before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import crd_fast

SHAPE = (24, 16, 64, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def eager_noise(x0: Tensor, sigma: Tensor) -> Tensor:
    noise = torch.randn_like(x0)
    return torch.lerp(x0, noise, sigma.to(x0.dtype).view(-1, 1, 1, 1))


def eager_loss(f: Tensor, y: Tensor, old: Tensor, c: Tensor, u: Tensor, advantages: Tensor) -> Tensor:
    """The loss section of a trainer, one group, defaults of the paper."""
    axes = (1, 2, 3)
    f, y, old, c, u = (t.float() for t in (f, y, old, c, u))

    def weighted(prediction: Tensor) -> Tensor:
        error = prediction - y
        return error.square().mean(axes) / error.abs().mean(axes).detach().clamp(min=1e-5)

    reward = weighted(old) - weighted(f)
    mapped = (advantages.clamp(-5, 5) / 10 + 0.5).clamp(0, 1)
    policy = 5 * ((reward - reward.detach().mean()) - (mapped - mapped.mean())).square().mean()
    anchor = u + 4.5 * (c - u)
    kappa = 1e-3 + mapped * (1 - 1e-3)
    return policy + 0.1 * (kappa * (f - anchor).square().mean(axes)).mean()


def loss_inputs(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    f, y, old, c, u = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(5))
    return {
        "f": f.requires_grad_(),
        "y": y,
        "old": old,
        "c": c,
        "u": u,
        "advantages": torch.randn(SHAPE[0], generator=generator),
    }


def ours(f: Tensor, y: Tensor, old: Tensor, c: Tensor, u: Tensor, advantages: Tensor) -> Tensor:
    return crd_fast.loss(f, y, old=old, advantages=advantages, ref=c, ref_uncond=u, guidance_scale=4.5).loss


def stepped(loss: Callable[..., Tensor], inputs: dict[str, Any]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        inputs["f"].grad = None
        value = loss(**inputs)
        value.backward()
        return value

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["eager", "crd_fast"])
def test_noise(benchmark: Any, side: str, dtype: str) -> None:
    benchmark.group = f"noise {dtype} {'x'.join(map(str, SHAPE))}"
    x0 = torch.randn(SHAPE).to(DTYPES[dtype])
    sigma = torch.rand(SHAPE[0])
    spread = (crd_fast.noise(x0, sigma, seed=0).x_t.float() - eager_noise(x0, sigma).float()).mean().abs()
    assert spread < 0.01, "both sides have the same mean"
    runs = {"eager": lambda: eager_noise(x0, sigma), "crd_fast": lambda: crd_fast.noise(x0, sigma, seed=0)}
    benchmark(runs[side])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["eager", "crd_fast"])
def test_loss_forward_backward(benchmark: Any, side: str, dtype: str) -> None:
    benchmark.group = f"loss forward and backward {dtype} {'x'.join(map(str, SHAPE))}"
    inputs = loss_inputs(DTYPES[dtype])
    values, gradients = [], []
    for formula in (eager_loss, ours):
        values.append(stepped(formula, inputs)().detach())
        gradients.append(inputs["f"].grad.float().clone())
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)
    assert (gradients[0] - gradients[1]).norm() < 6e-3 * gradients[0].norm()
    benchmark(stepped({"eager": eager_loss, "crd_fast": ours}[side], inputs))
