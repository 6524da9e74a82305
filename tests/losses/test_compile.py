"""The loss inside torch.compile without graph breaks, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

import crd_fast

SHAPE = (6, 3, 4)


def step(x0, sigma, f, f_old, advantages, group_ids, ref, ref_uncond, mask, config):
    fwd = crd_fast.noise(x0, sigma, seed=5)
    old = crd_fast.residual_stats(f_old + fwd.x_t, fwd, mask=mask)
    out = crd_fast.loss(
        f + fwd.x_t, fwd, old=old, advantages=advantages, group_ids=group_ids, ref=ref, ref_uncond=ref_uncond,
        guidance_scale=4.5, mask=mask, config=config,
    )  # fmt: skip
    return out.loss, out.implicit_reward, out.metrics


@pytest.mark.parametrize("temperature", [math.inf, 0.5, 0.0])
@pytest.mark.parametrize("loss_type", ["mse", "bce"])
@pytest.mark.parametrize("masked", [True, False])
def test_fullgraph_equals_eager(temperature, loss_type, masked):
    torch._dynamo.reset()
    config = crd_fast.CRDConfig(temperature=temperature, loss_type=loss_type)
    x0, f, f_old, ref, ref_uncond = (torch.randn(SHAPE) for _ in range(5))
    mask = torch.rand(SHAPE[:2]) < 0.8 if masked else None
    rest = (torch.randn(6), torch.tensor([1, 1, 2, 2, 2, 3]), ref, ref_uncond, mask, config)

    def both(function):
        leaf = f.clone().requires_grad_()
        loss, implicit, metrics = function(
            x0, torch.rand(6, generator=torch.Generator().manual_seed(1)), leaf, f_old, *rest
        )
        loss.backward()
        return loss.detach(), implicit, metrics, leaf.grad

    eager = both(step)
    compiled = both(torch.compile(step, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, eager)


def test_another_guidance_scale_is_compiled_too():
    """Dynamo makes a symbol of a float that changed, which math.isfinite does not take."""
    torch._dynamo.reset()
    f, y, old, ref, ref_uncond = (torch.randn(SHAPE) for _ in range(5))
    advantages = torch.randn(6)

    def run(scale):
        guided = {"ref": ref, "ref_uncond": ref_uncond, "guidance_scale": scale}
        return crd_fast.loss(f, y, old=old, advantages=advantages, **guided).loss

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for scale in (1.5, 2.0, 4.5):
        torch.testing.assert_close(compiled(scale), run(scale))
