"""`crd-fast didr --beta`: its runs and files, continuing, failures, several ranks, and wrong input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from crd_fast.didr import trainer as trainer_module
from crd_fast.evaluation.plots import score
from tests.didr.tiny import ADAPTER, didr, make_world, rows
from tests.evaluation.report_text import visible_text

ROOT = Path(__file__).parents[2]
FAST = ("train.epochs=1", "evaluation.images=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world")) / "sd3.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two betas, with overrides where the command line has them: after the values."""
    folder = tmp_path_factory.mktemp("sweep") / "of-two"
    didr(recipe, "--beta", "0.05", "0.2", f"run.dir={folder}", *FAST)
    return folder


def sweep_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def setting(run: Path, name: str) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text())["algorithm"][name]


def test_each_beta_is_a_run_of_its_own(finished: Path, recipe: Path, tmp_path: Path) -> None:
    runs = {beta: finished / f"diffused-beta-{beta}" for beta in ("0.05", "0.2")}
    for beta, run in runs.items():
        assert setting(run, "beta") == float(beta)
        assert (run / ADAPTER).is_file() and (run / "report.html").is_file()
    assert (runs["0.05"] / ADAPTER).read_bytes() != (runs["0.2"] / ADAPTER).read_bytes()
    alone = tmp_path / "alone"
    didr(recipe, f"run.dir={alone}", "algorithm.beta=0.2", *FAST)
    assert rows(runs["0.2"]) == rows(alone), "the run before it leaves no trace"
    assert (runs["0.2"] / ADAPTER).read_bytes() == (alone / ADAPTER).read_bytes()


def test_the_contract_of_sweep_json(finished: Path) -> None:
    found = sweep_file(finished)
    assert (found["name"], found["reward"], found["score"], found["runs"]) == ("sd3", "clipscore", "clipscore", 2)
    assert found["failed"] == []
    for row, beta in zip(found["rows"], (0.05, 0.2), strict=True):
        assert (row["reward_at"], row["beta"], row["seed"]) == ("diffused", beta, 0)
        summary = json.loads((finished / row["folder"] / "summary.json").read_text())
        timing = json.loads((finished / row["folder"] / "timing.json").read_text())
        assert all(row[side] == summary[side] for side in ("before", "after", "reference"))
        assert row["minutes"] == timing["train_minutes"] > 0


def test_the_page_links_to_pages_that_are_there(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    text = visible_text(page)
    for row in sweep_file(finished)["rows"]:
        assert f'<a href="{row["folder"]}/report.html">' in page
        assert (finished / row["folder"] / "report.html").is_file()
        assert f"{row['folder']} diffused {row['beta']:g} {score(row['after']['clipscore'])}" in text
    assert "2 of 2 runs" in text


def test_every_way_to_use_the_reward(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    didr(recipe, "--beta", "0.1", "--reward-at", "endpoint", "diffused", f"run.dir={folder}", *FAST)
    out = capsys.readouterr().out
    assert "run 1 of 2: endpoint-beta-0.1" in out and "run 2 of 2: diffused-beta-0.1" in out
    assert [row["reward_at"] for row in sweep_file(folder)["rows"]] == ["diffused", "endpoint"]
    adapters = {at: (folder / f"{at}-beta-0.1" / ADAPTER).read_bytes() for at in ("diffused", "endpoint")}
    assert adapters["diffused"] != adapters["endpoint"]
    assert setting(folder / "endpoint-beta-0.1", "reward_at") == "endpoint"


# --- stopping and continuing ---


def test_resuming_skips_continues_and_adds(
    recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes in the second run's second epoch."""
    folder, draw_step = tmp_path / "sweep", trainer_module.draw_step

    def interrupted(recipe_: Any, *arguments: Any) -> Any:
        if recipe_.algorithm.beta == 0.2 and arguments[2] == 7:  # the number of the step
            os.kill(os.getpid(), signal.SIGTERM)
        return draw_step(recipe_, *arguments)

    monkeypatch.setattr(trainer_module, "draw_step", interrupted)
    settings = (f"run.dir={folder}", "evaluation.images=2")
    didr(recipe, "--beta", "0.05", "0.2", *settings)
    assert "continue with --resume run.dir=" in capsys.readouterr().out
    assert [row["beta"] for row in sweep_file(folder)["rows"]] == [0.05] and sweep_file(folder)["runs"] == 2
    assert "Unfinished sweep. 1 of 2 runs" in visible_text((folder / "report.html").read_text(encoding="utf-8"))
    first = folder / "diffused-beta-0.05"
    untouched = {name: (first / name).stat().st_mtime_ns for name in ("metrics.jsonl", "summary.json", ADAPTER)}
    monkeypatch.setattr(trainer_module, "draw_step", draw_step)

    didr(recipe, "--beta", "0.05", "0.2", *settings, "--resume")
    out = capsys.readouterr().out
    assert "run 1 of 2: diffused-beta-0.05, finished already" in out
    assert "run 2 of 2: diffused-beta-0.2, continued" in out and "resumed from epoch-000001" in out
    assert untouched == {name: (first / name).stat().st_mtime_ns for name in untouched}
    assert rows(folder / "diffused-beta-0.2")[:1] == rows(finished / "diffused-beta-0.2")
    assert [row["epoch"] for row in rows(folder / "diffused-beta-0.2")] == [0, 1]
    assert [row["beta"] for row in sweep_file(folder)["rows"]] == [0.05, 0.2]

    didr(recipe, "--beta", "0.1", *settings, "train.epochs=1", "--resume")
    assert [row["beta"] for row in sweep_file(folder)["rows"]] == [0.05, 0.1, 0.2]
    assert sweep_file(folder)["runs"] == 3


def test_more_epochs_continue_a_finished_run(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    didr(recipe, "--beta", "0.1", f"run.dir={folder}", *FAST)
    didr(recipe, "--beta", "0.1", f"run.dir={folder}", "evaluation.images=2", "--resume")
    assert len(rows(folder / "diffused-beta-0.1")) == 2


def test_all_runs_are_moved_back_towards_their_start_alike(
    recipe: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished ones too, and none is left behind where the others are: the page compares them."""
    folder = tmp_path / "sweep"
    shutil.copytree(finished, folder)
    settings = (f"run.dir={folder}", *FAST, "train.towards_start=0.5", "--resume")
    didr(recipe, "--beta", "0.05", *settings, code=2)
    assert "diffused-beta-0.2 of this sweep ended with other train.epochs" in capsys.readouterr().err
    didr(recipe, "--beta", "0.05", "0.2", *settings)
    assert capsys.readouterr().out.count(", continued") == 2
    for run in ("diffused-beta-0.05", "diffused-beta-0.2"):
        assert rows(folder / run) == rows(finished / run)
        moved, whole = load_file(folder / run / ADAPTER), load_file(finished / run / ADAPTER)
        for name, tensor in whole.items():
            assert torch.equal(moved[name], tensor / 2 if ".lora_B." in name else tensor), name
    didr(recipe, "--beta", "0.05", *settings)
    assert "diffused-beta-0.05, finished already" in capsys.readouterr().out


def test_a_run_that_fails_does_not_end_the_others(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A beta so small that the reward's score overflows."""
    folder = tmp_path / "sweep"
    didr(recipe, "--beta", "1e-45", "0.1", f"run.dir={folder}", *FAST, "train.max_skipped=1", code=2)
    assert "1 of 2 runs failed (diffused-beta-1e-45); the others are done" in capsys.readouterr().err
    found = sweep_file(folder)
    assert [row["beta"] for row in found["rows"]] == [0.1]
    assert [row["folder"] for row in found["failed"]] == ["diffused-beta-1e-45"]
    assert "not finite" in found["failed"][0]["reason"]
    assert "not finite" in visible_text((folder / "report.html").read_text(encoding="utf-8"))


def test_two_ranks_make_the_runs_that_one_makes(recipe: Path, finished: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    folder = tmp_path / "sweep"
    arguments = ["didr", str(recipe), "--beta", "0.05", "0.2", f"run.dir={folder}", *FAST]
    worker = ["tests/training/rank_worker.py", json.dumps([arguments]), str(port)]
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *worker],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert job.returncode == 0, job.stdout
    assert job.stdout.count("run 2 of 2") == 1, "one rank speaks"
    for row, alone in zip(sweep_file(folder)["rows"], sweep_file(finished)["rows"], strict=True):
        assert row["folder"] == alone["folder"]
        for side in ("before", "after", "reference"):
            assert row[side]["clipscore"] == pytest.approx(alone[side]["clipscore"], abs=1e-3)


# --- wrong input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "0.1", "-1", "0"], "--beta is -1.0, 0.0: expected one or more numbers > 0"),
        (["--beta", "nan"], "--beta is nan: expected one or more numbers > 0"),
        (["--beta", "small"], "--beta 'small': expected a number > 0"),
        (["--beta", "0.1", "1e-1"], "--beta has 0.1 more than once"),
        (["--beta", "train.lr=1"], "--beta: expected one or more values, got only overrides"),
        (["--beta", "0.1", "--reward-at", "endpoint", "endpoint"], "--reward-at has endpoint more than once"),
        (["--beta", "0.1", "--reward-at", "endpont"], "did you mean 'endpoint'"),
        (["--reward-at", "endpoint"], "--reward-at belongs to a sweep, with --beta"),
        (["--beta", "0.1", "algorithm.beta=0.2"], "--beta and algorithm.beta=... both say what it is"),
        (["--beta", "0.1", "reward=null"], "--beta sets how much a reward counts, and the recipe has none"),
        (["--beta", "0.1", "algorithm.gidance_scale=2"], "did you mean 'guidance_scale'"),
    ],
)
def test_wrong_input_is_named(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    didr(recipe, f"run.dir={folder}", *arguments, code=2)
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_directories_that_hold_something_else(
    recipe: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        didr(recipe, *arguments, *FAST, code=2)
        return capsys.readouterr().err

    run, beta = finished / "diffused-beta-0.2", ("--beta", "0.05", "0.2")
    before = (finished / "sweep.json").read_bytes()
    assert "already holds a run: add --resume to continue it" in refused(*beta, f"run.dir={finished}")
    assert "holds a run, not a sweep: continue it without --beta" in refused(*beta, f"run.dir={run}", "--resume")
    assert "holds a sweep, not a run: continue it with --beta" in refused(f"run.dir={finished}", "--resume")
    assert "holds no run" in refused(*beta, f"run.dir={tmp_path / 'empty'}", "--resume")
    assert "train.lr was 0.01, now 0.5" in refused(*beta, f"run.dir={finished}", "--resume", "train.lr=0.5")
    taken = tmp_path / "taken"
    (taken / "diffused-beta-0.2").mkdir(parents=True)
    (taken / "diffused-beta-0.2" / "config.yaml").write_text("")
    assert "diffused-beta-0.2 already holds a run: name another run.dir" in refused(*beta, f"run.dir={taken}")
    assert not (taken / "diffused-beta-0.05").exists() and (finished / "sweep.json").read_bytes() == before
