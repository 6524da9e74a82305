"""The ranks of a job under torchrun (or any launcher that sets the same variables), and what they tell each other.

Two groups: tensors on the device go through the data group (NCCL, or gloo on a CPU); requests to stop, errors and
files go through a gloo group of their own, so that they need no GPU and never meet a gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from crd_fast.errors import ConfigError, CrdFastError

T = TypeVar("T")


class RankError(CrdFastError, RuntimeError):
    """Another rank failed, or is gone."""


class OtherRankError(RankError):
    """Another rank failed and said so: all ranks are there, and all of them know."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others. A job without a launcher is one rank, without any process group.

    rank, world: in the job; local_rank, local_world: on this machine; control: gloo group of all ranks, None of one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    control: dist.ProcessGroup | None = None

    @classmethod
    def from_environment(cls, device: torch.device, timeout_minutes: float) -> Ranks:
        """Join the job that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe, or be alone.

        timeout_minutes: after which a rank that waits for another gives up.

        Raises ConfigError when a variable is missing or no number, RankError when the others cannot be reached.
        """
        world = _number("WORLD_SIZE", 1)
        if world == 1:
            return cls()
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(f"WORLD_SIZE is {world} but {name} is not set: start the job with torchrun")
        timeout = timedelta(minutes=timeout_minutes)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timeout)
            control = dist.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the {world} ranks could not meet within {timeout_minutes} minutes: {error}") from error
        return cls(_number("RANK"), world, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", world), control)

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def close(self) -> None:
        if self.control is not None:
            dist.destroy_process_group()

    # --- agreement ---

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.control is None:
            return flag
        value = torch.tensor([int(flag)])
        with self._peers():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def everyone(self, value: Tensor) -> Tensor:
        """The ranks' values, one after another along a new first axis. value: on the CPU, of one shape everywhere."""
        if self.control is None:
            return value[None]
        pieces = [torch.empty_like(value) for _ in range(self.world)]
        with self._peers():
            dist.all_gather(pieces, value, group=self.control)
        return torch.stack(pieces)

    def same(self, what: str, value: str) -> None:
        """Raises ConfigError unless all ranks hold the same text."""
        texts = self._all(value)
        if len(set(texts)) > 1:
            raise ConfigError(f"{what} differs between ranks: {sorted(set(texts))}; start all ranks alike")

    def tell(self, value: T) -> T:
        """The first rank's value, on every rank."""
        return value if self.control is None else self._all(value)[0]

    def union(self, names: Iterable[str]) -> list[str]:
        """Every name that some rank has, in order."""
        return sorted(set().union(*self._all(sorted(names))))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.control is not None:
            with self._peers():
                dist.barrier(group=self.control)

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Every rank leaves the block, or every rank raises: the rank that failed its own error, others RankError.

        Inside, ranks must not wait for each other: one that failed would not come.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self._all(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise OtherRankError(f"rank {rank} failed while {doing}: {message}")

    def _all(self, value: Any) -> list[Any]:
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world
        with self._peers():
            dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """A connection that breaks or a wait that ends as RankError."""
        try:
            yield
        except RuntimeError as error:
            raise lost(self, error) from error

    # --- tensors ---

    def share(self, count: int) -> Tensor:
        """Which of `count` items are this rank's: equal numbers everywhere, so the last item may come again."""
        each = -(-count // self.world)
        return torch.arange(self.rank * each, (self.rank + 1) * each).clamp(max=count - 1)

    def gather(self, piece: Tensor, count: int) -> Tensor:
        """The `count` items whose shares (see `share`) the ranks hold, in order, on every rank. piece (n, ...)."""
        if self.control is None:
            return piece
        pieces = [torch.empty_like(piece, memory_format=torch.contiguous_format) for _ in range(self.world)]
        with self._peers():
            dist.all_gather(pieces, piece.contiguous(), group=self.control if piece.device.type == "cpu" else None)
        return torch.cat(pieces)[:count]

    def mean_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average `.grad` over the ranks in one all-reduce; a missing gradient counts as zero."""
        if self.control is None:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1).float() for g in gradients])
        with self._peers():
            dist.all_reduce(flat)
        flat /= self.world
        for parameter, piece in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The group of device tensors; None of one rank."""
        return None if self.control is None else dist.group.WORLD


def choose_device(wanted: str | None) -> torch.device:
    """The wanted one, or this rank's GPU, or the CPU. A GPU is the process's current one from then on.

    wanted: "cuda" is this rank's GPU too.

    Raises ConfigError for one that is not there, or one GPU for several ranks.
    """
    if wanted is None and not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda") if wanted is None else _device(wanted)
    if device.type != "cuda":
        return device
    here, seen = _number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if device.index is None:
        # a launcher may show every rank its own GPU alone
        device = torch.device("cuda", 0 if seen == 1 else _number("LOCAL_RANK", 0))
        if device.index >= seen:
            raise ConfigError(f"{here} ranks on this machine, which has {seen} GPUs: start one rank for each")
    elif here > 1 and seen > 1:
        raise ConfigError(
            f"run.device is {wanted!r} for {here} ranks on this machine: expected 'cuda' or nothing, which gives every "
            "rank a GPU of its own"
        )
    torch.cuda.set_device(device)
    return device


def _device(name: str) -> torch.device:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    here = ", ".join(["cpu", *(["cuda"] if gpus else []), *gpus])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known: this machine has {here}") from error
    try:
        torch.empty(0, device=device)  # one that is missing is only told when it is used
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}): this machine has {here}") from error
    return device


def lost(ranks: Ranks, error: Exception) -> RankError:
    """What to say when a collective failed."""
    return RankError(
        f"rank {ranks.rank} lost the others ({str(error).splitlines()[0]}): look for the first error in the ranks' "
        "output; the run continues from its last checkpoint with --resume"
    )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise ConfigError(f"environment variable {name} is {text!r}: expected a whole number") from None
