"""What a server's worker does with a request: images decoded and scored piece by piece, one answer for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crd_fast.errors import CrdFastError, DataError, nearest
from crd_fast.rewards.base import (
    QUOTED_TEXT,
    BrokenRewardError,
    ChecksPrompts,
    PartialRewardError,
    Reward,
    score_batch,
    unknown_scores,
)
from crd_fast.rewards.geneval import Detection, GenEvalReward
from crd_fast.rewards.remote.png import decode_png, png_size
from crd_fast.rewards.remote.protocol import (
    BROKEN_STATUS,
    Column,
    Item,
    ProtocolError,
    ScoreAnswer,
    ScoreRequest,
    encode_error,
)


def _made_up(label: str) -> dict[str, Any]:
    prompt = f'a photo of a {label} beside a sign that says "A"'
    return {"tag": "single_object", "include": [{"class": label, "count": 1}], "prompt": prompt}


# an item for every reward there is, to find out what is missing before the first request: of the world, and of shapes
_PROBES = (_made_up("person"), _made_up("circle"))


def probe(reward: Reward) -> bool:
    """Score one made-up image, so that models load now; whether there is an item that the reward could score, which
    code of the user's own may not find among ours. Raises what the reward raises, unless it says that it has no number
    for this image."""
    known = set(_PROBES[0]) | {QUOTED_TEXT}
    item = next((item for item in _PROBES if reward.requires <= known and _can_score(reward, item)), None)
    if item is None:
        return False
    ramp = torch.linspace(0.1, 0.9, 64).expand(1, 3, 64, 64)
    with contextlib.suppress(PartialRewardError):  # it is no image of a model
        score_batch(reward, ramp, [item["prompt"]], [item])
    if isinstance(reward, GenEvalReward) and reward.colors is not None:
        # nothing was found, so no colour was asked for
        reward.colors(ramp, [(0, Detection("person", 1.0, (8, 8, 56, 56), mask=torch.ones(48, 48, dtype=torch.bool)))])
    return True


def _can_score(reward: Reward, item: dict[str, Any]) -> bool:
    if isinstance(reward, ChecksPrompts):
        try:
            reward.check_prompt(item["prompt"], item)
        except DataError:
            return False
    return True


def answer(body: bytes, rewards: Mapping[str, Reward], max_pixels: int) -> tuple[int, bytes]:
    """Status and body of the answer to a score request: 400 where it is none, or names a reward that is not served.

    `BROKEN_STATUS` where a reward's own code failed. An item that cannot be decoded or scored has a reason in the
    answer; the others have their scores. At most
    `max_pixels` pixels are decoded at a time.
    """
    try:
        request = ScoreRequest.decode(body)
        del body
        for name in request.rewards:
            if name not in rewards:
                raise ProtocolError(f"no reward {name!r} is served{nearest(name, rewards)}")
    except ProtocolError as error:
        return 400, encode_error(str(error))
    columns: dict[str, Column] = {name: [None] * len(request.items) for name in request.rewards}
    errors: dict[str, dict[int, str]] = {name: {} for name in request.rewards}
    bad: dict[int, str] = {}
    try:
        for piece in _pieces(request.items, max_pixels, bad):
            for name in request.rewards:
                _score_piece(name, rewards[name], piece, columns, errors[name])
    except BrokenRewardError as error:
        return BROKEN_STATUS, encode_error(str(error))
    for reasons in errors.values():
        reasons.update(bad)
    return 200, ScoreAnswer(request.request_id, columns, {k: v for k, v in errors.items() if v}).encode()


@dataclass(frozen=True)
class _Piece:
    """Items of one size: their positions in the request, and images (B, 3, H, W) in [0, 1]."""

    positions: list[int]
    images: Tensor
    prompts: list[str]
    metadata: list[Mapping[str, object]]


def _pieces(items: Sequence[Item], max_pixels: int, bad: dict[int, str]) -> Iterator[_Piece]:
    """Neighbours of one size, as many as `max_pixels` allow; what cannot be decoded is noted in `bad`."""
    positions: list[int] = []
    images: list[Tensor] = []

    def made() -> _Piece:
        return _Piece(
            list(positions),
            torch.stack(images),
            [items[i].prompt for i in positions],
            [items[i].metadata for i in positions],
        )

    for position, item in enumerate(items):
        try:
            data = item.png()
            height, width = png_size(data, max_pixels)
            other_size = images and images[0].shape[1:] != (height, width)
            if other_size or (len(images) + 1) * height * width > max_pixels and images:
                yield made()
                positions.clear()
                images.clear()
            image = decode_png(data, max_pixels)
        except ProtocolError as error:
            bad[position] = str(error)
            continue
        positions.append(position)
        images.append(image)
    if images:
        yield made()


def _score_piece(
    name: str, reward: Reward, piece: _Piece, columns: dict[str, Column], errors: dict[int, str]
) -> None:  # fmt: skip
    """Fill in the scores of a piece, None and a reason where there is none."""
    count = len(columns[name])
    scores, failures = _scores(reward, piece.images, piece.prompts, piece.metadata)
    for key, values in scores.items():
        column = columns.setdefault(name if key == reward.name else f"{name}/{key}", [None] * count)
        for row, position in enumerate(piece.positions):
            column[position] = None if row in failures else values[row].item()
    errors.update({piece.positions[row]: why for row, why in failures.items()})


def _scores(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Scores by key, and why items have none. One item that a reward refuses does not cost the others their score."""
    try:
        return score_batch(reward, images, prompts, metadata), {}
    except PartialRewardError as error:
        return error.scores, error.failures
    except BrokenRewardError:
        raise
    except CrdFastError as error:
        if len(prompts) == 1:
            return {reward.name: unknown_scores(1)}, {0: str(error)}
    merged: dict[str, Tensor] = {}
    failures: dict[int, str] = {}
    for row in range(len(prompts)):
        own = slice(row, row + 1)
        scores, failed = _scores(reward, images[own], prompts[own], metadata[own])
        for key, value in scores.items():
            merged.setdefault(key, unknown_scores(len(prompts)))[row] = value[0]
        if failed:
            failures[row] = failed[0]
    return merged, failures
