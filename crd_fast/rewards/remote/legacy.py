"""Rewards of the field's older servers, which speak pickle: https://github.com/yifan123/reward-server and its like.

They load pickles that anyone sends them, which lets the sender run code there; we send plain data, and of their
answers read plain data alone (`pickles`). They accept nothing but JPEG, so what they score is not quite the image.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crd_fast.errors import ConfigError, CrdFastError, RewardError, nearest
from crd_fast.rewards.base import Metadata
from crd_fast.rewards.remote.client import check_effort, in_threads
from crd_fast.rewards.remote.pickles import load_plain
from crd_fast.rewards.remote.protocol import ProtocolError, finite
from crd_fast.rewards.remote.transport import MAX_ATTEMPTS, Call, Calls, StoppedError, split_url

JPEG_QUALITY = 95  # colours at full resolution; their own client sends 75 with halved colours

# what each server answers: the first list is the score unless `score` names another, the others are diagnostics
_ANSWERS = {
    "deqa": ("outputs",),
    "geneval": ("scores", "rewards", "strict_rewards"),
    "unifiedreward": ("outputs",),
}
_REQUIRES = {"deqa": (), "geneval": ("include", "tag", "prompt"), "unifiedreward": ()}


@dataclass(frozen=True)
class LegacyOptions:
    """server: "deqa", "geneval" or "unifiedreward", which decides what is sent; score: the list of the answer that is
    the score, by default the server's soft one; the others are those of `RemoteOptions`."""

    url: str
    server: str
    score: str | None = None
    timeout_seconds: float = 300.0
    attempts: int = MAX_ATTEMPTS
    batch: int = 64
    concurrency: int = 1

    def __post_init__(self) -> None:
        split_url(self.url, "rewards.legacy_remote.url")
        check_effort("rewards.legacy_remote", self.timeout_seconds, self.attempts, self.batch, self.concurrency)
        if self.server not in _ANSWERS:
            raise ConfigError(f"rewards.legacy_remote.server is {self.server!r}{nearest(self.server, _ANSWERS)}")
        if self.score is not None and self.score not in _ANSWERS[self.server]:
            known = nearest(self.score, _ANSWERS[self.server])
            raise ConfigError(f"rewards.legacy_remote.score is {self.score!r}{known}")


class LegacyReward:
    """A score of an older server. Raises RewardError naming it, the server and the items; see `Reward`."""

    differentiable = False
    range: tuple[float, float] | None = None

    def __init__(self, options: LegacyOptions, name: str = "legacy_remote") -> None:
        self.name, self._options = name, options
        url = split_url(options.url, "rewards.legacy_remote.url")
        self._calls = Calls(url, options.timeout_seconds, options.attempts, {})
        self._score = options.score or _ANSWERS[options.server][0]
        self.requires: frozenset[str] = frozenset(_REQUIRES[options.server])

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """float32 (B,) CPU tensors for images (B, 3, H, W) in [0, 1]: the score, and the server's other lists."""
        count, options = len(prompts), self._options
        with self._calls.begin() as call:

            def ask(items: range) -> dict[str, list[float]]:
                where = f"reward {self.name!r} ({options.server!r} at {options.url}), items {items[0]} to {items[-1]}"
                rows = slice(items.start, items.stop)
                try:
                    return self._ask(call, images[rows], list(prompts[rows]), list(metadata[rows]))
                except StoppedError:
                    raise
                except CrdFastError as error:
                    raise RewardError(f"{where} of {count}: {error}") from error

            pieces = [range(start, min(start + options.batch, count)) for start in range(0, count, options.batch)]
            answers = in_threads(ask, pieces, options.concurrency, call.stop)
        return {
            self.name if key == self._score else key: torch.tensor(
                [value for answer in answers for value in answer[key]], dtype=torch.float32, device="cpu"
            )
            for key in _ANSWERS[options.server]
        }

    def stop(self) -> None:
        """End the requests under way, from any thread; the reward cannot be used again."""
        self._calls.stop()

    def _ask(
        self, call: Call, images: Tensor, prompts: list[str], metadata: list[Metadata]
    ) -> dict[str, list[float]]:  # fmt: skip
        question: dict[str, Any] = {"images": [_jpeg(image) for image in images]}
        if self._options.server == "geneval":
            question |= {"meta_datas": _plain(metadata), "only_strict": False}
        elif self._options.server == "unifiedreward":
            question |= {"prompts": prompts}
        body = pickle.dumps(question, protocol=4)
        most = 2**16 + 2**12 * len(prompts)  # bytes of an answer; a score takes 9, and no server has over 20 lists
        answer = load_plain(call.request("POST", "/", body, "application/octet-stream", most))
        if not isinstance(answer, dict):
            raise ProtocolError(f"the answer is a {type(answer).__name__}: expected a dictionary")
        return {key: _numbers(answer.get(key), key, len(prompts)) for key in _ANSWERS[self._options.server]}


def _jpeg(image: Tensor) -> bytes:
    from PIL import Image

    pixels = (image.detach().to("cpu", torch.float32) * 255).round().to(torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _plain(metadata: list[Metadata]) -> Any:
    try:
        return json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"the metadata is no plain data: {error}") from error


def _numbers(values: Any, key: str, count: int) -> list[float]:
    if not isinstance(values, list | tuple):
        raise ProtocolError(
            f"the answer's {key!r} is a {type(values).__name__}: expected a list of numbers; "
            "serve the reward with crd-fast serve-reward instead"
        )
    if len(values) != count:
        raise ProtocolError(f"the answer's {key!r} has {len(values)} entries for {count} items")
    return [finite(value, f"the answer's {key}[{index}]") for index, value in enumerate(values)]
