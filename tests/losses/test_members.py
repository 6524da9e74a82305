"""Groups spread over several calls: the gradient of the whole, whatever the parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crd_fast

from .test_crd import MODES
from .truth import random_case

GROUPS = [5, 9, 5, 9, 9, 5, 5, 9, 7, 7]


def arguments(case, rows):
    """What the loss takes of some of a case's samples, but the prediction and the reference."""
    weights = None if case.sample_weights is None else torch.tensor(case.sample_weights)[rows]
    return {
        "old": case.f_old[rows],
        "advantages": case.advantages[rows],
        "group_ids": torch.tensor(case.groups)[rows],
        "mask": None if case.mask is None else case.mask[rows],
        "sample_weights": weights,
        "config": crd_fast.CRDConfig(**case.settings | {"reduction": "sum"}),
    }


def gradient_in_parts(case, parts):
    """(summed loss, gradient, implicit rewards) of the parts (indices each) in order."""
    f = case.f.detach().clone().requires_grad_()
    found = [crd_fast.group_members(f[rows], case.y[rows], **arguments(case, rows)) for rows in parts]
    members = crd_fast.GroupMembers.cat(found)
    outs = []
    for rows in parts:
        out = crd_fast.loss(f[rows], case.y[rows], **arguments(case, rows), ref=case.ref[rows], members=members)
        out.loss.backward()
        outs.append(out)
    return sum(out.loss.detach() for out in outs), f.grad, torch.cat([out.implicit_reward for out in outs])


def whole(case):
    f = case.f.detach().clone().requires_grad_()
    out = crd_fast.loss(f, case.y, **arguments(case, slice(None)), ref=case.ref)
    out.loss.backward()
    return out.loss.detach(), f.grad, out.implicit_reward


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("part", [1, 3])
def test_parts_are_the_whole(mode, part):
    case = random_case((10, 4, 5), dtype=torch.float64, groups=GROUPS, **mode)
    parts = torch.arange(10).split(part)
    for got, expected in zip(gradient_in_parts(case, parts), whole(case), strict=True):
        torch.testing.assert_close(got, expected[torch.cat(parts)] if got.ndim == 1 else expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_partition_with_samples_left_out(data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    groups = data.draw(st.lists(st.integers(-3, 3), min_size=2, max_size=12))
    case = random_case((len(groups), 3, 4), dtype=dtype, groups=groups)
    kept = data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=len(groups), max_size=len(groups)))
    case.sample_weights = kept
    for row, weight in enumerate(kept):
        if weight == 0:
            case.f[row] = torch.nan
    order = torch.tensor(data.draw(st.permutations(range(len(groups)))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(groups) - 1))))
    parts = [part for part in order.tensor_split(cuts) if len(part)]
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-4}
    (_, got, _), (_, expected, _) = gradient_in_parts(case, parts), whole(case)
    torch.testing.assert_close(got, expected, **tolerance)


def test_without_ids_the_members_are_one_group():
    f, y, old = torch.randn(3, 6, 2, 5, dtype=torch.float64)
    advantages, config = torch.randn(6, dtype=torch.float64), crd_fast.CRDConfig(kl_coef=0, reduction="sum")
    leaf = f.clone().requires_grad_()
    expected = torch.autograd.grad(crd_fast.loss(leaf, y, old=old, advantages=advantages, config=config).loss, leaf)[0]
    pieces = [slice(0, 1), slice(1, 6)]
    given = [{"old": old[rows], "advantages": advantages[rows], "config": config} for rows in pieces]
    members = crd_fast.GroupMembers.cat(
        [crd_fast.group_members(leaf[rows], y[rows], **rest) for rows, rest in zip(pieces, given, strict=True)]
    )
    for rows, rest in zip(pieces, given, strict=True):
        crd_fast.loss(leaf[rows], y[rows], **rest, members=members).loss.backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_means_over_parts_weighed_by_their_samples_are_the_mean():
    """As the docstring of group_members says, with samples that are left out."""
    case = random_case((10, 4, 5), dtype=torch.float64, groups=GROUPS)
    case.sample_weights = [1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 1.0]
    f, mean = case.f.detach().clone().requires_grad_(), crd_fast.CRDConfig()
    everyone = arguments(case, slice(None)) | {"config": mean, "ref": case.ref}
    (expected,) = torch.autograd.grad(crd_fast.loss(f, case.y, **everyone).loss, f)
    parts = torch.arange(10).split(4)
    given = [arguments(case, rows) | {"config": mean} for rows in parts]
    found = [crd_fast.group_members(f[rows], case.y[rows], **rest) for rows, rest in zip(parts, given, strict=True)]
    members = crd_fast.GroupMembers.cat(found)
    for rows, rest in zip(parts, given, strict=True):
        out = crd_fast.loss(f[rows], case.y[rows], **rest, ref=case.ref[rows], members=members)
        (out.loss * (rest["sample_weights"] != 0).sum() / members.counted().sum()).backward()
    torch.testing.assert_close(f.grad, expected)


def test_a_part_of_one_sample_learns_nothing_on_its_own():
    """What the members are for."""
    case = random_case((10, 4, 5), dtype=torch.float64, groups=GROUPS, kl_coef=0.0)
    f = case.f.detach().clone().requires_grad_()
    rest = arguments(case, slice(0, 1))
    crd_fast.loss(f[:1], case.y[:1], **rest).loss.backward()
    assert not f.grad.any()
    assert gradient_in_parts(case, torch.arange(10).split(1))[1].abs().flatten(1).amax(1).all()


def test_fullgraph():
    torch._dynamo.reset()
    case = random_case((6, 4, 5), dtype=torch.float32, groups=GROUPS[:6])
    rest, first = arguments(case, slice(None)), arguments(case, slice(0, 3))

    def step(f):
        members = crd_fast.group_members(f, case.y, **rest)
        return crd_fast.loss(f[:3], case.y[:3], **first, ref=case.ref[:3], members=members).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.f), step(case.f))


def members_of(**changes):
    found = crd_fast.GroupMembers(torch.arange(4), torch.randn(4), torch.randn(4), torch.ones(4, dtype=torch.bool))
    return dataclasses.replace(found, **changes)


BAD = [
    ({"members": torch.randn(3, 4)}, r"members: expected GroupMembers, .* got Tensor"),
    ({"members": members_of(), "process_group": object()}, r"process_group: expected None with members"),
    (
        {"members": members_of(group_ids=None)},
        r"members: expected group_ids in both, the members have none and .* them",
    ),
    ({"members": members_of(), "group_ids": None}, r"expected group_ids in neither, the members have them .* has none"),
    ({"members": members_of(advantages=torch.randn(4, 1))}, r"members.advantages: expected shape \(4,\)"),
    ({"members": members_of(implicit_reward=torch.randn(3))}, r"members.implicit_reward: expected shape \(4,\)"),
    ({"members": members_of(group_ids=torch.arange(4.0))}, r"members.group_ids: .*int64"),
    ({"members": members_of(active=torch.ones(4))}, r"members.active: .*bool"),
    ({"members": members_of(group_ids=torch.arange(4) + 1)}, r"its own 2 included, got 4 that do not hold them"),
    ({"members": members_of(active=torch.tensor([True, False, True, True]))}, r"that do not hold them"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes, message):
    f, y, old = torch.randn(3, 2, 3, 4)
    rest = {"advantages": torch.randn(2), "group_ids": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        crd_fast.loss(f, y, old=old, **rest | changes, config=crd_fast.CRDConfig(kl_coef=0))


def test_parts_agree_on_having_ids():
    with pytest.raises(ValueError, match="1 of 2 parts have group_ids"):
        crd_fast.GroupMembers.cat([members_of(), members_of(group_ids=None)])
