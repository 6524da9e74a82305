"""Two ranks through the real command give what one rank gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from crd_fast import cli
from crd_fast.didr.networks import GENERATOR
from tests.didr.tiny import PROMPTS, make_recipe, make_trainer, recipe_tree, save_pipeline, scramble
from tests.rewards.clip_models import save_clip

ROOT = Path(__file__).parents[2]
ADAPTER = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_clip(folder / "clip")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    pipeline = save_pipeline("sd3", folder / "pipeline")
    settings = {"epochs": 1, "steps": 2, "batch": 4, "micro_batch": 4, "ta_warmup": 1, "timeout_minutes": 2}
    tree = recipe_tree("sd3", pipeline, folder / "prompts.txt", **settings)
    # a generator of its own: where the scores are nearly equal, their difference is rounding, which Adam enlarges
    trainer = make_trainer(make_recipe("sd3", pipeline))
    scramble(trainer, GENERATOR)
    trainer.networks.own.save(trainer.networks.origin, folder / "start", GENERATOR)
    tree["generator"]["lora"] = str(folder / "start")
    tree["reward"] = {"name": "clipscore", "options": {"model": str(folder / "clip")}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def launch(arguments: list[str]) -> str:
    """Two ranks of the command; their output."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
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
    return job.stdout


def result(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter and the last row of metrics."""
    return load_file(run / ADAPTER), json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_two_ranks_train_what_one_rank_trains(recipe: Path, tmp_path: Path) -> None:
    assert cli.main(["didr", str(recipe), f"run.dir={tmp_path / 'alone'}"]) == 0
    output = launch(["didr", str(recipe), f"run.dir={tmp_path / 'spread'}", "train.micro_batch=1"])
    assert output.count("run directory") == 1, "one rank speaks"
    expected, row = result(tmp_path / "alone")
    got, spread_row = result(tmp_path / "spread")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)
    assert (row["step"], row["ta_step"]) == (spread_row["step"], spread_row["ta_step"]) == (1, 3)
    for name in ("ta_loss", "ta_loss_before", "ta_loss_after", "generator_loss", "gap", "correction"):
        assert spread_row[name] == pytest.approx(row[name], rel=1e-3), name
    for name in ("reward", "grad_norm"):
        assert spread_row[name] == pytest.approx(row[name], rel=1e-3), name
    evaluations = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("alone", "spread")]
    for side in ("before", "reference", "after"):
        assert evaluations[1][side]["n"] == 4
        assert evaluations[1][side]["clipscore"] == pytest.approx(evaluations[0][side]["clipscore"], abs=5e-3)
