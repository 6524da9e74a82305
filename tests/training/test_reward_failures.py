"""Rewards that fail while a run trains, with a real server: the run stops and says why, or leaves samples out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from crd_fast import cli
from tests.pipelines import sd3
from tests.rewards.remote.servers import Served, faulty_server
from tests.training.test_ranks import free_ports, launch

GROUPS, SIZE = 2, 4


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with faulty_server() as running:
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    entries = [
        {"prompt": f"{n} squares", "tag": "counting", "include": [{"class": "square", "count": n}]} for n in (2, 3)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    tree = {
        "model": {"path": str(sd3.save(folder / "pipeline")), "max_sequence_length": 1},
        "data": {"prompts": str(folder / "train.jsonl")},
        "rewards": {"jpeg_compressibility": {"weight": 0}},
        "algorithm": {"guidance_scale": 2.0},
        "lora": {"rank": 2, "alpha": 4},
        "rollout": {"steps": 2, "batch": SIZE},
        "train": {"epochs": 2, "groups": GROUPS, "group_size": SIZE, "micro_batch": 4, "updates": 2, "timesteps": 1}
        | {"timestep_strategy": "uniform", "checkpoint_every": 1, "timeout_minutes": 1, "lr": 1e-2},
        "precision": {"dtype": "fp32"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def arguments(
    recipe: Path, run: Path, server: Served, fault: str, on_error: str = "raise", **options: Any
) -> list[str]:
    remote = {"url": f"{server.url}/{fault}", "reward": "good", "batch": SIZE, "concurrency": 1, "on_error": on_error}
    return ["train", str(recipe), f"run.dir={run}", f"rewards.remote={json.dumps(remote | options)}"]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_failed_item_stops_the_run_by_default(
    recipe: Path, tmp_path: Path, server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(recipe, tmp_path / "run", server, "item")) == 2
    message = capsys.readouterr().err
    assert "reward 'remote' failed at item 2, prompt" in message and "this one is no sign" in message


def test_a_masked_item_counts_nowhere_and_is_counted(recipe: Path, tmp_path: Path, server: Served) -> None:
    assert cli.main(arguments(recipe, tmp_path / "run", server, "item", "mask")) == 0
    for row in rows(tmp_path / "run"):
        # the third of every four: one of each group
        assert row["reward_failed"] == {"remote": GROUPS} and row["masked_samples"] == GROUPS
        assert row["samples"] == SIZE - 1
        assert row["reward"]["remote"] == pytest.approx((0.25 + 1.25 + 3.25) / 3)
        assert row["skipped_steps"] == 0 and row["grad_norm"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "masked" in page


def test_a_batch_that_fails_as_a_whole_drops_its_group(recipe: Path, tmp_path: Path, server: Served) -> None:
    run = tmp_path / "run"
    assert cli.main([*arguments(recipe, run, server, "second_400", "mask"), "train.epochs=1"]) == 0
    (row,) = rows(run)
    assert row["masked_samples"] == SIZE and row["reward_failed"] == {"remote": SIZE}
    assert row["skipped_steps"] == 0  # the update of the group that is left was taken, the other's gradient is zero


def test_no_sample_left_is_an_error_not_a_zero(
    recipe: Path, tmp_path: Path, server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(recipe, tmp_path / "run", server, "error_400", "mask")) == 2
    assert "no sample is left of 8: rewards failed at" in capsys.readouterr().err


def test_a_server_that_is_silent_stops_the_run_in_time(
    recipe: Path, tmp_path: Path, server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert cli.main(arguments(recipe, tmp_path / "run", server, "silent", timeout_seconds=2)) == 2
    assert time.monotonic() - began < 40
    assert "reward 'remote'" in capsys.readouterr().err


def test_a_missing_model_ends_the_run_before_it_begins(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = f"rewards.clipscore={json.dumps({'model': str(tmp_path / 'nothing'), 'on_error': 'mask'})}"
    assert cli.main(["train", str(recipe), f"run.dir={tmp_path / 'run'}", reward]) == 2
    message = capsys.readouterr().err
    assert "reward 'clipscore' failed" in message and "nothing" in message and "hf download" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_two_ranks_fail_together_when_the_reward_of_one_fails(recipe: Path, tmp_path: Path, server: Served) -> None:
    command = [*arguments(recipe, tmp_path / "run", server, "second_422"), "train.micro_batch=2"]
    began = time.monotonic()
    job = launch(2, ["tests/training/rank_worker.py", json.dumps([command]), *map(str, free_ports(1))])
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert time.monotonic() - began < 60  # the ranks' own limit, which nobody waited for
    assert "a bad second request" in output and "reward 'remote' failed at item 0" in output
    assert "failed while scoring the rollout" in output  # what the other rank says
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or rows(tmp_path / "run") == []


def test_two_ranks_mask_what_one_rank_masks(recipe: Path, tmp_path: Path, server: Served) -> None:
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert cli.main(arguments(recipe, alone, server, "item", "mask")) == 0
    command = [*arguments(recipe, spread, server, "item", "mask"), "train.micro_batch=2"]
    job = launch(2, ["tests/training/rank_worker.py", json.dumps([command]), *map(str, free_ports(1))])
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    for one, two in zip(rows(alone), rows(spread), strict=True):
        assert two["masked_samples"] == one["masked_samples"] == GROUPS
        for name in ("loss", "kl", "grad_norm", "samples", "theta_mse", "reward_mapped_std"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
