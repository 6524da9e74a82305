"""Masks of valid elements, sample weights and anchor weights."""

from __future__ import annotations

import math

import pytest
import torch

import crd_fast

from .test_crd import assert_matches, run
from .truth import Case, random_case

GROUPS = [1, 1, 1, 2, 2, 2]


def without(case: Case, dropped: set[int]) -> Case:
    """The same case with some samples taken out of the batch."""
    keep = [i for i in range(len(case.groups)) if i not in dropped]
    smaller = Case(**vars(case))
    for name in ("f", "y", "f_old", "advantages", "ref", "ref_uncond"):
        setattr(smaller, name, getattr(case, name)[keep])
    smaller.groups = [case.groups[i] for i in keep]
    if case.sample_weights is not None:
        smaller.sample_weights = [case.sample_weights[i] for i in keep]
    return smaller


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [
        ((6, 7, 4), (6, 7)),
        ((6, 7, 4), (6, 7, 1)),
        ((6, 7, 4), (1, 7, 4)),
        ((6, 4, 3, 5), (6, 1, 3, 5)),
        ((6, 2, 4, 3, 5), (6, 1, 4, 1, 1)),
        ((6, 5), (6, 5)),
    ],
)
def test_mask(shape, mask_shape, dtype):
    case = random_case(shape, dtype=dtype, groups=GROUPS)
    case.mask = torch.rand(mask_shape) < 0.6
    case.mask[..., :1, :1] = True
    assert_matches(case)


def test_padding_may_hold_anything():
    case = random_case((6, 7, 4), groups=GROUPS)
    case.mask = torch.arange(7)[None, :] < torch.tensor([7, 3, 5, 1, 7, 2])[:, None]
    clean, clean_grad = run(case)
    for name in ("f", "y", "f_old", "ref", "ref_uncond"):
        getattr(case, name)[~case.mask] = torch.nan
    padded, padded_grad = run(case)
    assert torch.equal(padded.loss, clean.loss)
    assert torch.equal(padded_grad, clean_grad)
    assert padded_grad[~case.mask].eq(0).all()


def test_mask_equals_shorter_samples():
    case = random_case((6, 7, 4), dtype=torch.float64, groups=GROUPS)
    case.mask = (torch.arange(7) < 4).expand(6, 7)
    short = Case(**{**vars(case), "mask": None})
    for name in ("f", "y", "f_old", "ref", "ref_uncond"):
        setattr(short, name, getattr(case, name)[:, :4])
    torch.testing.assert_close(run(case)[0].loss, run(short)[0].loss)


def test_sample_without_a_valid_element_is_zero_not_nan():
    case = random_case((6, 7, 4), groups=GROUPS)
    case.mask = torch.ones(6, 7, dtype=torch.bool)
    case.mask[2] = False
    out, grad = run(case)
    assert out.implicit_reward[2] == 0 and out.kl[2] == 0
    assert out.loss.isfinite() and grad[2].eq(0).all()
    assert_matches(case)


def test_old_statistics_take_the_same_mask():
    case = random_case((6, 7, 4), groups=GROUPS)
    case.mask = torch.rand(6, 7) < 0.5
    stats = crd_fast.residual_stats(case.f_old, case.y, mask=case.mask)
    assert run(case, old=stats)[0].loss == run(case)[0].loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [math.inf, 0.3, 0.0])
def test_sample_weights(temperature, reduction):
    case = random_case((6, 3, 4), groups=GROUPS, temperature=temperature, reduction=reduction)
    case.sample_weights = [1.0, 0.5, 0.0, 2.0, 0.0, 0.25]
    assert_matches(case)


@pytest.mark.parametrize("loss_type", ["mse", "bce"])
@pytest.mark.parametrize("temperature", [math.inf, 0.3, 0.0])
def test_weight_zero_is_absence(temperature, loss_type):
    case = random_case((6, 3, 4), dtype=torch.float64, groups=GROUPS, temperature=temperature, loss_type=loss_type)
    case.sample_weights = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    out, grad = run(case)
    gone = {1, 3, 4}
    out_less, grad_less = run(without(case, gone))
    torch.testing.assert_close(out.loss, out_less.loss)
    torch.testing.assert_close(grad[[0, 2, 5]], grad_less)
    assert grad[sorted(gone)].eq(0).all()
    assert out.implicit_reward.shape == (6,)
    for name, value in out.metrics.items():
        torch.testing.assert_close(value, out_less.metrics[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("temperature", [math.inf, 0.3, 0.0])
def test_weight_zero_samples_may_hold_nan(temperature):
    case = random_case((6, 3, 4), groups=GROUPS, temperature=temperature)
    case.sample_weights = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    clean, clean_grad = run(case)
    for name in ("f", "y", "f_old", "ref", "advantages"):
        getattr(case, name)[[1, 4]] = torch.nan
    out, grad = run(case)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(grad, clean_grad)
    assert all(value.isfinite() for value in out.metrics.values())


def test_all_weights_zero_is_zero():
    case = random_case((4, 3), groups=[1, 1, 2, 2])
    case.sample_weights = [0.0] * 4
    out, grad = run(case)
    assert out.loss == 0 and grad.eq(0).all()
    assert all(value.isfinite() for value in out.metrics.values())


def test_one_as_weight_changes_nothing():
    case = random_case((6, 3, 4), groups=GROUPS)
    plain, _ = run(case)
    case.sample_weights = case.kl_weights = [1.0] * 6
    assert run(case)[0].loss == plain.loss


def test_kl_weights_touch_the_anchor_only():
    case = random_case((6, 3, 4), groups=GROUPS)
    plain, _ = run(case)
    case.kl_weights = [2.0, 0.0, 1.0, 0.0, 3.0, 0.5]
    out, _ = run(case)
    assert out.policy_loss == plain.policy_loss
    assert out.kl_loss != plain.kl_loss
    assert_matches(case)


def test_reference_rows_of_kl_weight_zero_are_ignored():
    case = random_case((6, 3, 4), groups=GROUPS)
    case.kl_weights = [2.0, 0.0, 2.0, 0.0, 2.0, 0.0]
    clean, clean_grad = run(case)
    case.ref[1::2] = torch.nan
    case.ref_uncond[1::2] = torch.inf
    out, grad = run(case)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(grad, clean_grad)
    assert out.kl[1::2].eq(0).all()


def test_inverse_probability_weights_are_unbiased():
    """Averaged over all equally likely choices of half the samples, the KL term is the full one."""
    case = random_case((4, 3), dtype=torch.float64, groups=[1, 1, 2, 2])
    full = run(case)[0].kl_loss
    halves = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    terms = []
    for chosen in halves:
        case.kl_weights = [2.0 if i in chosen else 0.0 for i in range(4)]
        terms.append(run(case)[0].kl_loss)
    torch.testing.assert_close(torch.stack(terms).mean(), full)
