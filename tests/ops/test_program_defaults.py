"""What a program set as its default dtype or device changes nothing: the extension writes float32 into memory."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import crd_fast
from crd_fast.didr import generator_loss
from crd_fast.forward_process import sample_timesteps
from crd_fast.rewards import RewardSpec, advantages, score_batch
from crd_fast.rewards.jpeg import JpegCompressibility, JpegSettings
from crd_fast.schedules import RectifiedFlow


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
}
SHAPE = (6, 4, 8, 8)


def crd(dtype, x0, f, old, ref, sigma, wanted):
    fwd = crd_fast.noise(x0.to(dtype), sigma, seed=1)
    kept = crd_fast.residual_stats(old.to(dtype), fwd)
    leaf = f.to(dtype).requires_grad_()
    out = crd_fast.loss(leaf, fwd, old=kept, advantages=wanted, ref=ref.to(dtype))
    out.loss.backward()
    return [fwd.x_t, fwd.epsilon(), kept.mse, kept.mae, out.loss, out.implicit_reward, leaf.grad, *out.metrics.values()]


def didr(dtype, x0, f, old, ref, sigma, wanted):
    leaf = x0.to(dtype).requires_grad_()
    x_t, x0_ta, x0_ref, s_r = (tensor.to(dtype) for tensor in (f, old, ref, f - old))
    out = generator_loss(leaf, x_t, sigma, x0_ta, x0_ref, s_r, schedule=RectifiedFlow())
    out.loss.backward()
    return [out.loss, leaf.grad]


def drawn(*_):
    return [sample_timesteps("logit_normal", 7, seed=0, epoch=1)]


def rewards(dtype, x0, f, old, ref, sigma, wanted):
    images = x0[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3).sigmoid()
    scores = score_batch(JpegCompressibility(JpegSettings()), images, ["a"] * 6, [{}] * 6)
    got = advantages(scores, {JpegCompressibility.name: RewardSpec()}, torch.tensor([0, 0, 0, 1, 1, 1], device="cpu"))
    return [scores[JpegCompressibility.name], got.advantages]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("what", [crd, didr, drawn, rewards], ids=lambda function: function.__name__)
def test_results_are_those_of_float32_on_the_cpu(what, default, dtype):
    generator = torch.Generator("cpu").manual_seed(0)
    latents = [torch.randn(SHAPE, generator=generator) for _ in range(4)]
    vectors = torch.rand(6, generator=generator), torch.randn(6, generator=generator)
    expected = what(dtype, *latents, *vectors)
    with DEFAULTS[default]():
        got = what(dtype, *latents, *vectors)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.device == theirs.device
        assert torch.equal(ours, theirs)
