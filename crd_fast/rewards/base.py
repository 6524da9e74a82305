"""What a reward is, and the checks that keep a broken batch or a broken scorer from passing as a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from crd_fast.errors import RewardError

Metadata = Mapping[str, Any]

# Not a metadata key: a reward that lists it in `requires` needs one text between double quotes in the prompt
# itself.
QUOTED_TEXT = "quoted_text"


@runtime_checkable
class Reward(Protocol):
    """A scorer of images.

    `requires` names the metadata keys it reads (or QUOTED_TEXT), checked when prompts are loaded;
    `differentiable` says whether gradients reach the images; `range` bounds the score when it is bounded.
    """

    name: str
    requires: frozenset[str]
    differentiable: bool
    range: tuple[float, float] | None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """Scores of images (B, 3, H, W) in [0, 1]: float32 (B,) CPU tensors.

        The entry called `name` is the score, the others are diagnostics. Raises RewardError where an item
        cannot be scored; there is no default score.
        """
        ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that knows more about the prompts it can score than `requires` says; asked when prompts are loaded."""

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Raises DataError for a prompt that it could score no image of."""
        ...


@runtime_checkable
class DifferentiableReward(Reward, Protocol):
    """A reward with `differentiable` true: gradients reach the images."""

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], with a graph to them, on their device.

        Without 8-bit rounding or PIL; how far it is from `__call__` is a tested number.
        """
        ...


@runtime_checkable
class Stoppable(Protocol):
    """A reward that waits for others while it scores, and can be told not to."""

    def stop(self) -> None:
        """End the calls under way, from any thread; the reward cannot be used again."""
        ...


class PartialRewardError(RewardError):
    """Some items of a batch could not be scored.

    failures: item -> why; scores: what the reward returns otherwise, NaN at those items.
    """

    def __init__(self, name: str, failures: Mapping[int, str], scores: Mapping[str, Tensor]) -> None:
        first = min(failures)
        more = f" ({len(failures)} items failed)" if len(failures) > 1 else ""
        super().__init__(f"reward {name!r} could not score item {first}: {failures[first]}{more}")
        self.failures, self.scores = dict(failures), dict(scores)


class BrokenRewardError(RewardError):
    """A reward's own code failed, which is no property of an item: never masked."""


def check_images(images: Tensor) -> None:
    """Raises RewardError unless `images` is float (B, 3, H, W), finite, in [0, 1] and has no all-black image.

    A decoder that overflows yields NaN, or exact black after a cast to integers, and most scorers give either
    a plausible number.
    """
    if not isinstance(images, Tensor):
        raise RewardError(f"images are a {type(images).__name__}: expected a float tensor (B, 3, H, W) in [0, 1]")
    if not images.is_floating_point():
        raise RewardError(f"images are {images.dtype}: expected floating point in [0, 1]; divide 8-bit images by 255")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise RewardError(f"images have shape {tuple(images.shape)}: expected (B, 3, H, W), none of them 0")
    flat = images.detach().flatten(1)  # (B, 3HW)
    finite = flat.isfinite().all(1)
    if not finite.all():
        raise RewardError(
            f"{_positions(~finite)} NaN or infinite: expected finite pixels; "
            "decode the latents in fp32 or bf16 and look at the model's last losses"
        )
    low, high = flat.amin(1), flat.amax(1)
    outside = (low < 0) | (high > 1)
    if outside.any():
        raise RewardError(
            f"{_positions(outside)} outside [0, 1] (lowest {low.min():.4g}, highest {high.max():.4g}): "
            "map the decoder's [-1, 1] by x / 2 + 0.5 and clamp"
        )
    black = high == 0
    if black.any():
        raise RewardError(
            f"{_positions(black)} exactly black in every pixel: that is how an overflowing decoder looks "
            "after a cast; decode the latents in fp32 or bf16"
        )


def unknown_scores(count: int) -> Tensor:
    """(count,) NaN: of images that nothing has scored."""
    return torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")


def check_scores(name: str, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores (B,) of reward `name`, proven to be one finite float32 number on the CPU for each of B
    prompts.

    Raises RewardError naming the reward; where a number is not finite PartialRewardError, which names the items and
    their prompts.
    """
    if not isinstance(scores, Tensor):
        raise RewardError(f"reward {name!r} returned a {type(scores).__name__}: expected a float32 tensor (B,)")
    if tuple(scores.shape) != (len(prompts),):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {len(prompts)} images: "
            f"expected ({len(prompts)},), one score an image in the same order"
        )
    if scores.dtype != torch.float32 or scores.device.type != "cpu":
        raise RewardError(
            f"reward {name!r} returned {scores.dtype} on {scores.device}: expected torch.float32 on the CPU"
        )
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        reasons = {i: f"gave {scores[i].item()} for prompt {prompts[i]!r}: expected a finite number" for i in bad}
        raise PartialRewardError(name, reasons, {name: scores})
    return scores


def score_batch(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> dict[str, Tensor]:
    """`reward(images, prompts, metadata)` with inputs and outputs checked.

    images (B, 3, H, W) in [0, 1]; B prompts and B metadata entries. Returns float32 (B,) CPU tensors with the
    score under `reward.name`. Raises PartialRewardError where some items have no finite number, RewardError for
    anything else.
    """
    check_images(images)
    batch = images.shape[0]
    if len(prompts) != batch or len(metadata) != batch:
        raise RewardError(
            f"reward {reward.name!r} was given {batch} images, {len(prompts)} prompts and "
            f"{len(metadata)} metadata entries: expected equal numbers"
        )
    scores = reward(images, prompts, metadata)
    if reward.name not in scores:
        raise RewardError(f"reward {reward.name!r} returned {sorted(scores)}: expected its score under {reward.name!r}")
    failures: dict[int, str] = {}
    for key, value in scores.items():
        try:
            check_scores(key, value, prompts)
        except PartialRewardError as error:
            about = "" if key == reward.name else f"{key} "
            failures = {item: f"{about}{why}" for item, why in error.failures.items()} | failures
    if failures:
        failed = torch.zeros(batch, dtype=torch.bool, device="cpu")
        failed[list(failures)] = True
        raise PartialRewardError(
            reward.name, failures, {key: value.masked_fill(failed, torch.nan) for key, value in scores.items()}
        )
    return scores


def score_frames(
    reward: Reward, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> dict[str, Tensor]:
    """`score_batch` of videos (B, F, 3, H, W): a video's score is the mean over its frames.

    Returns float32 (B,) CPU tensors. Raises as `score_batch` does; a video with a frame that failed has failed.
    """
    count, frames = videos.shape[:2]

    def mean(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.view(count, frames).mean(1) for name, value in scores.items()}

    try:
        scores = score_batch(
            reward,
            videos.flatten(0, 1),
            [prompt for prompt in prompts for _ in range(frames)],
            [entry for entry in metadata for _ in range(frames)],
        )
    except PartialRewardError as error:
        failures: dict[int, str] = {}
        for item, why in sorted(error.failures.items()):
            failures.setdefault(item // frames, f"frame {item % frames}: {why}")
        raise PartialRewardError(reward.name, failures, mean(error.scores)) from error
    return mean(scores)


def _positions(mask: Tensor) -> str:
    indices = mask.nonzero().flatten().tolist()
    shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return f"image {shown} of {len(mask)} is" if len(indices) == 1 else f"images {shown} of {len(mask)} are"
