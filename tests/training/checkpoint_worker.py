"""Processes for test_checkpoint.py: `checkpoint_worker.py JOB RANK FOLDER` writes FOLDER/JOB{RANK}.json."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from crd_fast.errors import CheckpointError
from crd_fast.training.checkpoint import CheckpointStore


def nothing(folder: Path) -> None:
    """What `write_extra` writes where the test is not about it."""


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "no error"


# --- any number of ranks ---


def truth(seed: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors of a checkpoint, and the dimension in which some are sharded."""
    source = torch.Generator().manual_seed(seed)
    tensors = {
        "fp32": torch.randn(7, 3, generator=source),
        "bf16": torch.randn(5, generator=source).bfloat16(),
        "int64": torch.randint(-(2**60), 2**60, (9, 2), generator=source),
        "columns": torch.randn(3, 6, generator=source),
        "one row": torch.randn(1, 4, generator=source),  # of which most ranks have none
        "hybrid": torch.randn(3, 2, generator=source),
        "scalar": torch.randn((), generator=source),
        "bytes": torch.randint(0, 256, (16,), generator=source, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(4, 5, generator=source).T,
    }
    tensors["fp32"][0] = torch.tensor([float("nan"), -0.0, float("inf")])
    return tensors, {"fp32": 0, "bf16": 0, "int64": 0, "columns": 1, "one row": 0, "hybrid": 0}


def spread(tensors: dict[str, Tensor], dims: dict[str, int], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Sharded over the mesh, as FSDP does; "hybrid" over each half of four ranks, as HSDP does."""
    if mesh is None:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    halves = init_device_mesh("cpu", (2, 2)) if mesh.size() == 4 else None
    placed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in dims:
            placed[name] = tensor.clone()
        elif name == "hybrid" and halves is not None:
            placed[name] = distribute_tensor(tensor.clone(), halves, [Replicate(), Shard(dims[name])])
        else:
            placed[name] = distribute_tensor(tensor.clone(), mesh, [Shard(dims[name])])
    return placed


def overwrite(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(77)


def unequal(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the bit."""

    def raw(tensor: Tensor) -> bytes:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return bytes(whole.contiguous().reshape(-1).view(torch.uint8).tolist())

    return [name for name in expected if raw(loaded[name]) != raw(expected[name])]


@contextmanager
def ranks(rank: int, size: int, folder: Path) -> Iterator[dist.ProcessGroup | None]:
    """The first `size` processes as ranks of a job; of one, without torch.distributed. Yields their group."""
    if size == 1:
        yield None
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    yield dist.new_group()
    dist.barrier()  # no rank takes its connections down while another still uses them
    dist.destroy_process_group()


def save_while_talking(size: int, group: dist.ProcessGroup | None, folder: Path) -> list[int]:
    """Save as `size` ranks, then overwrite the state and use the caller's group before the save is finished.

    Returns sums over the ranks of 0, 1, 2, ...
    """
    expected, dims = truth(size)
    tensors = spread(expected, dims, None if group is None else DeviceMesh.from_group(group, "cpu"))
    values = {"epoch": 3, "nested": {"mean": 0.1}}
    store = CheckpointStore(folder, 2, group)
    store.save(3, tensors, values, nothing)
    overwrite(tensors)
    values["nested"]["mean"] = 0.2
    sums = []
    for turn in range(20):
        total = torch.tensor([turn])
        if group is not None:
            dist.all_reduce(total, group=group)
        sums.append(int(total))
    store.finish()
    return sums


def load_in_every_way(by: int, group: dist.ProcessGroup | None, folder: Path) -> dict[str, Any]:
    """Load what `by` ranks saved, into sharded and into whole tensors."""
    expected, dims = truth(by)
    answer = {}
    for way in ("plain", "sharded") if group is not None else ("plain",):
        store = CheckpointStore(folder, 2, group)
        path, values = store.latest(nothing)  # type: ignore[arg-type]
        mesh = DeviceMesh.from_group(group, "cpu") if way == "sharded" and group is not None else None
        tensors = spread({name: torch.full_like(tensor, 55) for name, tensor in expected.items()}, dims, mesh)
        store.load(path, dict(tensors))
        answer[way] = [path.name, values, unequal(tensors, expected)]
    return answer


def worlds(rank: int, folder: Path) -> dict[str, Any]:
    """Jobs of 4, 2 and 1 ranks save; then jobs of 1, 2 and 4 ranks load what each saved."""
    answer: dict[str, Any] = {"sums": {}, "loaded": {}}
    sizes = (4, 2, 1)
    for size in sizes:
        if rank < size:
            with ranks(rank, size, folder / f"saving{size}") as group:
                answer["sums"][size] = save_while_talking(size, group, folder / f"by{size}")
    for size in reversed(sizes):
        if rank < size:
            with ranks(rank, size, folder / f"loading{size}") as group:
                for by in sizes:
                    for way, found in load_in_every_way(by, group, folder / f"by{by}").items():
                        answer["loaded"][f"{by} to {size} {way}"] = found
    return answer


# --- two ranks, of which one fails ---


def failures(rank: int, folder: Path) -> dict[str, Any]:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/failing", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    group = dist.new_group()
    mesh = DeviceMesh.from_group(group, "cpu")
    answer: dict[str, Any] = {}
    store = CheckpointStore(folder / "failures", 5, group)

    def tensors(fill: float, rows: int = 4) -> dict[str, Tensor]:
        return {"w": distribute_tensor(torch.full((rows, 1000), fill), mesh, [Shard(0)])}

    def newest() -> list[Any]:
        said: list[str] = []
        path, values = store.latest(said.append)
        loaded = tensors(0.0)
        store.load(path, loaded)
        return [path.name, values["epoch"], loaded["w"].full_tensor().unique().tolist(), said]

    store.save(1, tensors(1.0), {"epoch": 1}, nothing, wait=True)

    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    store.save(2, tensors(2.0, rows=400), {"epoch": 2}, nothing)
    answer["full disk"] = message(store.finish)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer["after a full disk"] = newest()

    def fail(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise OSError("no room for the adapter")

    answer["extra"] = message(lambda: store.save(2, tensors(2.0), {"epoch": 2}, fail))
    dist.barrier()  # rank 0 has cleared away
    answer["after extra"] = sorted(path.name for path in (folder / "failures").iterdir())
    dist.barrier()

    store.save(2, tensors(2.0), {"epoch": 2}, nothing, wait=True)
    answer["again"] = newest()
    path = folder / "failures" / "epoch-000002"
    strange = tensors(0.0) | ({"x": torch.zeros(1)} if rank == 1 else {})
    answer["other names on one rank"] = message(lambda: store.load(path, strange))

    if rank == 1:
        file = next((path / "state").glob("__1_*"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    answer["damaged"] = newest()

    apart = CheckpointStore(folder / f"apart{rank}", 5, group)
    answer["not shared"] = message(lambda: apart.save(1, tensors(1.0), {}, nothing, wait=True))

    # the last: rank 1 is killed while it writes
    if rank == 1:
        (folder / "failures1.json").write_text(json.dumps(answer))
        torch.distributed.checkpoint.FileSystemWriter.write_data = lambda *arguments: os.kill(os.getpid(), 9)
    store.save(3, tensors(3.0), {"epoch": 3}, nothing)
    answer["killed"] = message(store.finish)
    alone = CheckpointStore(folder / "failures", 5)
    path, values = alone.latest(nothing)  # type: ignore[arg-type]
    whole = {"w": torch.zeros(4, 1000)}
    alone.load(path, whole)
    answer["after the kill"] = [path.name, values["epoch"], whole["w"].unique().tolist()]
    answer["left over"] = sorted(path.name for path in (folder / "failures").glob(".*"))
    return answer


# --- kill -9 ---


def content(epoch: int, attempt: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    tensors = {"epoch": torch.full((300, 100), float(epoch)), "attempt": torch.full((5,), attempt)}
    return tensors, {"epoch": epoch, "attempt": attempt}


def state_of(folder: Path, keep: int) -> dict[str, Any]:
    """What a start after a crash finds."""
    said: list[str] = []
    store = CheckpointStore(folder, keep)
    path, values = store.latest(said.append)
    tensors, _ = content(0, 0)
    visible = sorted(folder.glob("epoch-*"))
    problems = [message(lambda each=each: store.load(each, tensors)) for each in visible]  # type: ignore[misc]
    store.load(path, tensors)
    return {
        "name": path.name,
        "values": [values["epoch"], values["attempt"]],
        "tensors": [tensors[name].unique().tolist() for name in ("epoch", "attempt")],
        "said": said,
        "problems": [problem for problem in problems if problem != "no error"],
        "names": sorted(found.name for found in folder.iterdir()),
    }


def child(work: Callable[[], None]) -> int:
    """Start a process that does this and ends. It has this one's memory, so it starts within milliseconds."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def at_every_step(folder: Path) -> list[dict[str, Any]]:
    """Replace an epoch and drop an older one, killed before the 1st, 2nd, ... change in the folder."""

    def begin() -> None:
        store = CheckpointStore(folder, 2)
        for epoch in (1, 2):
            store.save(epoch, *content(epoch, 0), nothing, wait=True)

    def again(steps: int) -> None:
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                return
            seen += 1
            if seen > steps:
                os.kill(os.getpid(), signal.SIGKILL)

        store = CheckpointStore(folder, 1)
        sys.addaudithook(watch)
        store.save(2, *content(2, 1), lambda aside: (aside / "extra").write_text("x"), wait=True)  # type: ignore
        os._exit(7)

    found = []
    for steps in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        os.waitpid(child(begin), 0)
        _, status = os.waitpid(child(lambda: again(steps)), 0)  # noqa: B023 - called before the next turn
        found.append(state_of(folder, 1) | {"finished": os.waitstatus_to_exitcode(status) == 7})
        if found[-1]["finished"]:
            return found
    raise AssertionError("a save of 200 steps")


def at_random_moments(folder: Path, times: int) -> list[dict[str, Any]]:
    """Save again and again, every epoch twice; after each kill the next process goes on."""
    draw, found = random.Random(5), []
    for _ in range(times):
        came, tell = os.pipe()

        def go_on() -> None:
            store = CheckpointStore(folder, 2)
            epoch = store.latest(nothing)[1]["epoch"] if store.newest_path() else 0  # type: ignore[arg-type]
            while True:
                epoch += 1
                for attempt in (0, 1):
                    tensors, values = content(epoch, attempt)
                    store.save(epoch, tensors, values, nothing)
                    for tensor in tensors.values():
                        tensor.fill_(-1)
                    store.finish()
                    os.write(tell, bytes([epoch, attempt]))  # noqa: B023

        process = child(go_on)
        told = os.read(came, 2)  # it has saved once: then any moment
        time.sleep(draw.uniform(0, 0.06))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(tell)
        while more := os.read(came, 2):
            told = more
        os.close(came)
        found.append(state_of(folder, 2) | {"told": list(told)})
    return found


def crashes(rank: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)  # a forked process has only the thread that forked
    return {"steps": at_every_step(folder / "steps"), "moments": at_random_moments(folder / "moments", 12)}


if __name__ == "__main__":
    job, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    answer = {"worlds": worlds, "failures": failures, "crashes": crashes}[job](rank, folder)
    (folder / f"{job}{rank}.json").write_text(json.dumps(answer))
    # As in tests/losses/rank_worker.py: the answer is written, and a library's thread could abort the usual exit.
    sys.stderr.flush()
    os._exit(0)
