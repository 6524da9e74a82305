"""The processes that score a server's requests: started anew, spoken to in bytes, replaced when one dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from crd_fast.errors import CrdFastError, RewardError
from crd_fast.rewards import registry
from crd_fast.rewards.remote.protocol import ServedReward, encode_error
from crd_fast.rewards.remote.scoring import answer, probe

_SPAWN = multiprocessing.get_context("spawn")


class WorkerPool:
    """`workers` processes that hold all of `rewards` (name -> options) each.

    score_seconds: after which a process that has not answered is ended and replaced.
    """

    def __init__(self, rewards: Mapping[str, Any], workers: int, max_pixels: int, score_seconds: float) -> None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        self._workers = [_Worker(rewards, max_pixels, threads, score_seconds, first=i == 0) for i in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._closed = False

    def start(self) -> dict[str, ServedReward]:
        """Start all and wait until their models are loaded. Raises RewardError with the first one's reason."""
        for worker in self._workers:
            worker.launch()
        served: dict[str, ServedReward] = {}
        for worker in self._workers:
            served = worker.ready()
            self._idle.put(worker)
        return served

    def score(self, body: bytes | bytearray) -> tuple[int, bytes]:
        """Status and answer of a request, by the next process that is free; 500 where it died or took too long."""
        worker = self._idle.get()
        try:
            if not worker.alive() and not self._closed:
                worker.launch()
                worker.ready()
            return worker.score(body)
        except RewardError as error:
            return 500, encode_error(str(error))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes, whatever they do."""
        self._closed = True
        for worker in self._workers:
            worker.end()


class _Worker:
    def __init__(
        self, rewards: Mapping[str, Any], max_pixels: int, threads: int, score_seconds: float, *, first: bool
    ) -> None:
        self._arguments = (dict(rewards), max_pixels, threads, first)
        self._seconds = score_seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def launch(self) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(theirs, *self._arguments), daemon=True, name="reward-worker")
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def ready(self) -> dict[str, ServedReward]:
        """What the process serves. Raises RewardError with its reason when it could not start."""
        tree = json.loads(self._receive(None))
        if "error" in tree:
            self.end()
            raise RewardError(tree["error"])
        return {
            name: ServedReward(tuple(entry["requires"]), entry["range"] and tuple(entry["range"]))
            for name, entry in tree.items()
        }

    def score(self, body: bytes | bytearray) -> tuple[int, bytes]:
        try:
            if self._connection is None:
                raise OSError("closed")
            self._connection.send_bytes(body)
        except OSError as error:
            raise self._died() from error
        message = self._receive(self._seconds)
        return int.from_bytes(message[:2], "big"), message[2:]

    def _receive(self, seconds: float | None) -> bytes:
        try:
            if self._connection is None:
                raise EOFError
            if not self._connection.poll(seconds):
                self.end()
                raise RewardError(f"scoring took longer than {seconds:g} s; the process was ended")
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> RewardError:
        code = None
        if self._process is not None:
            self._process.join(5)
            code = self._process.exitcode
        self.end()
        return RewardError(f"the process that scored died (exit code {code}): see the server's output, and its memory")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _work(connection: Connection, rewards: Mapping[str, Any], max_pixels: int, threads: int, first: bool) -> None:
    # a signal to the whole process group is the server's to answer; a closed pipe ends the worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        built = {name: registry.build_for_worker(name, options) for name, options in rewards.items()}
        for name, reward in built.items():
            if not probe(reward) and first:
                needs = f" ({', '.join(sorted(reward.requires))})" if reward.requires else ""
                told = (
                    f"crd-fast: {name} was not tried out: no item of the server's own is one that it can score{needs}"
                )
                print(told, file=sys.stderr, flush=True)
    except Exception as error:
        connection.send_bytes(json.dumps({"error": _reason(error)}).encode())
        return
    served = {name: {"requires": sorted(r.requires), "range": r.range} for name, r in built.items()}
    connection.send_bytes(json.dumps(served).encode())
    while True:
        try:
            body = connection.recv_bytes()
        except EOFError:
            return
        try:
            status, message = answer(body, built, max_pixels)
        except Exception as error:
            status, message = 500, encode_error(_reason(error))
        del body
        connection.send_bytes(status.to_bytes(2, "big") + message)


def _reason(error: Exception) -> str:
    if isinstance(error, CrdFastError):
        return str(error)
    print(traceback.format_exc(), file=sys.stderr, flush=True)
    return f"{type(error).__name__}: {error}"
