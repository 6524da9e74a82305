"""Centering over data-parallel ranks equals one rank that holds everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import rank_worker
from .truth import random_case

WORLDS = {2: [3, 5], 4: [1, 3, 2, 2]}  # and the unequal batches of the last test
BATCH = 8
# Groups are split over the ranks; the large ids are one number as float64.
GROUPS = [2**53, 2**53 + 1, 2**53, 5, 2**53 + 1, 2**53, 2**53 + 1, 2**53]
CONFIGS = [
    {"reduction": "sum"},
    {"reduction": "sum", "temperature": 0.3, "loss_type": "bce"},
    {"reduction": "sum", "temperature": 0.0},
    {"reduction": "sum", "centering": "batch"},
    {"reduction": "none"},
    {"reduction": "none", "kl_coef": 0.0},
    {"reduction": "none", "kl_coef": 0.0, "temperature": 0.3},
    {"reduction": "none", "kl_coef": 0.0, "temperature": 0.0, "loss_type": "bce"},
]
ALONE = GROUPS.index(5)


@pytest.fixture(scope="module")
def given():
    case = random_case((BATCH, 3, 4), guided=False)
    inputs = {
        "f_theta": case.f,
        "target": case.y,
        "old": case.f_old,
        "advantages": case.advantages,
        "group_ids": torch.tensor(GROUPS),
        "ref": case.ref,
        "sample_weights": torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0]),
    }
    return {"inputs": inputs, "configs": CONFIGS}


@pytest.fixture(scope="module", params=WORLDS, ids="{} ranks".format)
def world(request):
    return request.param


@pytest.fixture(scope="module")
def answers(given, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(given, folder / "inputs.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, rank_worker.__file__, str(rank), str(world), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=[str(config) for config in CONFIGS])
@pytest.mark.parametrize("how", ["together", "in_parts"])
def test_the_ranks_equal_one(given, answers, index, how):
    loss, grad, implicit = rank_worker.losses(**given, start=0, stop=BATCH)[index]
    pieces = [answer[how][index] for answer in answers]
    torch.testing.assert_close(sum(piece[0] for piece in pieces), loss)
    torch.testing.assert_close(torch.cat([piece[1] for piece in pieces]), grad)
    torch.testing.assert_close(torch.cat([piece[2] for piece in pieces]), implicit)


def test_a_rank_alone_gives_something_else(given, answers, world):
    """So the equality above is not for want of groups that the ranks share."""
    alone = rank_worker.losses(**given, start=0, stop=BATCH // world)
    together = answers[0]["together"]
    assert all((a[0] - b[0]).abs() > 1e-3 * a[0].abs() for a, b in zip(alone, together, strict=True))


def test_a_group_of_one_has_exactly_no_policy_gradient(answers):
    for index, config in enumerate(CONFIGS):
        if config.get("kl_coef") == 0.0:
            grad = torch.cat([answer["together"][index][1] for answer in answers])
            assert not grad[ALONE].any() and grad[0].any()


def test_only_the_given_group_takes_part(given, answers, world):
    alone = rank_worker.losses(**given, start=0, stop=BATCH // world)
    for (loss, grad, _), (own_loss, own_grad, _) in zip(alone, answers[0]["alone"], strict=True):
        torch.testing.assert_close(own_loss, loss)
        torch.testing.assert_close(own_grad, grad)


def test_unequal_batches_are_an_error_on_every_rank(answers, world):
    for answer in answers:
        assert f"process_group: expected one batch size on every rank, got {WORLDS[world]}" in answer["unequal"]
