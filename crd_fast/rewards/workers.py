"""Scoring as a task: what a worker runs, in this process or in one of its own, and what it sends back."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crd_fast.errors import CrdFastError
from crd_fast.rewards import registry
from crd_fast.rewards.base import (
    BrokenRewardError,
    Metadata,
    PartialRewardError,
    Reward,
    score_batch,
    score_frames,
    unknown_scores,
)


@dataclass(frozen=True)
class Outcome:
    """Scores float32 (B,) by key, NaN where an item failed; failures: item -> why; seconds of the monotonic clock.

    usable: whether the reward scored at all; it names all items where it failed without naming any.
    """

    scores: dict[str, Tensor]
    failures: dict[int, str]
    began: float
    ended: float
    usable: bool = True


def score_outcome(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> Outcome:  # fmt: skip
    """A reward's scores of images (B, 3, H, W), or of videos (B, F, 3, H, W); an error of its own is an outcome too.

    A reward that fails without saying at which items has failed at all of them.
    """
    began = time.monotonic()
    failures: dict[int, str] = {}
    usable = True
    score = score_batch if images.ndim == 4 else score_frames
    try:
        scores = score(reward, images, prompts, metadata)
    except PartialRewardError as error:
        scores, failures = error.scores, error.failures
    except BrokenRewardError:
        raise
    except CrdFastError as error:
        scores = {reward.name: unknown_scores(len(prompts))}
        failures, usable = dict.fromkeys(range(len(prompts)), str(error)), False
    return Outcome(scores, failures, began, time.monotonic(), usable)


_REWARD: Reward | None = None  # of a worker process


def process_pool(name: str, options: Any, workers: int) -> ProcessPoolExecutor:
    """Processes that hold the registered reward `name` each, started anew, for `score_in_process`."""
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(name, options)
    )


_GRACE_SECONDS = 5.0  # for a thread to end what it has begun
_LEFT: list[threading.Thread] = []


def threads_left() -> bool:
    """Whether a reward's thread was still at work after its time: Python's own end would take it for a crash where it
    is in the midst of compiled code."""
    return any(thread.is_alive() for thread in _LEFT)


class DaemonThreadPool(Executor):
    """Threads as those of ThreadPoolExecutor, but a process can end whatever they hang on: see `threads_left`."""

    def __init__(self, workers: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, partial(function, *arguments, **keywords)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while cancel_futures and not self._tasks.empty():
            with contextlib.suppress(Empty):  # a thread was faster
                task = self._tasks.get_nowait()
                if task is not None:
                    task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def leave(self, seconds: float) -> None:
        """After `shutdown`: wait for the threads, for that long together."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        _LEFT.extend(thread for thread in self._threads if thread.is_alive())

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # it is the caller's
                future.set_exception(error)


def end_workers(executor: Executor) -> None:
    """Drop what an executor has not begun, and end its processes, whatever they hang on. Threads have a moment."""
    processes = list((getattr(executor, "_processes", None) or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    if isinstance(executor, DaemonThreadPool):
        executor.leave(_GRACE_SECONDS)
    for process in processes:
        process.kill()  # without it, Python would wait for them as it exits


def _start_worker(name: str, options: Any) -> None:
    global _REWARD
    # a signal to the whole process group is the parent's to answer, and a worker whose parent is gone goes too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _REWARD = registry.build_for_worker(name, options)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def score_in_process(pixels: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Outcome:
    """`score_outcome` with a worker's reward. pixels: the images as an array, which crosses processes by value."""
    if _REWARD is None:
        raise RuntimeError("score_in_process runs in the workers of process_pool alone")
    return score_outcome(_REWARD, torch.from_numpy(pixels), prompts, metadata)
