"""CRDConfig: defaults, validation, immutability."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import crd_fast
from crd_fast.errors import ConfigError


def test_defaults_are_the_papers():
    assert dataclasses.asdict(crd_fast.CRDConfig()) == {
        "beta": 1.0,
        "kl_coef": 0.1,
        "adv_clip": 5.0,
        "adaptive_weight": True,
        "adaptive_kl": True,
        "temperature": math.inf,
        "loss_type": "mse",
        "centering": "prompt",
        "prediction": "v",
        "reduction": "mean",
    }


@pytest.mark.parametrize(
    ("field", "value", "expectation"),
    [
        ("beta", 0.0, "> 0"),
        ("beta", -1, "> 0"),
        ("beta", math.inf, "finite"),
        ("beta", math.nan, "a number"),
        ("beta", "1", "a number"),
        ("kl_coef", -0.1, ">= 0"),
        ("kl_coef", math.inf, "finite"),
        ("adv_clip", 0, "> 0"),
        ("adv_clip", True, "a number"),
        ("temperature", -1.0, "math.inf for uniform"),
        ("temperature", math.nan, "a number"),
        ("adaptive_weight", 1, "True or False"),
        ("adaptive_kl", None, "True or False"),
        ("loss_type", "l1", "'mse', 'bce'"),
        ("centering", "group", "'prompt', 'batch'"),
        ("prediction", "velocity", "'v', 'x0', 'eps'"),
        ("reduction", "avg", "'none', 'sum', 'mean'"),
        ("loss_type", ["mse"], "'mse', 'bce'"),
    ],
)
def test_errors_name_field_value_and_expectation(field, value, expectation):
    with pytest.raises(ConfigError) as caught:
        crd_fast.CRDConfig(**{field: value})
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert f"CRDConfig.{field}:" in message and repr(value) in message and expectation in message


def test_valid_extremes():
    crd_fast.CRDConfig(kl_coef=0, temperature=0, beta=1, adv_clip=0.5)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        crd_fast.CRDConfig().beta = 2.0


def test_numpys_scalars_are_numbers():
    config = crd_fast.CRDConfig(beta=np.float32(1.5), kl_coef=np.float64(0.25), adv_clip=np.int64(3))
    f, y, old, ref = torch.randn(4, 2, 3, 5).unbind()
    rest = {"old": old, "ref": ref, "advantages": torch.randn(2)}
    expected = crd_fast.loss(f, y, **rest, config=crd_fast.CRDConfig(beta=1.5, kl_coef=0.25, adv_clip=3))
    assert torch.equal(crd_fast.loss(f, y, **rest, config=config).loss, expected.loss)
    fwd = crd_fast.noise(f, torch.rand(2), seed=np.uint64(2**64 - 1), stream=np.int64(3))
    assert torch.equal(fwd.epsilon(), crd_fast.noise(f, fwd.sigma, seed=2**64 - 1, stream=3).epsilon())
