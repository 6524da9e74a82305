"""Metrics in Weights & Biases, written by the library itself in its offline mode."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from crd_fast import cli
from tests.pipelines import sd3


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "train.txt").write_text("2 squares\n3 squares\n")
    tree = {
        "model": {"path": str(sd3.save(tmp_path / "pipeline")), "max_sequence_length": 1},
        "data": {"prompts": str(tmp_path / "train.txt")},
        "rewards": {"jpeg_compressibility": {"weight": 1}},
        "algorithm": {"guidance_scale": 2.0},
        "lora": {"rank": 2, "alpha": 4},
        "rollout": {"steps": 2, "batch": 4},
        "train": {"epochs": 2, "groups": 2, "group_size": 2, "micro_batch": 2, "updates": 1, "timesteps": 1}
        | {"timestep_strategy": "uniform", "checkpoint_every": 1},
        "precision": {"dtype": "fp32"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def stored(content: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log with a header of 7 bytes: blocks of 32 KiB, which cut long entries into pieces."""
    place, entry = 7, b""
    while place < len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])  # checksum; whole, first, middle, last
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""


def logged(run: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What wandb's own files of a run directory hold: the run, and the rows of all starts."""
    from wandb.proto import wandb_internal_pb2

    about: dict[str, Any] = {}
    rows = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in stored(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                about = {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                about["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return about, rows


def test_a_run_and_its_continuation_are_one_run_with_the_numbers_of_its_metrics(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", str(recipe), f"run.dir={run}", "run.wandb=pictures"]
    assert cli.main([*words, "train.epochs=1"]) == 0
    first, _ = logged(run)
    assert cli.main([*words, "--resume"]) == 0
    about, rows = logged(run)
    assert about["id"] == first["id"] == json.loads((run / "wandb.json").read_text())["id"]
    assert (first["project"], first["name"]) == ("pictures", "run")
    assert first["config"]["train"]["group_size"] == 2
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    for row, expected in zip(rows, written, strict=True):
        assert row["loss"] == expected["loss"] and row["grad_norm"] == expected["grad_norm"]
        assert row["reward/jpeg_compressibility"] == expected["reward"]["jpeg_compressibility"]


def test_without_the_library_a_run_that_asks_for_it_does_not_begin(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tmp_path / "run"
    assert cli.main(["train", str(recipe), f"run.dir={run}", "run.wandb=pictures"]) == 2
    assert "run.wandb is 'pictures', which needs pip install \"crd-fast[wandb]\"" in capsys.readouterr().err
    assert not (run / "metrics.jsonl").exists()


def test_nobody_else_needs_it(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", str(recipe), f"run.dir={tmp_path / 'run'}", "train.epochs=1"]) == 0
    assert not (tmp_path / "run" / "wandb.json").exists()


def test_what_goes_wrong_there_later_is_told_and_costs_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def broken(*arguments: Any, **options: Any) -> None:
        raise wandb.Error("the service is gone")

    monkeypatch.setattr(wandb.Run, "log", broken)
    run = tmp_path / "run"
    assert cli.main(["train", str(recipe), f"run.dir={run}", "run.wandb=pictures"]) == 0
    assert "wandb: Error: the service is gone" in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 and (run / "lora").is_dir()


def test_a_run_that_fails_is_a_failed_one(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    codes = []
    finish = wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda run, exit_code: (codes.append(exit_code), finish(run, exit_code)))
    words = ["train", str(recipe), "run.wandb=pictures"]
    assert cli.main([*words, f"run.dir={tmp_path / 'good'}"]) == 0
    assert cli.main([*words, f"run.dir={tmp_path / 'bad'}", "train.lr=1e30", "train.max_skipped=1"]) == 2
    assert codes == [0, 1]
