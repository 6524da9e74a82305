"""Every bad input is a ValueError that names the argument and says what was expected."""

from __future__ import annotations

import pytest
import torch

import crd_fast
from crd_fast import checks

X = torch.randn(4, 3, 5)


def good() -> dict:
    return {
        "f_theta": X.clone(),
        "target": X + 1,
        "old": X + 2,
        "advantages": torch.randn(4),
        "group_ids": torch.tensor([1, 1, 2, 2]),
        "ref": X + 3,
        "ref_uncond": X - 1,
        "guidance_scale": 2.0,
        "mask": torch.ones(4, 3, dtype=torch.bool),
        "sample_weights": torch.ones(4),
        "kl_weights": torch.ones(4),
    }


def call(**changes):
    return crd_fast.loss(**(good() | changes))


def test_the_good_inputs_are_good():
    assert call().loss.isfinite()


STATS = crd_fast.ResidualStats(torch.ones(4), torch.ones(4))
BAD = [
    ("f_theta", X.long(), r"f_theta: expected a \(B, \*latent\) tensor.*int64"),
    ("f_theta", X.to(torch.complex64), r"f_theta: .*complex64"),
    ("f_theta", torch.randn(4), r"f_theta: .*shape \(4,\)"),
    ("f_theta", X[:0], r"f_theta: the batch is empty \(B = 0\)"),
    ("f_theta", X[:, :0], r"f_theta: a sample has no elements"),
    ("f_theta", X.numpy(), r"f_theta: .*ndarray"),
    ("config", {"beta": 1}, r"config: expected a CRDConfig, .*got \{'beta': 1\}"),
    ("target", X[:3], r"target: expected shape \(4, 3, 5\).*\(3, 3, 5\)"),
    ("target", X.int(), r"target: .*int32"),
    ("target", None, r"target: .*None"),
    ("target", X.to("meta"), r"target: expected .* on cpu .* on meta"),
    ("target", crd_fast.noise(X[:2], torch.rand(2), seed=0), r"target.x0: expected shape \(4, 3, 5\)"),
    ("old", X[:, :2], r"old: expected shape \(4, 3, 5\)"),
    ("old", X.long(), r"old: .*int64"),
    ("old", (torch.ones(4), torch.ones(4)), r"old: expected ResidualStats or a prediction.*tuple"),
    ("old", crd_fast.ResidualStats(torch.ones(3), torch.ones(4)), r"old.mse: expected shape \(4,\)"),
    ("old", crd_fast.ResidualStats(torch.ones(4), torch.ones(4, 1)), r"old.mae: expected shape \(4,\)"),
    ("old", crd_fast.ResidualStats(torch.ones(4).long(), torch.ones(4)), r"old.mse: .*int64"),
    ("advantages", torch.randn(4, 1), r"advantages: expected shape \(4,\).*\(4, 1\)"),
    ("advantages", torch.randn(3), r"advantages: expected shape \(4,\).*\(3,\)"),
    ("advantages", torch.arange(4), r"advantages: .*int64"),
    (
        "advantages",
        torch.tensor([0.0, torch.nan, 1.0, 2.0]),
        r"advantages: expected finite values, got 1 NaN",
    ),
    ("advantages", torch.tensor([0.0, torch.inf, 1.0, 2.0]), r"advantages: expected finite values"),
    ("advantages", [0.0, 1.0, 2.0, 3.0], r"advantages: .*list"),
    ("group_ids", torch.tensor([1.0, 1.0, 2.0, 2.0]), r"group_ids: .*int64.*float32"),
    ("group_ids", torch.tensor([1, 1, 2, 2], dtype=torch.int32), r"group_ids: .*int64.*int32"),
    ("group_ids", torch.tensor([1, 1, 2]), r"group_ids: expected shape \(4,\)"),
    ("ref", X[:2], r"ref: expected shape \(4, 3, 5\)"),
    ("ref", X.long(), r"ref: .*int64"),
    ("ref_uncond", X[..., :2], r"ref_uncond: expected shape \(4, 3, 5\)"),
    ("ref_uncond", None, r"guidance_scale: expected 1.0 without ref_uncond, got 2.0"),
    ("guidance_scale", float("nan"), r"guidance_scale: expected a finite number"),
    ("guidance_scale", torch.tensor(2.0), r"guidance_scale: expected a finite number"),
    ("mask", torch.ones(4, 3), r"mask: expected a bool tensor.*mask.bool\(\)"),
    ("mask", torch.ones(4, 5, dtype=torch.bool), r"mask: expected \(B, tokens\)"),
    ("mask", torch.ones(2, 3, 5, dtype=torch.bool), r"mask: .*broadcast to \(4, 3, 5\)"),
    ("mask", torch.ones(3, dtype=torch.bool), r"mask: .*\(3,\)"),
    ("sample_weights", torch.ones(5), r"sample_weights: expected shape \(4,\)"),
    ("sample_weights", torch.tensor([1.0, -1.0, 1.0, 1.0]), r"sample_weights: expected finite weights >= 0"),
    ("sample_weights", torch.tensor([1.0, torch.nan, 1.0, 1.0]), r"sample_weights: expected finite"),
    ("sample_weights", torch.ones(4, dtype=torch.bool), r"sample_weights: .*bool"),
    ("kl_weights", torch.ones(4, 1), r"kl_weights: expected shape \(4,\)"),
    ("kl_weights", torch.tensor([1.0, -1.0, 1.0, 1.0]), r"kl_weights: expected finite weights >= 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_bad_input(name, value, message):
    with pytest.raises(ValueError, match=message):
        call(**{name: value})


def test_missing_reference_says_what_to_do():
    with pytest.raises(ValueError, match=r"ref: .*kl_coef=0.1, got None; pass ref, or CRDConfig\(kl_coef=0\)"):
        call(ref=None, ref_uncond=None, guidance_scale=1.0)


def test_unconditional_reference_alone_is_refused():
    config = crd_fast.CRDConfig(kl_coef=0.0)
    with pytest.raises(ValueError, match="ref_uncond: expected None without ref"):
        call(ref=None, config=config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(predicted=X.long(), target=X), r"predicted: .*int64"),
        (dict(predicted=X, target=X[:1]), r"target: expected shape"),
        (dict(predicted=X, target=X, prediction="velocity"), r"prediction: expected one of .*'velocity'"),
        (dict(predicted=X, target=X, prediction="x0"), r"target: prediction='x0'"),
        (dict(predicted=X, target=X, mask=torch.ones(4, 4, dtype=torch.bool)), r"mask: "),
    ],
)
def test_residual_stats_checks_its_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        crd_fast.residual_stats(**arguments)


def test_values_of_left_out_samples_are_not_checked():
    advantages = torch.tensor([0.0, torch.nan, 1.0, 2.0])
    assert call(advantages=advantages, sample_weights=torch.tensor([1.0, 0.0, 1.0, 1.0])).loss.isfinite()


@pytest.mark.parametrize(("setting", "looked_at"), [(None, False), ("0", False), ("1", True)])
def test_values_on_an_accelerator_are_looked_at_on_request_only(monkeypatch, setting, looked_at):
    """Looking at them costs a synchronisation there; on CPU it is free."""
    monkeypatch.delenv("CRD_FAST_CHECKS", raising=False)
    if setting is not None:
        monkeypatch.setenv("CRD_FAST_CHECKS", setting)
    assert checks.values_are_checked(torch.device("cuda")) is looked_at
    assert checks.values_are_checked(torch.device("cpu"))
