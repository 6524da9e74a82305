"""Checkpoints of all ranks that are whole or not there: written aside, checksummed, renamed, and the last few kept.

A checkpoint is a folder `epoch-000012`:

    state/          the tensors as torch.distributed.checkpoint stores them, one file a rank; any number of ranks,
                    sharded or not, can load them
    manifest.json   the values, and the SHA-256 of every other file
    ...             what `write_extra` added, such as the adapter in a portable format

While it is made it is called `.epoch-000012.tmp`; one that is being replaced is `.epoch-000012.old`, one that is being
deleted `.epoch-000012.gone`. All ranks need to see the same folder.

The digests find damage, not forgery: whoever can write the files can write the manifest. `state/.metadata` is a
pickle, and loading it runs what it says, so load only checkpoints that come from where your code comes from. Nothing
is unpickled before the digests are found right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from crd_fast.errors import CheckpointError

_STATE, _MANIFEST = "state", "manifest.json"
_ASIDE, _REPLACED, _GONE = ".tmp", ".old", ".gone"


class CheckpointStore:
    """The folder `checkpoints/` of a run: one sub-folder an epoch, the last `keep` of them.

    group: CPU (gloo) group of all ranks of the job; every rank makes a store and calls `save`, `finish`, `latest` and
    `load` in the same order, and `finish` before the groups are destroyed. None: this process alone.
    """

    def __init__(self, folder: Path, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._rank, self._world = 0, 1
        self._group: dist.ProcessGroup | None = None
        if group is not None:
            # A group of our own: a save goes on in a thread, and what it tells other ranks must not meet what the
            # caller tells them.
            self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
            self._group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
        elif dist.is_initialized():  # without a group, dcp would wait for the ranks of the default one
            self._group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
        else:
            # dcp would say so at every save and load; a filter, because catch_warnings is not safe in a thread
            warnings.filterwarnings("ignore", r"torch\.distributed is .*single process", UserWarning)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._verified: Path | None = None
        with self._together(f"{folder} could not be opened"):
            self._tidy()

    # --- saving ---

    def save(
        self,
        epoch: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        write_extra: Callable[[Path], None],
        *,
        wait: bool = False,
    ) -> None:
        """Save the state after `epoch` finished epochs. A crash at any point leaves earlier checkpoints whole.

        tensors: any shape, the same names on every rank; a DTensor is written by the ranks that hold its shards, a
        plain tensor, which is the same on all ranks, by one of them. They may be overwritten once this returns.
        values: what JSON can hold, the same on every rank.
        write_extra(folder): called on rank 0 before this returns.
        wait: return when the checkpoint is there. Otherwise a thread writes it, and `finish` or the next `save` waits.

        Raises CheckpointError, on every rank, when this save or the one before cannot be written.
        """
        self.finish()
        self._verified = None
        manifest = {"epoch": epoch, "values": json.loads(json.dumps(values))}
        final, aside = self._paths(epoch)
        failed = f"checkpoint {final} could not be written, the ones before are untouched"
        try:
            with self._together(failed):
                state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
                if self._rank == 0:
                    self._tidy()
                    aside.mkdir(parents=True)
                    write_extra(aside)
        except CheckpointError:
            with suppress(OSError):
                self._tidy()
            raise
        self._pending = self._writer.submit(self._write, state, manifest, failed)
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is being written. Raises CheckpointError, on every rank, when it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: dict[str, Tensor], manifest: dict[str, Any], failed: str) -> None:
        """What the thread does: this rank's files, their digests, and on rank 0 the rest.

        dcp.async_save would end before the digests and the rename, which then waited for the next save.
        """
        final, aside = self._paths(manifest["epoch"])
        try:
            with self._together(failed):
                planner = DefaultSavePlanner(flatten_state_dict=False)
                dcp.save(state, storage_writer=_Writer(aside / _STATE), planner=planner, process_group=self._group)
            state.clear()
            with self._together(failed):
                written = {
                    str(file.relative_to(aside)): (_digest(file), file.stat().st_size)
                    for file in sorted(aside.rglob("*"))
                    if file.is_file() and _writer_of(file) == self._rank
                }
            files = {name: found for rank in self._all(written) for name, found in rank.items()}
            with self._together(failed):
                if self._rank == 0:
                    self._publish(final, aside, manifest, files)
        except CheckpointError:
            with suppress(OSError):
                self._tidy()
            raise

    def _publish(self, final: Path, aside: Path, manifest: dict[str, Any], files: dict[str, tuple[str, int]]) -> None:
        for name, (_, size) in files.items():
            if not (aside / name).is_file() or (aside / name).stat().st_size != size:
                raise OSError(f"{name} is not what its rank wrote: put run.dir on a file system that all ranks share")
        manifest["sha256"] = {name: digest for name, (digest, _) in files.items()}
        manifest["check"] = _check(manifest)
        (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (aside, *aside.rglob("*")):
            _flush(path)
        replaced = final.with_name(f".{final.name}{_REPLACED}")
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _flush(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        # A later one is there only when it was damaged and training went back: it must not displace a whole one.
        until_now = [path for path in self._all_paths() if _epoch(path) <= manifest["epoch"]]
        for old in until_now[: -self.keep]:
            gone = old.rename(old.with_name(f".{old.name}{_GONE}"))
            shutil.rmtree(gone, ignore_errors=True)

    def _tidy(self) -> None:
        """On rank 0: finish a replacement that a crash interrupted, and clear away what is in no use."""
        if self._rank != 0 or not self.folder.is_dir():
            return
        for replaced in self.folder.glob(f".epoch-*{_REPLACED}"):
            final = replaced.with_name(replaced.name[1:].removesuffix(_REPLACED))
            if not final.exists():
                aside = final.with_name(f".{final.name}{_ASIDE}")
                (replaced if _damage(aside) else aside).rename(final)
        for suffix in (_ASIDE, _REPLACED, _GONE):
            for rest in self.folder.glob(f".epoch-*{suffix}"):
                shutil.rmtree(rest, ignore_errors=True)

    # --- loading ---

    def newest_path(self) -> Path | None:
        """The newest checkpoint folder, unread, or None. Each rank looks for itself."""
        paths = self._all_paths()
        return paths[-1] if paths else None

    def latest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
        """The newest whole checkpoint and its values. Damaged ones are passed over; rank 0 reports them through `say`.

        Raises CheckpointError, on every rank, when none is usable.
        """
        self.finish()
        with self._together(f"{self.folder} could not be read"):
            self._tidy()
        damaged = []
        for name in reversed(self._all([path.name for path in self._all_paths()])[0]):
            path = self.folder / name
            manifest = self._verify(path)
            if not isinstance(manifest, str):
                return path, manifest["values"]
            damaged.append(name)
            if self._rank == 0:
                say(f"checkpoint {name} is damaged ({manifest}): going back to the one before")
        found = f"{len(damaged)} damaged ({', '.join(damaged)})" if damaged else "none"
        raise CheckpointError(f"no usable checkpoint in {self.folder}: found {found}; start again without --resume")

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Read a checkpoint into `tensors`, in place: the same names, shapes and dtypes, however they are sharded now.

        Raises CheckpointError, on every rank, when the checkpoint is damaged or was made with other tensors.
        """
        self.finish()
        if path != self._verified and isinstance(reason := self._verify(path), str):
            raise CheckpointError(f"checkpoint {path} is damaged ({reason}): load the one before")
        with self._together(f"checkpoint {path} could not be loaded"):
            reader = dcp.FileSystemReader(path / _STATE)
            _compare(reader.read_metadata().state_dict_metadata, tensors)
        with self._together(f"checkpoint {path} could not be loaded"):
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=self._group)

    def _verify(self, path: Path) -> dict[str, Any] | str:
        """The manifest of a checkpoint whose files are whole, or what is wrong. Each rank reads a part of the files."""
        manifest = self._all(_read_manifest(path) if self._rank == 0 else "")[0]
        if isinstance(manifest, str):
            return manifest
        files = sorted(manifest["sha256"].items())
        for reason in self._all(_first_wrong(path, files[self._rank :: self._world])):
            if reason is not None:
                return reason
        self._verified = path
        return manifest

    def _all_paths(self) -> list[Path]:
        return sorted((path for path in self.folder.glob("epoch-*") if _epoch(path) >= 0), key=_epoch)

    def _paths(self, epoch: int) -> tuple[Path, Path]:
        name = f"epoch-{epoch:06d}"
        return self.folder / name, self.folder / f".{name}{_ASIDE}"

    # --- the ranks ---

    def _all(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._world
        try:
            dist.all_gather_object(values, value, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"rank {self._rank} lost the others at a checkpoint ({str(error).splitlines()[0]}): look at the ranks' "
                "own output for the first error; the run continues from its last checkpoint with --resume"
            ) from error
        return values

    @contextmanager
    def _together(self, failed: str) -> Iterator[None]:
        """Every rank leaves the block, or every rank raises CheckpointError, which says what `failed` and where."""
        failure: BaseException | None = None
        try:
            yield
        except (Exception, dcp.CheckpointException) as error:
            failure = error
        for cause in self._all(_cause(failure, self._rank)):
            if cause is not None:
                rank, text = cause
                raise CheckpointError(f"{failed} ({f'rank {rank}: ' if self._world > 1 else ''}{text})") from failure


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path) -> None:
        # One thread a rank, since dcp does not notice when one of several fails. No copying ahead: the tensors are in
        # CPU memory, and it would make a context on the first GPU.
        super().__init__(path, thread_count=1, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save reports a full disk as an unexpected position; what the system said is what it was handling
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _cause(error: BaseException | None, rank: int) -> tuple[int, str] | None:
    """The rank where an error seen by `rank` happened, and what happened."""
    if isinstance(error, dcp.CheckpointException):  # raised on every rank for what happened on some
        rank, (error, _) = next(iter(error.failures.items()))
    if error is None:
        return None
    return rank, str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _compare(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless names, shapes and dtypes are the saved ones."""
    advice = "continue with the settings it was saved with, or start again without --resume"
    missing, unknown = [n for n in tensors if n not in saved], [n for n in saved if n not in tensors]
    if missing:
        raise CheckpointError(f"no tensor {missing[0]!r} in it, one of {len(missing)} that this run has: {advice}")
    if unknown:
        raise CheckpointError(f"this run has no tensor {unknown[0]!r}, one of {len(unknown)} in it: {advice}")
    for name, tensor in tensors.items():
        if tensor.is_meta:  # dcp would read it into a tensor of its own
            raise ValueError(f"tensor {name!r} is on the meta device: give it memory before loading")
        was = saved[name].properties.dtype, tuple(saved[name].size)
        now = tensor.dtype, tuple(tensor.shape)
        if was != now:
            raise CheckpointError(
                f"tensor {name!r} is {was[0]} {was[1]} in it and {now[0]} {now[1]} in this run: {advice}"
            )


# --- files ---


def _epoch(path: Path) -> int:
    """Of a checkpoint folder; -1 for any other path."""
    match = re.fullmatch(r"epoch-(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() else -1


def _writer_of(file: Path) -> int:
    """The rank that wrote a file of a checkpoint."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp", file.name)
    return int(match[1]) if match and file.parent.name == _STATE else 0


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(manifest: Mapping[str, Any]) -> str:
    """The digest of what a manifest says."""
    said = {key: value for key, value in manifest.items() if key != "check"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> dict[str, Any] | str:
    """The manifest of a checkpoint folder, or what is wrong with it."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["check"] != _check(manifest):
            return "its manifest does not match its own checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return manifest


def _first_wrong(path: Path, files: Sequence[tuple[str, str]]) -> str | None:
    """What is wrong with the first of `files` (name, digest) that is not as it was written, or None."""
    for name, expected in files:
        try:
            if _digest(path / name) != expected:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    manifest = _read_manifest(path)
    return manifest if isinstance(manifest, str) else _first_wrong(path, sorted(manifest["sha256"].items()))
