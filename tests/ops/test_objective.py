"""The objective between statistics and loss: C++ against the fp64 formulas, their slopes against differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crd_fast import native, ops
from crd_fast.reference_objective import METRICS, ObjectiveInputs, objective

VECTORS = ("mse", "mae", "kl", "old_mse", "old_mae", "advantages", "sample_weights", "kl_weights", "members")


@st.composite
def cases(draw, batches=(1, 2, 7, 24, 100)):
    batch = draw(st.sampled_from(batches))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def positive(size=batch):
        return torch.rand(size, generator=generator) + 0.1

    def weights():
        if draw(st.booleans()):
            return None
        return positive() * (torch.rand(batch, generator=generator) < 0.7)

    def ids(size=batch):
        return 2**53 + torch.randint(0, draw(st.sampled_from([1, 3, 40])), (size,), generator=generator)

    group_ids = ids() if draw(st.booleans()) else None
    member_ids = members = None
    if draw(st.booleans()):
        others = draw(st.integers(0, 50))
        own = torch.zeros(batch, dtype=torch.int64) if group_ids is None else group_ids
        member_ids = torch.cat((own, ids(others)))
        drawn = torch.rand(3, batch + others, generator=generator)
        members = torch.stack((drawn[0], drawn[1] - 0.5, (drawn[2] < 0.8).float()))
    return ObjectiveInputs(
        mse=positive(),
        mae=positive(),
        kl=positive(),
        old_mse=positive(),
        old_mae=positive(),
        advantages=3 * torch.randn(batch, generator=generator),
        group_ids=group_ids,
        sample_weights=weights(),
        kl_weights=weights(),
        member_ids=member_ids,
        members=members,
        beta=draw(st.sampled_from([0.5, 1.0, 10.0])),
        kl_coef=draw(st.sampled_from([0.0, 0.1, 2.0])),
        adv_clip=draw(st.sampled_from([0.5, 5.0])),
        adaptive_weight=draw(st.booleans()),
        adaptive_kl=draw(st.booleans()),
        temperature=draw(st.sampled_from([math.inf, 1.0, 0.02, 0.0])),
        loss_type=draw(st.sampled_from(["mse", "bce"])),
        reduction=draw(st.sampled_from(["none", "sum", "mean"])),
    )


def doubled(inputs):
    given_vectors = {name: getattr(inputs, name) for name in VECTORS}
    return inputs._replace(**{name: v.double() for name, v in given_vectors.items() if v is not None})


@settings(max_examples=300, deadline=None)
@given(cases())
def test_extension_equals_fp64_formulas(inputs):
    got, truth = native.objective(inputs), objective(doubled(inputs))
    for name in truth._fields:
        value, expected = getattr(got, name).double(), getattr(truth, name)
        # computed in fp64 from the same fp32 numbers and rounded once; sums of either sign cancel to 0
        allowed = 2e-7 * expected.abs() + 1e-9
        if inputs.members is not None:  # rewards are rounded as those of the members are
            allowed = allowed + 1e-6 * inputs.beta * (1 + expected.abs().max())
        assert ((value - expected).abs() <= allowed).all(), name


def test_a_sample_alone_among_gathered_members_has_exactly_no_policy_gradient():
    inputs = example(group_ids=torch.arange(5), kl_coef=0.0)
    samples = native.objective(inputs).samples
    members = torch.stack((samples[2], samples[0], torch.ones(5)))
    gathered = inputs._replace(member_ids=inputs.group_ids, members=members)
    assert not native.objective(gathered).slopes.any()


@settings(max_examples=200, deadline=None)
@given(cases(batches=(1, 2, 7)))
def test_slopes_are_the_derivatives(inputs):
    """By central differences in fp64, each sample on its own: group means carry no gradient."""
    inputs = doubled(inputs)._replace(reduction="none")
    if inputs.members is None:  # so that a step moves no group mean
        own = torch.zeros(len(inputs.mse), dtype=torch.int64) if inputs.group_ids is None else inputs.group_ids
        constant = objective(inputs)
        weights = torch.ones_like(inputs.mse) if inputs.sample_weights is None else inputs.sample_weights
        advantages = torch.where(weights != 0, inputs.advantages, 0.0)
        mapped = advantages.clamp(-inputs.adv_clip, inputs.adv_clip) / (2 * inputs.adv_clip) + 0.5
        active = (weights != 0).double()
        inputs = inputs._replace(member_ids=own, members=torch.stack((mapped, constant.samples[0], active)))
    slopes = objective(inputs).slopes
    step = 1e-6
    # the adaptive divisor is a constant of the loss, so only the numerator moves
    for row, name in ((0, "mse"), (1, "kl")):
        value = getattr(inputs, name)
        up, down = (objective(inputs._replace(**{name: value + s})).loss for s in (step, -step))
        torch.testing.assert_close((up - down) / (2 * step), slopes[row], rtol=1e-5, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(cases(batches=(7, 24)), st.integers(0, 2**31))
def test_left_out_samples_may_hold_anything(inputs, seed):
    out = torch.rand(len(inputs.mse), generator=torch.Generator().manual_seed(seed)) < 0.4
    weights = torch.where(out, 0.0, 1.0)
    inputs = inputs._replace(sample_weights=weights)
    vectors = ("mse", "mae", "kl", "old_mse", "old_mae", "advantages")
    dirty = inputs._replace(**{n: torch.where(out, torch.nan, getattr(inputs, n)) for n in vectors})
    for run in (native.objective, objective):
        for clean_value, dirty_value in zip(run(inputs), run(dirty), strict=True):
            assert torch.equal(clean_value, dirty_value)


def example(**changes):
    generator = torch.Generator().manual_seed(0)
    vectors = {name: torch.rand(5, generator=generator) for name in VECTORS[:6]}
    rest = dict.fromkeys(("group_ids", "sample_weights", "kl_weights", "member_ids", "members"))
    settings = {
        "beta": 1.0,
        "kl_coef": 0.1,
        "adv_clip": 5.0,
        "adaptive_weight": True,
        "adaptive_kl": True,
        "temperature": math.inf,
        "loss_type": "mse",
        "reduction": "mean",
    }
    return ObjectiveInputs(**{**vectors, **rest, **settings, **changes})


def test_nan_stays_in_its_group():
    group_ids = torch.tensor([1, 2, 1, 2, 2])
    mse = example().mse.clone()
    mse[0] = torch.nan
    for run in (native.objective, objective):
        result = run(example(group_ids=group_ids, mse=mse, reduction="none"))
        assert result.loss.isnan().tolist() == [True, False, True, False, False]
        assert math.isnan(result.metrics[METRICS.index("loss")])


@pytest.mark.parametrize("changes", [{}, {"reduction": "none"}, {"temperature": 0.5, "loss_type": "bce"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(changes, dtype, grad):
    inputs = example(**changes)
    vectors = {name: getattr(inputs, name).to(dtype) for name in VECTORS[:6]}
    inputs = inputs._replace(**vectors, group_ids=torch.tensor([1, 1, 2, 2, 3]), sample_weights=torch.ones(5))
    inputs.mse.requires_grad_(grad)
    torch.library.opcheck(torch.ops.crd_fast.objective.default, inputs)


def test_only_the_loss_carries_a_graph():
    inputs = example()
    inputs.mse.requires_grad_()
    loss, *others = ops.objective(*inputs)
    assert loss.requires_grad and not any(other.requires_grad for other in others)


def test_without_an_anchor_its_statistic_gets_no_gradient():
    inputs = example(kl_coef=0.0)
    inputs.mse.requires_grad_()
    inputs.kl.requires_grad_()
    ops.objective(*inputs)[0].backward()
    assert inputs.mse.grad.any() and inputs.kl.grad is None


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("mse", 0, "mse is null"),
        ("loss", 0, "loss is null"),
        ("batch", 0, "batch is 0"),
        ("member_ids", 8, "member_ids and member_values go together"),
        ("loss_type", 2, "loss_type: expected 0"),
        ("reduction", 3, "reduction: expected 0"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    addresses = dict.fromkeys(
        ("mse", "mae", "kl", "old_mse", "old_mae", "advantages", "loss", "parts", "samples", "slopes", "metrics"), 8
    )
    empty = dict.fromkeys(("group_ids", "sample_weights", "kl_weights", "member_ids", "member_values"), 0)
    numbers = {"batch": 1, "members": 0, "beta": 1.0, "kl_coef": 0.1, "adv_clip": 5.0, "temperature": 1.0}
    flags = {"adaptive_weight": True, "adaptive_kl": True, "loss_type": 0, "reduction": 0}
    with pytest.raises(ValueError, match=message):
        native.extension().objective(**{**addresses, **empty, **numbers, **flags, argument: value})
