"""Checkpoints survive crashes, damage and full disks, and move between numbers of ranks."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from crd_fast.errors import CheckpointError
from crd_fast.training.checkpoint import CheckpointStore

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def nothing(folder: Path) -> None:
    """What `write_extra` writes where the test is not about it."""


def adapter(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text("LoRA")


def save(to: CheckpointStore, epoch: int, fill: float | None = None, wait: bool = True) -> None:
    tensors = {"w": torch.full((4,), float(epoch) if fill is None else fill)}
    to.save(epoch, tensors, {"epoch": epoch}, adapter, wait=wait)


def store(path: Path, epochs: int, keep: int = 3) -> CheckpointStore:
    made = CheckpointStore(path, keep)
    for epoch in range(1, epochs + 1):
        save(made, epoch)
    return made


def loaded(kept: CheckpointStore) -> tuple[str, list[float]]:
    path, values = kept.latest(pytest.fail)
    tensors = {"w": torch.zeros(4)}
    kept.load(path, tensors)
    assert path.name == f"epoch-{values['epoch']:06d}" and path == kept.newest_path()
    return path.name, tensors["w"].tolist()


def names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


# --- one process ---


def test_keeps_the_last_few_and_loads_the_newest(tmp_path: Path) -> None:
    kept = store(tmp_path / "checkpoints", 5)
    assert names(tmp_path / "checkpoints") == ["epoch-000003", "epoch-000004", "epoch-000005"]
    assert loaded(kept) == ("epoch-000005", [5.0] * 4)
    assert (tmp_path / "checkpoints" / "epoch-000005" / "adapter" / "weights").read_text() == "LoRA"


def test_training_goes_on_while_the_state_of_the_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), dcp.FileSystemWriter.write_data

    def late(*arguments: Any) -> Any:
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", late)
    kept = CheckpointStore(tmp_path, 3)
    tensors, values = {"w": torch.ones(4)}, {"epoch": 1, "counters": [3]}
    kept.save(1, tensors, values, nothing)
    tensors["w"].fill_(2)
    values["counters"].append(4)  # type: ignore[attr-defined]
    assert kept.newest_path() is None and names(tmp_path) == [".epoch-000001.tmp"]
    go.set()
    kept.finish()
    assert kept.latest(pytest.fail)[1] == {"epoch": 1, "counters": [3]}
    assert loaded(kept) == ("epoch-000001", [1.0] * 4)


def test_a_save_is_there_without_a_call_after_it(tmp_path: Path) -> None:
    """A crash long after a save does not lose it for want of the next one."""
    kept = CheckpointStore(tmp_path, 3)
    save(kept, 1, wait=False)
    assert kept._pending is not None
    assert kept._pending.result(60) is None  # the thread, not finish
    assert names(tmp_path) == ["epoch-000001"]


def flip(file: Path, at: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte": lambda path: flip(path / "state" / "__0_0.distcp"),
    "truncated": lambda path: (path / "state" / "__0_0.distcp").write_bytes(b"PK"),
    "missing": lambda path: (path / "state" / "__0_0.distcp").unlink(),
    "flipped metadata": lambda path: flip(path / "state" / ".metadata"),
    "no metadata": lambda path: (path / "state" / ".metadata").unlink(),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "flipped adapter": lambda path: flip(path / "adapter" / "weights"),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "truncated manifest": lambda path: (path / "manifest.json").write_text("{"),
    "another manifest": lambda path: (path / "manifest.json").write_text("[1]"),
    "unreadable": lambda path: ((path / "manifest.json").unlink(), (path / "manifest.json").mkdir()),
    "empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    kept = store(tmp_path, 2)
    DAMAGES[damage](tmp_path / "epoch-000002")
    said: list[str] = []
    path, values = kept.latest(said.append)
    assert path.name == "epoch-000001" and values == {"epoch": 1}
    assert len(said) == 1 and said[0].startswith("checkpoint epoch-000002 is damaged (")
    with pytest.raises(CheckpointError, match="epoch-000002 is damaged"):
        kept.load(tmp_path / "epoch-000002", {"w": torch.zeros(4)})


def test_no_byte_of_a_manifest_changes_unnoticed(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, 2)
    values = {"epoch": 1, "mean": 0.25, "name": "é", "none": None, "by": {"10": 1, "9": 2}}
    kept.save(1, {"w": torch.zeros(1)}, values, nothing, wait=True)
    manifest = tmp_path / "epoch-000001" / "manifest.json"
    whole = manifest.read_bytes()
    noticed = 0
    for at in range(len(whole)):
        flip(manifest, at)
        try:
            assert kept.latest(lambda text: None)[1] == values  # a space became another
        except CheckpointError:
            noticed += 1
        manifest.write_bytes(whole)
    assert noticed > 0.8 * len(whole)


def test_nothing_is_unpickled_before_its_digest_is_right(tmp_path: Path) -> None:
    kept = store(tmp_path / "checkpoints", 1)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "checkpoints" / "epoch-000001" / "state" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="damaged"):
        kept.load(tmp_path / "checkpoints" / "epoch-000001", {"w": torch.zeros(4)})
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    kept = store(tmp_path, 1)
    path, _ = kept.latest(pytest.fail)
    save(kept, 1)
    flip(path / "state" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="damaged"):
        kept.load(path, {"w": torch.zeros(4)})


def test_none_usable_is_an_error_that_counts(tmp_path: Path) -> None:
    kept = store(tmp_path, 1)
    (tmp_path / "epoch-000001" / "state" / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found 1 damaged \(epoch-000001\)"):
        kept.latest(lambda text: None)
    empty = CheckpointStore(tmp_path / "empty", 3)
    with pytest.raises(CheckpointError, match="found none"):
        empty.latest(pytest.fail)
    assert empty.newest_path() is None


def test_what_a_crash_left_is_not_seen_and_cleared_away(tmp_path: Path) -> None:
    store(tmp_path, 1)
    for left in (".epoch-000002.tmp", ".epoch-000001.old", ".epoch-000000.gone"):
        shutil.copytree(tmp_path / "epoch-000001", tmp_path / left)
    kept = CheckpointStore(tmp_path, 3)
    assert names(tmp_path) == ["epoch-000001"] and loaded(kept) == ("epoch-000001", [1.0] * 4)
    (tmp_path / ".epoch-000002.tmp" / "state").mkdir(parents=True)
    (tmp_path / ".epoch-000002.tmp" / "state" / "__7_0.distcp").write_text("of another world")
    save(kept, 2)
    assert names(tmp_path) == ["epoch-000001", "epoch-000002"]
    assert names(tmp_path / "epoch-000002" / "state") == [".metadata", "__0_0.distcp"]


def test_saving_an_epoch_again_replaces_it(tmp_path: Path) -> None:
    kept = store(tmp_path, 2)
    save(kept, 2, fill=7.0)
    assert loaded(kept) == ("epoch-000002", [7.0] * 4) and names(tmp_path) == ["epoch-000001", "epoch-000002"]
    # killed between the two renames, with the new one whole and with the new one gone
    (tmp_path / "epoch-000002").rename(tmp_path / ".epoch-000002.old")
    shutil.copytree(tmp_path / "epoch-000001", tmp_path / ".epoch-000002.tmp")
    (tmp_path / ".epoch-000002.tmp" / "manifest.json").unlink()
    assert loaded(kept) == ("epoch-000002", [7.0] * 4)
    assert names(tmp_path) == ["epoch-000001", "epoch-000002"]


def test_a_damaged_later_checkpoint_displaces_none(tmp_path: Path) -> None:
    """After going back behind a damaged one, what is saved before it comes round again is kept."""
    kept = store(tmp_path, 3, keep=1)
    flip(tmp_path / "epoch-000003" / "manifest.json", 3)
    save(kept, 2)
    assert kept.latest(lambda text: None)[0].name == "epoch-000002"
    save(kept, 3)
    assert names(tmp_path) == ["epoch-000003"] and loaded(kept) == ("epoch-000003", [3.0] * 4)


def test_epochs_are_ordered_as_numbers(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, 2)
    for epoch in (999_999, 1_000_000, 1_000_001):
        save(kept, epoch)
    assert names(tmp_path) == ["epoch-1000000", "epoch-1000001"] and loaded(kept)[0] == "epoch-1000001"


# --- what cannot be written or read ---


@contextmanager
def small_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_the_ones_before(tmp_path: Path) -> None:
    kept = store(tmp_path, 1)
    large = {"w": torch.zeros(1_000_000)}
    with small_disk():
        kept.save(2, large, {"epoch": 2}, nothing)
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/epoch-000002 could not be written.*File too large"):
            kept.finish()
    assert names(tmp_path) == ["epoch-000001"] and loaded(kept) == ("epoch-000001", [1.0] * 4)
    kept.finish()  # said once
    save(kept, 2)
    assert loaded(kept) == ("epoch-000002", [2.0] * 4)


def test_the_next_save_reports_one_that_failed_unseen(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, 3)
    with small_disk():
        kept.save(1, {"w": torch.zeros(1_000_000)}, {"epoch": 1}, nothing)
        with pytest.raises(CheckpointError, match="epoch-000001 could not be written"):
            save(kept, 2)


def test_an_extra_that_cannot_be_written_leaves_the_ones_before(tmp_path: Path) -> None:
    kept = store(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match=r"epoch-000002 could not be written.*OSError: disk full"):
        kept.save(2, {"w": torch.zeros(4)}, {"epoch": 2}, full)
    assert names(tmp_path) == ["epoch-000001"] and loaded(kept) == ("epoch-000001", [1.0] * 4)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = CheckpointStore(tmp_path / "file" / "checkpoints", 3)
    with pytest.raises(CheckpointError, match=r"file/checkpoints/epoch-000001 could not be written.*NotADirectory"):
        save(kept, 1)


def test_values_that_json_cannot_hold_are_refused_at_once(tmp_path: Path) -> None:
    kept = CheckpointStore(tmp_path, 3)
    with pytest.raises(TypeError, match="JSON"):
        kept.save(1, {"w": torch.zeros(1)}, {"generator": torch.Generator()}, nothing)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"w": torch.zeros(4), "v": torch.zeros(4)}, "no tensor 'v' in it, one of 1"),
        ({}, "this run has no tensor 'w', one of 1"),
        ({"w": torch.zeros(5)}, r"tensor 'w' is torch.float32 \(4,\) in it and torch.float32 \(5,\) in this run"),
        ({"w": torch.zeros(4, dtype=torch.bfloat16)}, r"and torch.bfloat16 \(4,\) in this run"),
        ({"w": torch.zeros(4, device="meta")}, "meta device"),
    ],
)
def test_other_tensors_are_an_error_that_names_the_first(
    tmp_path: Path, tensors: dict[str, torch.Tensor], expected: str
) -> None:
    kept = store(tmp_path, 1)
    with pytest.raises(CheckpointError, match=expected):
        kept.load(tmp_path / "epoch-000001", tensors)
    assert all(tensor.is_meta or not tensor.any() for tensor in tensors.values())


# --- several processes ---


def run(job: str, processes: int, folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), job, str(rank), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:  # one that hangs does not outlive the test
            process.kill()
    files = [folder / f"{job}{rank}.json" for rank in range(processes)]
    assert all(file.exists() for file in files), "\n".join(errors)
    return [json.loads(file.read_text()) for file in files], [process.returncode for process in started]


def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path: Path) -> None:
    """To the bit, sharded or not, although the state was overwritten while the files were written."""
    answers, codes = run("worlds", 4, tmp_path)
    assert codes == [0] * 4
    for rank, answer in enumerate(answers):
        sizes = [size for size in (1, 2, 4) if rank < size]
        # the caller's messages and those of the save did not meet
        assert answer["sums"] == {str(size): [size * turn for turn in range(20)] for size in sizes}
        ways = [f"{by} to {size} {way}" for by in (1, 2, 4) for size in sizes for way in ("plain", "sharded")]
        expected = {way: ["epoch-000003", {"epoch": 3, "nested": {"mean": 0.1}}, []] for way in ways}
        assert answer["loaded"] == {way: found for way, found in expected.items() if "to 1 sharded" not in way}
    for by in (1, 2, 4):
        files = names(tmp_path / f"by{by}" / "epoch-000003" / "state")
        assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(by))]


def test_a_rank_that_fails_fails_all_and_loses_nothing(tmp_path: Path) -> None:
    (first, second), codes = run("failures", 2, tmp_path)
    assert codes == [0, -9]  # the second is killed at the end
    for answer in (first, second):
        assert "epoch-000002 could not be written" in answer["full disk"]
        assert "(rank 1: OSError: [Errno 27] File too large)" in answer["full disk"]
        assert answer["after a full disk"] == ["epoch-000001", 1, [1.0], []]
        assert "(rank 0: OSError: no room for the adapter)" in answer["extra"]
        assert answer["after extra"] == ["epoch-000001"]
        assert answer["again"] == ["epoch-000002", 2, [2.0], []]
        assert "(rank 1: no tensor 'x' in it" in answer["other names on one rank"]
        assert answer["damaged"][:3] == ["epoch-000001", 1, [1.0]]
        assert "put run.dir on a file system that all ranks share" in answer["not shared"]
    assert len(first["damaged"][3]) == 1 and "__1_0.distcp does not match its checksum" in first["damaged"][3][0]
    assert second["damaged"][3] == []  # it is said once
    assert first["killed"].startswith("rank 0 lost the others at a checkpoint")
    assert first["after the kill"] == ["epoch-000001", 1, [1.0]] and first["left over"] == []


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    (answer,), codes = run("crashes", 1, tmp_path)
    assert codes == [0]
    for found in answer["steps"] + answer["moments"]:
        epoch, attempt = found["values"]
        assert found["name"] == f"epoch-{epoch:06d}" and found["tensors"] == [[epoch], [attempt]]
        assert found["said"] == found["problems"] == []  # nothing half was ever visible
        assert all(name.startswith("epoch-") for name in found["names"])
    steps = [found["values"] for found in answer["steps"]]
    assert steps == sorted(steps) and steps[0] == [2, 0] and steps[-1] == [2, 1]
    assert len(steps) > 20 and [found["finished"] for found in answer["steps"]].index(True) == len(steps) - 1
    assert len(answer["moments"]) == 12
    for found in answer["moments"]:
        assert found["values"] >= found["told"]  # what a save said to be there is there
