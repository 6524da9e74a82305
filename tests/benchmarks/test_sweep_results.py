"""A sweep's results as a file and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import sweep_results
from tests.benchmarks.test_collect import finished

SIDES = {
    "before": {"geneval_strict": 0.25, "frechet": 0.004},
    "reference": {"geneval_strict": 0.5, "frechet": 0.002},
}


def swept(folder: Path, runs: int = 3) -> Path:
    """A sweep of three runs, of which `runs` were wanted."""
    folder.mkdir()
    rows = []
    for number, (kind, beta) in enumerate((("diffused", 0.001), ("diffused", 0.01), ("endpoint", 0.1))):
        name = f"{kind}-beta-{beta}"
        finished(folder / name, number)
        after = {"geneval_strict": 0.5 - beta, "frechet": 0.003 + number / 1000}
        rows.append({"folder": name, "reward_at": kind, "beta": beta, "after": after, **SIDES})
    sweep = {
        "name": "shapes",
        "reward": "shapes_judge",
        "score": "geneval_strict",
        "runs": runs,
        "rows": rows,
        "failed": [],
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def test_runs_are_kept_with_what_they_were_run_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "sweep"
    assert sweep_results.main([str(swept(tmp_path / "sweep")), "--out", str(out)]) == 0
    kept = json.loads(out.with_suffix(".json").read_text())
    assert kept["score"] == "geneval_strict"
    assert [(run["reward_at"], run["beta"]) for run in kept["runs"]] == [
        ("diffused", 0.001),
        ("diffused", 0.01),
        ("endpoint", 0.1),
    ]
    assert kept["runs"][2]["summary"]["seed"] == 2 and kept["runs"][2]["environment"]["threads"] == 2
    with Image.open(out.with_suffix(".png")) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50  # axes, lines and letters, not an empty page
    assert "run.seed=1: 3.5 minutes" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [str(swept(tmp_path / "a", runs=4)), "--out", str(out)]
    assert sweep_results.main(arguments) == 2
    assert "3 of 4 runs have been evaluated: continue the sweep with --resume" in capsys.readouterr().err

    folder = swept(tmp_path / "b")
    (folder / "endpoint-beta-0.1" / "summary.json").unlink()
    assert sweep_results.main([str(folder), "--out", str(out)]) == 2
    assert "endpoint-beta-0.1 holds no finished run: summary.json is missing" in capsys.readouterr().err

    # no suite, and a suite with too few images for a distance
    for name, old, new in (("c", '"frechet"', '"distance"'), ("d", "0.003}", "null}"), ("e", "0.004", "null")):
        folder = swept(tmp_path / name)
        file = folder / "sweep.json"
        changed = file.read_text().replace(old, new)
        assert changed != file.read_text()
        file.write_text(changed)
        assert sweep_results.main([str(folder), "--out", str(out)]) == 2
        assert "no Fréchet distance: set evaluation.suite" in capsys.readouterr().err
    assert not out.with_suffix(".json").exists() and not out.with_suffix(".png").exists()
