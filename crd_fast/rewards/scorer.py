"""All rewards of a run, scoring in the background while the next samples are made.

What is known of a reward decides where it runs (`registry.placement`): rewards that keep a core busy in processes of
their own, those that wait for a server in threads, those that share the device right away. Results keep the order of
the samples, so a run does not depend on which worker was faster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from crd_fast.errors import CrdFastError, RewardError
from crd_fast.rewards import registry
from crd_fast.rewards.base import Metadata, Reward, Stoppable, check_images, unknown_scores
from crd_fast.rewards.workers import (
    DaemonThreadPool,
    Outcome,
    end_workers,
    process_pool,
    score_in_process,
    score_outcome,
)


@dataclass(frozen=True)
class RewardChoice:
    """One reward of a run: its registered options, and what a failure does.

    on_error: "raise" ends the run with the reward's name and the item; "mask" leaves the sample out.
    """

    options: Any
    on_error: str = "raise"


@dataclass(frozen=True)
class Scored:
    """N samples' scores, float32 (N,) on the CPU, and diagnostics as "<reward>_<key>".

    Where an item failed under "mask" they are NaN; failures: reward -> item -> why. busy_seconds: in which at least
    one reward was at work; waited_seconds: of them, those in which the caller could do nothing else.
    """

    scores: dict[str, Tensor]
    diagnostics: dict[str, Tensor]
    failures: dict[str, dict[int, str]]
    busy_seconds: float
    waited_seconds: float

    @property
    def hidden_share(self) -> float:
        """Share of the scoring that went on beside other work."""
        return max(0.0, 1 - self.waited_seconds / self.busy_seconds) if self.busy_seconds > 0 else 0.0


class _Piece:
    """A part of a batch given to one reward: items start to stop."""

    def __init__(self, start: int, stop: int, prompts: Sequence[str], future: Future[Outcome]) -> None:
        self.start, self.stop, self.prompts, self.future = start, stop, prompts, future


class Scorer:
    """Submit batches as they are made, then collect their scores; a context manager that ends its workers.

    timeout_seconds: after which `collect` gives up on a worker.

    Raises ConfigError for an unknown reward or wrong options.
    """

    def __init__(self, choices: Mapping[str, RewardChoice], timeout_seconds: float = 600.0) -> None:
        self.rewards: dict[str, Reward] = {name: registry.build(name, c.options) for name, c in choices.items()}
        self._choices = dict(choices)
        self._timeout = timeout_seconds
        self._executors: dict[str, Executor] = {}
        self._pieces: dict[str, list[_Piece]] = {name: [] for name in choices}
        self._submitted = 0
        self._here_seconds = 0.0
        self._trying = False

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they have not begun is dropped, and what waits for a server no longer does."""
        for reward in self.rewards.values():
            if isinstance(reward, Stoppable):
                reward.stop()
        for executor in self._executors.values():
            end_workers(executor)
        self._executors.clear()

    def try_out(self, image: Tensor, prompt: str, metadata: Metadata) -> None:
        """Score one image (1, 3, H, W) or video, so that what is missing shows before a run begins.

        A reward that fails is an error whatever `on_error` says; one that has no number for this image alone is not,
        because it is no image of the model. Rewards that wait for a server are left out: they have asked it when they
        were built.
        """
        self._trying = True
        try:
            self.submit(image, [prompt], [metadata])
            self.collect()
        finally:
            self._trying = False

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Score images (B, 3, H, W), or the frames (B, F, 3, H, W) of videos, in [0, 1], and B prompts' metadata.

        The caller may not change `images` until `collect`. Raises RewardError for unequal numbers, for pixels that
        are no image's, whatever `on_error` says, and where a reward that runs right away failed under "raise".
        """
        if not len(images) == len(prompts) == len(metadata):
            raise RewardError(
                f"rewards were given {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata "
                "entries: expected equal numbers"
            )
        images = images.detach().cpu()
        check_images(images if images.ndim == 4 else images.flatten(0, 1))
        # those that work elsewhere begin first
        names = sorted(self.rewards, key=lambda name: self._placement(name).kind == "here")
        for name in names:
            if self._trying and not self._placement(name).tried:
                continue
            self._submit(name, images, prompts, metadata)
        self._submitted += len(prompts)

    def _submit(self, name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        placement, start = self._placement(name), self._submitted
        if placement.kind == "here":
            began = time.monotonic()
            done: Future[Outcome] = Future()
            try:
                done.set_result(score_outcome(self.rewards[name], images, prompts, metadata))
            except Exception as error:
                done.set_exception(error)
            self._here_seconds += time.monotonic() - began
            piece = _Piece(start, start + len(prompts), prompts, done)
            self._pieces[name].append(piece)
            self._finished(name, piece)
            return
        size = -(-len(prompts) // placement.workers)
        for begin in range(0, len(prompts), size):
            rows = slice(begin, begin + size)
            own = list(prompts[rows])
            future = self._begin(name, images[rows], own, metadata[rows])
            self._pieces[name].append(_Piece(start + begin, start + begin + len(own), own, future))

    def _begin(
        self, name: str, images: Tensor, prompts: list[str], metadata: Sequence[Metadata]
    ) -> Future[Outcome]:  # fmt: skip
        if self._placement(name).kind == "thread":
            return self._executor(name).submit(score_outcome, self.rewards[name], images, prompts, metadata)
        try:
            return self._executor(name).submit(score_in_process, images.numpy(), prompts, list(metadata))
        except BrokenExecutor as error:  # a worker died since the last call; `collect` says so
            broken: Future[Outcome] = Future()
            broken.set_exception(error)
            return broken

    def _placement(self, name: str) -> registry.Placement:
        return registry.placement(name, self._choices[name].options)

    def _executor(self, name: str) -> Executor:
        if name not in self._executors:
            placement = self._placement(name)
            if placement.kind == "process":
                self._executors[name] = process_pool(name, self._choices[name].options, placement.workers)
            else:
                self._executors[name] = DaemonThreadPool(placement.workers, f"reward-{name}")
        return self._executors[name]

    def collect(self) -> Scored:
        """Scores of everything submitted since the last call, in that order.

        Raises RewardError naming the reward and the item where one failed under "raise", where a worker died, or
        where one has not answered in time.
        """
        began, deadline = time.monotonic(), time.monotonic() + self._timeout
        try:
            outcomes = {
                name: [self._wait(name, piece, deadline) for piece in pieces] for name, pieces in self._pieces.items()
            }
        finally:
            pieces, self._pieces = self._pieces, {name: [] for name in self._choices}
            count, self._submitted = self._submitted, 0
            here, self._here_seconds = self._here_seconds, 0.0
        waited = time.monotonic() - began + here
        scores: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        failures: dict[str, dict[int, str]] = {}
        for name, parts in outcomes.items():
            keys = {key for part in parts for key in part.scores} | {name}
            columns = {key: unknown_scores(count) for key in keys}
            failures[name] = {}
            for piece, part in zip(pieces[name], parts, strict=True):
                for key, value in part.scores.items():
                    columns[key][piece.start : piece.stop] = value
                failures[name] |= {piece.start + item: why for item, why in part.failures.items()}
            scores[name] = columns.pop(name)
            for key in sorted(columns):
                diagnostics[key if key.startswith(f"{name}_") else f"{name}_{key}"] = columns[key]
        busy = _union([(part.began, part.ended) for parts in outcomes.values() for part in parts])
        return Scored(scores, diagnostics, failures, busy, waited)

    def _wait(self, name: str, piece: _Piece, deadline: float) -> Outcome:
        if not wait([piece.future], max(0.0, deadline - time.monotonic())).done:
            raise RewardError(
                f"reward {name!r} has not scored items {piece.start} to {piece.stop - 1} after {self._timeout:.0f} "
                f"seconds, prompt {piece.prompts[0]!r}: it hangs or is too slow; give it more workers or a longer limit"
            )
        return self._finished(name, piece)

    def _finished(self, name: str, piece: _Piece) -> Outcome:
        """The outcome of a piece that is done, unless it failed and that ends the run."""
        try:
            outcome = piece.future.result()
        except BrokenExecutor as error:
            raise RewardError(
                f"reward {name!r}: a worker process ended while it scored items {piece.start} to {piece.stop - 1}, "
                f"prompt {piece.prompts[0]!r} ({error}): it may be out of memory; use fewer workers"
            ) from error
        except Exception as error:
            raise RewardError(
                f"reward {name!r} broke at items {piece.start} to {piece.stop - 1}, prompt {piece.prompts[0]!r}: "
                f"{error if isinstance(error, CrdFastError) else f'{type(error).__name__}: {error}'}"
            ) from error
        fatal = not outcome.usable if self._trying else self._choices[name].on_error == "raise"
        if outcome.failures and fatal:
            item = min(outcome.failures)
            raise RewardError(
                f"reward {name!r} failed at item {piece.start + item}, prompt {piece.prompts[item]!r}: "
                f"{outcome.failures[item]}"
            )
        return outcome


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the intervals."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(intervals):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
