"""Results of several runs in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import collect


def finished(folder: Path, seed: int) -> Path:
    folder.mkdir()
    after = {"geneval_strict": 0.5 + seed / 8, "n": 12, "tasks": {}}
    for name, values in (
        ("environment", {"command": f"crd-fast didr shapes run.seed={seed}", "threads": 2}),
        ("summary", {"seed": seed, "before": {"geneval_strict": 0.25}, "after": after}),
        ("timing", {"train_minutes": 3.5}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_runs_are_kept_whole_and_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(finished(tmp_path / name, seed)) for name, seed in (("b", 2), ("a", 1))]
    assert collect.main([*folders, "--out", str(tmp_path / "new" / "runs.json")]) == 0
    kept = json.loads((tmp_path / "new" / "runs.json").read_text())["runs"]
    assert [run["summary"]["seed"] for run in kept] == [2, 1]
    assert kept[0]["environment"]["threads"] == 2 and kept[0]["timing"] == {"train_minutes": 3.5}
    told = capsys.readouterr().out
    assert "run.seed=2: 3.5 minutes" in told and "after     geneval_strict 0.7500\n" in told


def test_a_run_that_has_not_finished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [finished(tmp_path / "a", 1), finished(tmp_path / "b", 2)]
    (folders[1] / "summary.json").unlink()
    assert collect.main([*map(str, folders), "--out", str(tmp_path / "runs.json")]) == 2
    assert f"{folders[1]} holds no finished run: summary.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "runs.json").exists()
