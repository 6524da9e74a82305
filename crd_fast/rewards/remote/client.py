"""A reward that a server computes: see `protocol` for what travels and `server` for the other end."""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from crd_fast.errors import ConfigError, CrdFastError, RewardError, nearest
from crd_fast.rewards.base import BrokenRewardError, Metadata, PartialRewardError
from crd_fast.rewards.remote.png import encode_png
from crd_fast.rewards.remote.protocol import (
    BROKEN_STATUS,
    HEALTH_PATH,
    MAX_ITEMS,
    SCORE_PATH,
    Column,
    Item,
    ProtocolError,
    ScoreAnswer,
    ScoreRequest,
    ServedReward,
    decode_health,
)
from crd_fast.rewards.remote.transport import MAX_ATTEMPTS, Call, Calls, StoppedError, TransportError, split_url

T = TypeVar("T")

_MAX_ANSWER = 16 * 2**20  # bytes
_JSON = "application/json"


@dataclass(frozen=True)
class RemoteOptions:
    """Where a reward is computed and how it is asked for.

    - url: of the server, such as http://127.0.0.1:8000; reward: its name there.
    - timeout_seconds: that scoring one batch may take, with all its requests, retries and waits.
    - attempts: for one request, at most 3. Repeated are lost or refused connections and the statuses 408, 429 and
      5xx.
    - token_env: environment variable that holds the server's bearer token; None where it has none.
    - batch: images in one request; concurrency: requests under way together.
    """

    url: str
    reward: str
    timeout_seconds: float = 300.0
    attempts: int = MAX_ATTEMPTS
    token_env: str | None = None
    batch: int = 8
    concurrency: int = 4

    def __post_init__(self) -> None:
        split_url(self.url, "rewards.remote.url")
        check_effort("rewards.remote", self.timeout_seconds, self.attempts, self.batch, self.concurrency)


def check_effort(where: str, timeout_seconds: float, attempts: int, batch: int, concurrency: int) -> None:
    """Raises ConfigError naming the option under `where` that is out of bounds."""
    if not 0 < timeout_seconds <= 86400:
        raise ConfigError(f"{where}.timeout_seconds is {timeout_seconds}: expected more than 0 and at most a day")
    if not 1 <= attempts <= MAX_ATTEMPTS:
        raise ConfigError(f"{where}.attempts is {attempts}: expected 1 to {MAX_ATTEMPTS}")
    if not 1 <= batch <= MAX_ITEMS:
        raise ConfigError(f"{where}.batch is {batch}: expected 1 to {MAX_ITEMS} images")
    if not 1 <= concurrency <= 64:
        raise ConfigError(f"{where}.concurrency is {concurrency}: expected 1 to 64 requests")


class RemoteReward:
    """The reward `options.reward` of the server at `options.url`, asked at once what it needs and returns.

    Images travel as PNG, rounded to 8 bits. Scores are those of the server, under `name`; its diagnostics keep their
    names. Raises RewardError naming reward, server and items when there is no whole, finite answer in time, and
    PartialRewardError when the server could not score some items.
    """

    differentiable = False

    def __init__(self, options: RemoteOptions, name: str = "remote") -> None:
        self.name, self._options = name, options
        url, headers = split_url(options.url, "rewards.remote.url"), _authorization(options.token_env)
        self._calls = Calls(url, options.timeout_seconds, options.attempts, headers)
        served = self._described()
        self.requires: frozenset[str] = frozenset(served.requires)
        self.range: tuple[float, float] | None = served.range

    def _described(self) -> ServedReward:
        with self._calls.begin() as call:
            try:
                rewards = decode_health(call.request("GET", HEALTH_PATH, b"", _JSON, _MAX_ANSWER))
            except CrdFastError as error:
                raise RewardError(f"{self._where()}: {error}") from error
        if self._options.reward not in rewards:
            known = nearest(self._options.reward, rewards)
            raise RewardError(f"{self._where()}: the server has no reward {self._options.reward!r}{known}")
        return rewards[self._options.reward]

    def _where(self) -> str:
        return f"reward {self.name!r} ({self._options.reward!r} at {self._options.url})"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """float32 (B,) CPU tensors for images (B, 3, H, W) in [0, 1]; see `Reward`."""
        count, options = len(prompts), self._options
        with self._calls.begin() as call:

            def ask(items: range) -> ScoreAnswer:
                try:
                    return self._ask(call, [_item(images[i], prompts[i], metadata[i]) for i in items])
                except StoppedError:
                    raise
                except CrdFastError as error:
                    broken = isinstance(error, TransportError) and error.status == BROKEN_STATUS
                    raise (BrokenRewardError if broken else RewardError)(
                        f"{self._where()}, items {items[0]} to {items[-1]} of {count}: {error}"
                    ) from error

            pieces = [range(start, min(start + options.batch, count)) for start in range(0, count, options.batch)]
            answers = in_threads(ask, pieces, options.concurrency, call.stop)
        return self._joined(pieces, answers, count)

    def stop(self) -> None:
        """End the requests under way, from any thread; the reward cannot be used again."""
        self._calls.stop()

    def _ask(self, call: Call, items: list[Item]) -> ScoreAnswer:
        request = ScoreRequest(uuid.uuid4().hex, (self._options.reward,), tuple(items))
        body = call.request("POST", SCORE_PATH, request.encode(), _JSON, _MAX_ANSWER)
        answer = ScoreAnswer.decode(body, len(items))
        if answer.request_id != request.request_id:
            raise ProtocolError(f"the answer is for request {answer.request_id!r}: expected {request.request_id!r}")
        if self._options.reward not in answer.scores:
            raise ProtocolError(f"the answer has scores of {sorted(answer.scores)}: expected {self._options.reward!r}")
        return answer

    def _joined(self, pieces: Sequence[range], answers: Sequence[ScoreAnswer], count: int) -> dict[str, Tensor]:
        columns: dict[str, Column] = {}
        failures: dict[int, str] = {}
        for items, answer in zip(pieces, answers, strict=True):
            for position, why in answer.errors.get(self._options.reward, {}).items():
                failures[items[position]] = why
            for key, values in answer.scores.items():
                columns.setdefault(self._own_key(key), [None] * count)[items.start : items.stop] = values
        for key, column in columns.items():
            absent = [i for i, value in enumerate(column) if value is None and i not in failures]
            if absent:
                raise RewardError(f"{self._where()}: item {absent[0]} of {count} has no {key!r}, though others have")
        scores = {
            key: torch.tensor([torch.nan if v is None else v for v in column], dtype=torch.float32, device="cpu")
            for key, column in columns.items()
        }
        if failures:
            raise PartialRewardError(self.name, failures, scores)
        return scores

    def _own_key(self, key: str) -> str:
        return self.name if key == self._options.reward else key.partition("/")[2] or key


def in_threads(job: Callable[[range], T], pieces: Sequence[range], threads: int, stop: Callable[[], None]) -> list[T]:
    """`job` of every piece, in their order. When one raises, `stop` is called, and the first one's error is raised
    that is not a StoppedError."""

    def stopping(piece: range) -> T:
        try:
            return job(piece)
        except BaseException:
            stop()
            raise

    with ThreadPoolExecutor(min(threads, len(pieces)), thread_name_prefix="remote-reward") as pool:
        futures: list[Future[T]] = [pool.submit(stopping, piece) for piece in pieces]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop()
            raise
        finally:
            for future in futures:
                future.cancel()
    errors = [error for error in (f.exception() for f in futures if not f.cancelled()) if error is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, StoppedError)), errors[0])
    return [future.result() for future in futures]


def _item(image: Tensor, prompt: str, metadata: Metadata) -> Item:
    return Item(prompt, metadata, base64.b64encode(encode_png(image)).decode("ascii"))


def _authorization(token_env: str | None) -> dict[str, str]:
    if token_env is None:
        return {}
    token = os.environ.get(token_env, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"rewards.remote.token_env is {token_env!r}: expected a variable that is set to the server's token"
        )
    return {"Authorization": f"Bearer {token}"}
