"""Scores of videos: the mean of an image reward over their frames."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from crd_fast.errors import RewardError
from crd_fast.rewards import score_batch
from crd_fast.rewards.base import Metadata, score_frames
from crd_fast.rewards.jpeg import JpegCompressibility, JpegSettings


class Brightness:
    """Mean of an image's pixels times the metadata's "factor"; notes which prompts it was asked about."""

    name = "brightness"
    requires: frozenset[str] = frozenset({"factor"})
    differentiable = True
    range = None

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        self.prompts += prompts
        factors = torch.tensor([entry["factor"] for entry in metadata])
        means = images.mean((1, 2, 3))
        return {self.name: means * factors, "red": images[:, 0].mean((1, 2))}


def videos() -> Tensor:
    """(2, 3, 3, 8, 8): frames of one level each."""
    levels = torch.tensor([[0.1, 0.2, 0.6], [0.9, 0.3, 0.3]])
    return levels[..., None, None, None].expand(2, 3, 3, 8, 8).clone()


def test_a_videos_score_is_the_mean_over_its_frames_in_order() -> None:
    reward = Brightness()
    scores = score_frames(reward, videos(), ["a", "b"], [{"factor": 1.0}, {"factor": 10.0}])
    torch.testing.assert_close(scores, {"brightness": torch.tensor([0.3, 5.0]), "red": torch.tensor([0.3, 0.5])})
    assert all(value.dtype == torch.float32 for value in scores.values())
    assert reward.prompts == ["a", "a", "a", "b", "b", "b"]


def test_a_video_of_one_frame_scores_as_its_image() -> None:
    image = torch.rand(3, 3, 16, 24)
    reward = JpegCompressibility(JpegSettings(80))
    given = (["a", "b", "c"], [{}, {}, {}])
    assert torch.equal(
        score_frames(reward, image[:, None], *given)[reward.name], score_batch(reward, image, *given)[reward.name]
    )


def test_each_frame_counts_as_it_does_as_an_image() -> None:
    clips = torch.rand(2, 4, 3, 16, 24)
    reward = JpegCompressibility(JpegSettings(80))
    together = score_frames(reward, clips, ["a", "b"], [{}, {}])[reward.name]
    alone = [score_batch(reward, clip, [""] * 4, [{}] * 4)[reward.name].mean() for clip in clips]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clips: clips[1, 1].zero_(), "image 4 of 6 is exactly black"),
        (lambda clips: clips[0, 2].fill_(float("nan")), "image 2 of 6 is NaN"),
        (lambda clips: clips[1, 2].fill_(1.5), r"image 5 of 6 is outside \[0, 1\]"),
    ],
)
def test_a_broken_frame_is_named(change, message) -> None:
    clips = videos()
    change(clips)
    with pytest.raises(RewardError, match=message):
        score_frames(Brightness(), clips, ["a", "b"], [{"factor": 1.0}] * 2)


def test_a_score_that_is_no_number_is_named_with_its_prompt() -> None:
    with pytest.raises(RewardError, match="could not score item 1: frame 0: gave nan for prompt 'b'"):
        score_frames(Brightness(), videos(), ["a", "b"], [{"factor": 1.0}, {"factor": float("nan")}])


@pytest.mark.parametrize(
    ("clips", "prompts", "entries"),
    [
        (videos(), ["a"], 2),
        (videos(), ["a", "b", "c"], 2),
        (videos(), ["a", "b"], 1),
        (videos()[:, :0], ["a", "b"], 2),
        (videos()[:, 0], ["a", "b"], 2),
        (videos()[:, :, :1], ["a", "b"], 2),
    ],
    ids=["few prompts", "many prompts", "few entries", "no frames", "images", "one channel"],
)
def test_what_does_not_fit_is_refused(clips: Tensor, prompts: list[str], entries: int) -> None:
    with pytest.raises(RewardError, match="expected"):
        score_frames(Brightness(), clips, prompts, [{"factor": 1.0}] * entries)
