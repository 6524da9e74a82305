"""The CRD loss and its gradient against an independent float64 formula, and the properties it must have."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crd_fast

from .truth import Case, random_case, truth

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 6e-3}

MODES = [
    dict(zip(("temperature", "loss_type", "adaptive_weight", "adaptive_kl", "centering"), mode, strict=True))
    for mode in itertools.product(
        (math.inf, 0.3, 0.0), ("mse", "bce"), (True, False), (True, False), ("prompt", "batch")
    )
]


def weights(values):
    return None if values is None else torch.tensor(values)


def run(case: Case, *, target=None, old=None):
    """The package on a case: its output and the gradient on f_theta."""
    f = case.f.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = crd_fast.loss(
        f,
        case.y if target is None else target,
        old=case.f_old if old is None else old,
        advantages=case.advantages,
        group_ids=torch.tensor(case.groups),
        ref=case.ref,
        ref_uncond=case.ref_uncond,
        guidance_scale=case.w,
        mask=case.mask,
        sample_weights=weights(case.sample_weights),
        kl_weights=weights(case.kl_weights),
        config=crd_fast.CRDConfig(**case.settings),
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), f)
    return out, grad


def relative(got, want, floor):
    got, want = got.detach().double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=floor))


def assert_matches(case: Case, *, floor=1e-12, **overrides):
    """Relative errors within tolerance; absolute ones below `floor`, where a perfect fit cancels all."""
    out, grad = run(case, **overrides)
    want = truth(case)
    tolerance = TOLERANCE[case.f.dtype]
    assert grad.dtype == case.f.dtype and grad.shape == case.f.shape
    assert relative(out.loss, want.loss, floor) < tolerance
    assert relative(out.policy_loss, want.policy, floor) < tolerance
    assert relative(grad, want.grad, floor) < tolerance
    if case.settings.get("kl_coef") != 0:
        assert relative(out.kl_loss, want.kl, floor) < tolerance
    statistics_tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.implicit_reward.double().tolist(), want.implicit, **statistics_tolerance)
    torch.testing.assert_close(out.kl.double().tolist(), want.velocity_kl, **statistics_tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
def test_every_mode_and_dtype(mode, dtype):
    assert_matches(random_case((8, 4, 5, 3), dtype=dtype, groups=[5, 9, 5, 9, 9, 5, 5, 9], **mode))


@settings(max_examples=60)
@given(
    batch=st.integers(1, 7),
    latent=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    mode=st.sampled_from(MODES),
    extra=st.fixed_dictionaries(
        {
            "beta": st.sampled_from([0.5, 1.0, 4.0]),
            "adv_clip": st.sampled_from([1.0, 5.0]),
            "kl_coef": st.sampled_from([1e-3, 0.1, 2.0]),
            "reduction": st.sampled_from(["mean", "sum", "none"]),
        }
    ),
    guided=st.booleans(),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_every_shape(batch, latent, dtype, mode, extra, guided, seed, data):
    groups = data.draw(st.lists(st.integers(-2, 2), min_size=batch, max_size=batch))
    case = random_case((batch, *latent), dtype=dtype, groups=groups, guided=guided, seed=seed, **mode, **extra)
    assert_matches(case, floor=1e-3)


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (2, 3, 4, 6, 6)], ids=["image", "video"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last(shape, dtype):
    case = random_case(shape, dtype=dtype, groups=[1] * shape[0])
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    case.f = case.f.to(memory_format=layout)
    case.ref = case.ref.to(memory_format=layout)
    assert not case.f.is_contiguous()
    assert_matches(case)
    assert run(case)[1].stride() == case.f.stride()


def test_strided_batch_rows():
    case = random_case((6, 4, 5), groups=[1, 1, 1, 2, 2, 2])
    for name in ("f", "y", "f_old", "ref", "ref_uncond"):
        padded = torch.full((6, 3, 4, 5), torch.nan)
        padded[:, 1] = getattr(case, name)
        setattr(case, name, padded[:, 1])
    assert_matches(case)


def test_mixed_dtypes():
    case = random_case((6, 4, 5), dtype=torch.float32, groups=[1, 1, 1, 2, 2, 2])
    case.f = case.f.bfloat16()
    case.f_old = case.f_old.half()
    case.ref = case.ref.double()
    assert_matches(case)


def test_fp64_advantages_do_not_promote():
    case = random_case((4, 3, 3), groups=[1, 1, 2, 2])
    assert case.advantages.dtype == torch.float64
    out, grad = run(case)
    assert out.loss.dtype == out.implicit_reward.dtype == out.kl.dtype == grad.dtype == torch.float32


def test_large_batch_of_many_rows_is_worked_on_in_pieces(monkeypatch):
    monkeypatch.setattr("crd_fast.reference._CHUNK_ELEMENTS", 100)  # two rows of 48 elements
    case = random_case((7, 4, 12), groups=[1, 1, 1, 2, 2, 2, 2])
    case.mask = torch.rand(7, 4) < 0.7
    assert_matches(case)


def test_docstring_formula():
    case = random_case((6, 4, 4), dtype=torch.float64, groups=[0] * 6, kl_coef=0.0)

    def rho(f):
        error = f - case.y
        return error.square().mean((1, 2)) / error.abs().mean((1, 2)).detach().clamp(min=1e-5)

    r, a = rho(case.f_old) - rho(case.f), case.advantages.clamp(-5, 5) / 10 + 0.5
    expected = 5 * (r - r.detach().mean() - (a - a.mean())).square().mean()
    torch.testing.assert_close(run(case)[0].loss, expected)


# --- small cases by hand ----------------------------------------------------------------------------------


def by_hand(**settings):
    """Two samples of two elements with errors 1 (theta) and 2 (old), 3 and 3, and advantages 5, -5.

    E_theta = 1, 9; M_theta = 1, 3; E_old = 4, 9; M_old = 2, 3. a = 1, 0.
    """
    y = torch.zeros(2, 2, dtype=torch.float64)
    f = torch.tensor([[1.0, -1.0], [3.0, -3.0]], dtype=torch.float64, requires_grad=True)
    f_old = torch.tensor([[2.0, -2.0], [3.0, -3.0]], dtype=torch.float64)
    ref = torch.tensor([[1.0, 1.0], [3.0, -3.0]], dtype=torch.float64)  # K = 2, 0
    out = crd_fast.loss(
        f,
        y,
        old=f_old,
        advantages=torch.tensor([5.0, -5.0]),
        ref=ref,
        config=crd_fast.CRDConfig(**settings),
    )
    return out, f


def test_by_hand_adaptive():
    # rho_theta = 1, 3; rho_old = 2, 3; r = 1, 0; r - mean = 1/2, -1/2; a - mean = 1/2, -1/2: a perfect fit.
    out, f = by_hand()
    assert out.policy_loss.item() == 0.0
    assert out.implicit_reward.tolist() == [1.0, 0.0]
    # L_KL = 0.1 * mean(kappa K) = 0.1 * (1 * 2) / 2; dL/df = 0.1 / 2 * 2 * (f - ref) / 2 at sample 0.
    assert out.kl_loss.item() == pytest.approx(0.1)
    out.loss.backward()
    torch.testing.assert_close(f.grad, torch.tensor([[0.0, -0.1], [0.0, 0.0]], dtype=torch.float64))


def test_by_hand_plain_error():
    # r = 4 - 1, 9 - 9 = 3, 0; centered 3/2, -3/2; minus a centered: 1, -1; loss = 5 * 1.
    out, f = by_hand(adaptive_weight=False, kl_coef=0.0)
    assert out.loss.item() == pytest.approx(5.0)
    out.loss.backward()
    # dL/dr_i = 5 * 2 * (+-1) / 2; dr/df = -2 f / 2, the mean being without gradient.
    expected = torch.tensor([[-5.0, 5.0], [15.0, -15.0]], dtype=torch.float64)
    torch.testing.assert_close(f.grad, expected)


def test_by_hand_hard_centering():
    # a = 1, 0. Centered on a > 1/2 (sample 0): r - 3 = 0, -3; a - 1 = 0, -1: residuals 0, -2.
    # Centered on a < 1/2 (sample 1): r - 0 = 3, 0; a - 0 = 1, 0: residuals 2, 0. Loss 5 * mean of (2, 2).
    out, _ = by_hand(adaptive_weight=False, kl_coef=0.0, temperature=0.0)
    assert out.loss.item() == pytest.approx(10.0)


def test_by_hand_bce():
    # Residual pair x = 3/2, -3/2 against t = 1/2, -1/2.
    out, _ = by_hand(adaptive_weight=False, kl_coef=0.0, loss_type="bce", beta=1.0)
    p = 1 / (1 + math.exp(-0.5))
    x = 1.5
    one = -(p * math.log(1 / (1 + math.exp(-x))) + (1 - p) * math.log(1 / (1 + math.exp(x))))
    assert out.loss.item() == pytest.approx(5.0 * one)


def test_by_hand_hard_centering_falls_back_when_a_side_is_empty():
    """All advantages negative: the a > 1/2 side is the whole group, the other side too; both are uniform."""
    case = random_case((4, 3), dtype=torch.float64, groups=[0] * 4, kl_coef=0.0)
    case.advantages = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    hard, uniform = (Case(**{**vars(case), "settings": {"kl_coef": 0.0, "temperature": t}}) for t in (0.0, math.inf))
    torch.testing.assert_close(run(hard)[0].loss, run(uniform)[0].loss)


# --- what the loss must not depend on, and what it must ---------------------------------------------------


@pytest.mark.parametrize("temperature", [math.inf, 0.2, 0.0])
@pytest.mark.parametrize("loss_type", ["mse", "bce"])
def test_group_of_one_has_no_policy_gradient(temperature, loss_type):
    case = random_case((4, 3, 3), groups=[1, 2, 3, 3], kl_coef=0.0, temperature=temperature, loss_type=loss_type)
    out, grad = run(case)
    assert grad[:2].eq(0).all()
    assert grad[2:].abs().sum() > 0
    assert out.metrics["singleton_groups"] == 2


def test_permutation_invariance():
    case = random_case((9, 4, 4), dtype=torch.float64, temperature=0.3)
    out, grad = run(case)
    order = torch.randperm(9)
    moved = Case(**vars(case))
    for name in ("f", "y", "f_old", "advantages", "ref", "ref_uncond"):
        setattr(moved, name, getattr(case, name)[order])
    moved.groups = [case.groups[i] for i in order]
    out_moved, grad_moved = run(moved)
    torch.testing.assert_close(out_moved.loss, out.loss)
    torch.testing.assert_close(grad_moved, grad[order])


@pytest.mark.parametrize("base", [2**24, 2**53, 2**62, -(2**53) - 2])
def test_ids_that_floating_point_would_merge_stay_apart(base):
    case = random_case((4, 3), groups=[base, base + 1, base, base + 1])
    small = Case(**{**vars(case), "groups": [0, 1, 0, 1]})
    merged = Case(**{**vars(case), "groups": [0, 0, 0, 0]})
    loss = run(case)[0].loss
    assert loss == run(small)[0].loss
    assert loss != run(merged)[0].loss


def test_no_group_ids_is_one_group():
    case = random_case((5, 3), groups=[7] * 5)
    f = case.f.requires_grad_()
    out = crd_fast.loss(f, case.y, old=case.f_old, advantages=case.advantages, ref=case.ref,
                        ref_uncond=case.ref_uncond, guidance_scale=case.w)  # fmt: skip
    assert out.loss == run(case)[0].loss


def test_old_statistics_equal_the_old_prediction():
    case = random_case((5, 3, 4))
    stats = crd_fast.residual_stats(case.f_old, case.y)
    from_stats, from_tensor = run(case, old=stats), run(case)
    assert from_stats[0].loss == from_tensor[0].loss
    assert torch.equal(from_stats[1], from_tensor[1])


def test_gradient_reaches_only_f_theta():
    case = random_case((4, 3, 3), groups=[1, 1, 2, 2])
    others = {name: getattr(case, name).clone().requires_grad_() for name in ("y", "f_old", "ref", "ref_uncond")}
    f = case.f.clone().requires_grad_()
    crd_fast.loss(f, others["y"], old=others["f_old"], advantages=case.advantages, ref=others["ref"],
                  ref_uncond=others["ref_uncond"], guidance_scale=2.0).loss.backward()  # fmt: skip
    assert f.grad is not None
    assert all(tensor.grad is None for tensor in others.values())


@pytest.mark.parametrize("where", ["f", "f_old", "y", "ref"])
def test_nan_makes_the_loss_nan(where):
    case = random_case((4, 3, 3), groups=[1, 1, 2, 2])
    getattr(case, where)[2, 1, 1] = torch.nan
    assert run(case)[0].loss.isnan()


def test_nan_stays_in_its_group():
    case = random_case((4, 3, 3), groups=[1, 1, 2, 2], reduction="none", temperature=0.5)
    case.f[3] = torch.nan
    assert run(case)[0].loss.isnan().tolist() == [False, False, True, True]


def test_metrics_are_detached_scalars_and_right():
    case = random_case((6, 4, 4), groups=[1, 1, 1, 2, 2, 3])
    case.advantages = torch.tensor([6.0, -7.0, 1.0, 0.0, 2.0, 3.0])
    out, _ = run(case)
    assert all(value.ndim == 0 and not value.requires_grad for value in out.metrics.values())
    assert not any(t.requires_grad for t in (out.policy_loss, out.kl_loss, out.implicit_reward, out.kl))
    assert out.metrics["advantage_clip_fraction"].item() == pytest.approx(2 / 6)
    assert out.metrics["loss"] == out.loss.detach()
    assert out.metrics["samples"] == 6
    r = out.implicit_reward
    means = torch.stack([r[:3].mean()] * 3 + [r[3:5].mean()] * 2 + [r[5]])
    torch.testing.assert_close(out.metrics["implicit_reward_std"], r.std(correction=0))
    torch.testing.assert_close(out.metrics["implicit_reward_centered_std"], (r - means).std(correction=0))
    torch.testing.assert_close(out.metrics["kl"], out.kl.mean())
    torch.testing.assert_close(out.metrics["theta_mse"], (case.f - case.y).square().mean())
    torch.testing.assert_close(out.metrics["old_mae"], (case.f_old - case.y).abs().mean())


def test_reductions_agree():
    case = random_case((6, 4, 4))
    none, total, mean = (
        run(Case(**{**vars(case), "settings": {"reduction": name}}))[0] for name in ("none", "sum", "mean")
    )
    assert none.loss.shape == none.policy_loss.shape == none.kl_loss.shape == (6,)
    torch.testing.assert_close(none.loss.sum(), total.loss)
    torch.testing.assert_close(none.loss.mean(), mean.loss)
    torch.testing.assert_close(none.metrics["loss"], mean.loss)


@pytest.mark.parametrize("target", ["noised", "velocity"])
def test_what_was_made_in_inference_mode_is_as_good(target):
    """Rollouts and references are often made there; a gradient cannot keep such tensors, so it keeps copies."""
    torch.manual_seed(0)
    f, x0, ids = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.tensor([1, 1, 2, 2])

    def outcome(mode):
        with mode:
            given = crd_fast.noise(x0.clone(), torch.rand(4, generator=torch.Generator().manual_seed(1)), seed=3)
            others = {
                "old": x0 * 2,
                "advantages": x0[:, 0, 0] * 1,
                "group_ids": ids.clone(),
                "ref": x0 * 3,
                "ref_uncond": x0 * 4,
                "mask": torch.ones(4, 3, dtype=torch.bool),
                "sample_weights": torch.ones(4),
                "kl_weights": torch.ones(4),
            }
            y = given.epsilon() - given.x0 if target == "velocity" else given
        assert others["ref"].is_inference() == isinstance(mode, torch.inference_mode)
        leaf = f.clone().requires_grad_()
        loss = crd_fast.loss(leaf, y, **others, guidance_scale=2.0).loss
        loss.backward()
        return loss.detach(), leaf.grad

    torch.testing.assert_close(outcome(torch.inference_mode()), outcome(torch.no_grad()), rtol=0, atol=0)


def test_numbers_of_numpy_are_numbers():
    case = random_case((4, 3), groups=[1, 1, 2, 2])
    inputs = {"old": case.f_old, "advantages": case.advantages, "ref": case.ref, "ref_uncond": case.f_old}
    want = crd_fast.loss(case.f, case.y, **inputs, guidance_scale=4.5).loss
    assert crd_fast.loss(case.f, case.y, **inputs, guidance_scale=np.float32(4.5)).loss == want


def test_module_checks_its_config_when_it_is_made():
    with pytest.raises(ValueError, match=r"config: expected a CRDConfig, .*got \{'beta': 2\}"):
        crd_fast.CRDLoss({"beta": 2})


def test_module_is_the_function():
    case = random_case((4, 3), groups=[1, 1, 2, 2])
    config = crd_fast.CRDConfig(temperature=0.5, beta=2.0)
    inputs = {"old": case.f_old, "advantages": case.advantages, "ref": case.ref}
    module = crd_fast.CRDLoss(config)
    want = crd_fast.loss(case.f, case.y, **inputs, config=config)
    assert module(case.f, case.y, **inputs).loss == want.loss
    assert list(module.parameters()) == []
    assert "beta=2.0" in repr(module)


# --- no anchor --------------------------------------------------------------------------------------------


def test_without_kl_no_reference_is_needed():
    case = random_case((4, 3), groups=[1, 1, 2, 2], kl_coef=0.0)
    with_ref, _ = run(case)
    case.ref = case.ref_uncond = None
    case.w = 1.0
    without_ref, _ = run(case)
    assert with_ref.loss == without_ref.loss == without_ref.policy_loss
    assert without_ref.kl_loss == 0
    assert without_ref.kl.eq(0).all() and with_ref.kl.gt(0).all()  # K is still reported when it can be


def test_guidance_of_one_is_the_conditional_prediction():
    case = random_case((4, 3), dtype=torch.float64, groups=[1, 1, 2, 2])
    case.w = 1.0
    guided = run(case)[0].loss
    case.ref_uncond = None
    torch.testing.assert_close(run(case)[0].loss, guided)


# --- autocast ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    case = random_case((6, 4, 4), groups=[1, 1, 1, 2, 2, 2], temperature=0.4, loss_type="bce")
    plain, plain_grad = run(case)
    with torch.autocast("cpu", dtype=dtype):
        cast, cast_grad = run(case)
    assert cast.loss.dtype == torch.float32
    assert torch.equal(cast.loss, plain.loss)
    assert torch.equal(cast_grad, plain_grad)
