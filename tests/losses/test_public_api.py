"""The public names, their defaults, and what importing and calling them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import crd_fast
from crd_fast import checks


def defaults(function):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def test_names():
    classes = ["CRDConfig", "CRDLoss", "CRDOutput", "GroupMembers", "Noised", "ResidualStats"]
    functions = ["didr", "group_members", "loss", "noise", "residual_stats", "schedules"]
    assert sorted(crd_fast.__all__) == [*classes, "__version__", *functions]
    assert all(name in vars(crd_fast) for name in crd_fast.__all__)


def test_defaults():
    assert defaults(crd_fast.noise) == {"sample_ids": None, "stream": 0, "dtype": None}
    assert defaults(crd_fast.residual_stats) == {"mask": None, "prediction": "v"}
    assert defaults(crd_fast.loss) == {
        "group_ids": None,
        "ref": None,
        "ref_uncond": None,
        "guidance_scale": 1.0,
        "mask": None,
        "sample_weights": None,
        "kl_weights": None,
        "members": None,
        "process_group": None,
        "config": crd_fast.CRDConfig(),
    }
    assert defaults(crd_fast.group_members) == {
        "group_ids": None,
        "mask": None,
        "sample_weights": None,
        "process_group": None,
        "config": crd_fast.CRDConfig(),
    }


def test_import_is_light():
    heavy = [
        "triton",
        "diffusers",
        "transformers",
        "peft",
        "PIL",
        "scipy",
        "yaml",
        "matplotlib",
        "onnxruntime",
    ]
    code = (
        "import sys, torch; before = set(sys.modules); import crd_fast; "
        f"print(set({heavy}) & (set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_usage_as_documented():
    shape = (6, 4, 8, 8)
    x0, sigma, A = torch.randn(shape), torch.rand(6), torch.randn(6)
    g = torch.tensor([1, 1, 1, 2, 2, 2])
    f_old, c, u = (torch.randn(shape) for _ in range(3))
    f_theta = torch.randn(shape, requires_grad=True)
    fwd = crd_fast.noise(x0, sigma, seed=0)
    old = crd_fast.residual_stats(f_old, fwd)
    out = crd_fast.loss(f_theta, fwd, old=old, advantages=A, group_ids=g, ref=c, ref_uncond=u, guidance_scale=4.5)
    out.loss.backward()
    assert f_theta.grad.isfinite().all() and f_theta.grad.abs().sum() > 0
    torch.testing.assert_close(out.policy_loss + out.kl_loss, out.loss.detach())


@pytest.mark.parametrize("temperature", [float("inf"), 0.5, 0.0])
@pytest.mark.parametrize("loss_type", ["mse", "bce"])
def test_no_value_ever_reaches_the_host(monkeypatch, temperature, loss_type):
    """Fake tensors have no values: an .item() or an if on one, which waits for an accelerator, raises."""
    monkeypatch.setattr(checks, "values_are_checked", lambda device: False)
    config = crd_fast.CRDConfig(temperature=temperature, loss_type=loss_type)
    with FakeTensorMode():
        shape = (4, 3, 5)
        f_theta = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        fwd = crd_fast.noise(torch.empty(shape), torch.empty(4), seed=1)
        out = crd_fast.loss(
            f_theta,
            fwd,
            old=torch.empty(shape),
            advantages=torch.empty(4, dtype=torch.float64),
            group_ids=torch.empty(4, dtype=torch.int64),
            ref=torch.empty(shape),
            ref_uncond=torch.empty(shape),
            guidance_scale=4.5,
            mask=torch.empty((4, 3), dtype=torch.bool),
            sample_weights=torch.empty(4),
            kl_weights=torch.empty(4),
            config=config,
        )
        out.loss.backward()
        assert f_theta.grad.dtype == torch.bfloat16 and f_theta.grad.shape == shape
        assert out.loss.dtype == torch.float32
