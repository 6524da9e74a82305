"""The checks every batch and every score passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from crd_fast.errors import RewardError
from crd_fast.rewards import GenEvalReward, OcrReward, Reward, check_images, check_scores, score_batch

IMAGES = torch.full((2, 3, 8, 8), 0.25)
PROMPTS = ["a red circle", "a blue square"]


class Fixed:
    """Returns whatever it was given."""

    name = "fixed"
    requires: frozenset[str] = frozenset()
    differentiable = False
    range = None

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        return self.result


def test_rewards_satisfy_the_protocol():
    assert isinstance(GenEvalReward(lambda images: []), Reward)
    assert isinstance(OcrReward(lambda images: []), Reward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_good_images_pass(dtype):
    images = IMAGES.to(dtype)
    images[0, 0, 0, 0], images[1, 2, 3, 4] = 0.0, 1.0
    check_images(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES * 255).to(torch.uint8), "torch.uint8"),
        (IMAGES[0], r"\(3, 8, 8\)"),
        (IMAGES[:, :1], r"\(2, 1, 8, 8\)"),
        (IMAGES[:0], r"\(0, 3, 8, 8\)"),
        (IMAGES * 8, "highest 2"),
        (IMAGES - 1, r"\[0, 1\]"),
        ([[0.0]], "list"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(RewardError, match=message):
        check_images(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_image_is_named(value):
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    with pytest.raises(RewardError, match="image 1 of 2 is NaN or infinite"):
        check_images(images)


def test_black_image_is_named():
    images = IMAGES.clone()
    images[0] = 0
    with pytest.raises(RewardError, match="image 0 of 2 is exactly black"):
        check_images(images)


def test_good_scores_come_back():
    scores = torch.tensor([0.5, -3.0])
    assert check_scores("s", scores, PROMPTS) is scores


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3), r"'s' returned shape \(3,\) for 2"),
        (torch.zeros(1), r"\(1,\)"),
        (torch.zeros(2, 2), r"\(2, 2\)"),
        (torch.zeros(2, dtype=torch.float64), "float64"),
        ([0.0, 0.0], "list"),
        (torch.tensor([0.0, float("nan")]), "'s' could not score item 1: gave nan for prompt 'a blue square'"),
        (torch.tensor([float("inf"), 0.0]), "'s' could not score item 0: gave inf for prompt 'a red circle'"),
    ],
)
def test_wrong_scores_are_refused(scores, message):
    with pytest.raises(RewardError, match=message):
        check_scores("s", scores, PROMPTS)


def test_score_batch_returns_checked_scores():
    result = score_batch(Fixed({"fixed": torch.ones(2), "extra": torch.zeros(2)}), IMAGES, PROMPTS, [{}, {}])
    assert result["fixed"].tolist() == [1, 1]
    assert result["extra"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("result", "prompts", "metadata", "message"),
    [
        ({"other": torch.ones(2)}, PROMPTS, [{}, {}], r"'fixed' returned \['other'\]"),
        ({"fixed": torch.ones(2), "extra": torch.ones(1)}, PROMPTS, [{}, {}], "'extra' returned shape"),
        ({"fixed": torch.ones(2)}, PROMPTS[:1], [{}, {}], "2 images, 1 prompts and 2"),
        ({"fixed": torch.ones(2)}, PROMPTS, [{}], "2 images, 2 prompts and 1"),
    ],
)
def test_score_batch_refuses(result, prompts, metadata, message):
    with pytest.raises(RewardError, match=message):
        score_batch(Fixed(result), IMAGES, prompts, metadata)


def test_score_batch_checks_images_before_scoring():
    with pytest.raises(RewardError, match="NaN"):
        score_batch(Fixed({"fixed": torch.ones(2)}), IMAGES * float("nan"), PROMPTS, [{}, {}])
