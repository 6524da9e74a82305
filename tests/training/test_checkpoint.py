from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crd_fast.errors import CheckpointError
from crd_fast.training.checkpoint import CheckpointStore


def store(path: Path, epochs: int, keep: int = 3) -> CheckpointStore:
    made = CheckpointStore(path, keep)
    for epoch in range(1, epochs + 1):
        made.save(epoch, {"epoch": epoch, "w": torch.full((4,), float(epoch))})
    return made


def test_keeps_the_last_few_and_loads_the_newest(tmp_path: Path) -> None:
    kept = store(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_000003", "epoch_000004", "epoch_000005"]
    path, state = kept.latest(pytest.fail)
    assert path.name == "epoch_000005" and state["w"].tolist() == [5.0] * 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "no_state", "no_manifest", "bad_manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    kept = store(tmp_path, 2)
    state, manifest = tmp_path / "epoch_000002" / "state.pt", tmp_path / "epoch_000002" / "manifest.json"
    content = bytearray(state.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "truncate":
        state.write_bytes(content[:100])
    elif damage == "no_state":
        state.unlink()
    elif damage == "no_manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    said: list[str] = []
    path, loaded = kept.latest(said.append)
    assert path.name == "epoch_000001" and loaded["epoch"] == 1
    assert len(said) == 1 and "epoch_000002 is damaged" in said[0]


def test_none_usable_is_an_error_that_counts(tmp_path: Path) -> None:
    kept = store(tmp_path, 1)
    (tmp_path / "epoch_000001" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found 1 damaged \(epoch_000001\)"):
        kept.latest(lambda text: None)
    with pytest.raises(CheckpointError, match="found none"):
        CheckpointStore(tmp_path / "empty", 3).latest(pytest.fail)


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    kept = store(tmp_path, 1)

    def crash(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        kept.save(2, {"epoch": 2}, crash)
    assert kept.latest(pytest.fail)[0].name == "epoch_000001"
    kept.save(2, {"epoch": 2})
    assert kept.latest(pytest.fail)[0].name == "epoch_000002"
    assert not list(tmp_path.glob(".epoch*"))


def test_saving_an_epoch_again_replaces_it_and_survives_a_crash_in_between(tmp_path: Path) -> None:
    kept = store(tmp_path, 2)
    kept.save(2, {"epoch": 2, "w": torch.zeros(1)})
    assert kept.latest(pytest.fail)[1]["w"].tolist() == [0.0]
    (tmp_path / "epoch_000002").rename(tmp_path / ".epoch_000002.old")  # killed between the two renames
    assert kept.latest(pytest.fail)[0].name == "epoch_000002"
