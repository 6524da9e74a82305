"""Two and four ranks through the real command give what one rank gives: adapters, full models, sharded or not."""

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
from tests.pipelines import sd3

ROOT = Path(__file__).parents[2]
MODES = {
    "lora": [],
    "lora_sharded": ["train.sharding=fsdp"],
    "full": ["train.parameters=full", "train.lr=1e-3"],
    "full_sharded": ["train.parameters=full", "train.lr=1e-3", "train.sharding=fsdp"],
    "full_hybrid": ["train.parameters=full", "train.lr=1e-3", "train.sharding=hsdp"],
    "lora_parts": ["train.micro_batch=1"],  # of two ranks: half a group in a micro-step
    "full_sharded_parts": ["train.micro_batch=1", "train.parameters=full", "train.lr=1e-3", "train.sharding=fsdp"],
}
FP8 = ["train.parameters=full", "train.lr=1e-3", *(f"precision.{role}=fp8" for role in ("train", "old", "ref"))]
SAMPLES = 4  # of a micro-step, on all ranks together


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    pipeline = sd3.save(folder / "pipeline")
    (folder / "train.txt").write_text("2 squares\n3 squares\n")
    tree = {
        "model": {"path": str(pipeline), "max_sequence_length": 1},
        "data": {"prompts": str(folder / "train.txt")},
        "rewards": {"jpeg_compressibility": {"weight": 1}},
        "algorithm": {"guidance_scale": 2.0, "kl_fraction": 1.0},
        "lora": {"rank": 2, "alpha": 4},
        "rollout": {"steps": 2, "batch": 2},
        "train": {"epochs": 1, "groups": 3, "group_size": 4, "micro_batch": SAMPLES, "updates": 3, "timesteps": 1}
        | {"timestep_strategy": "uniform", "checkpoint_every": 1, "timeout_minutes": 2, "lr": 1e-2},
        "precision": {"dtype": "fp32"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def launch(world: int, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def result(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The trained tensors and the row of metrics."""
    folder = next(run / name for name in ("lora", "transformer") if (run / name).is_dir())
    (file,) = folder.glob("*.safetensors")
    return load_file(file), json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for mode in ("lora", "full"):
        assert cli.main(["train", str(recipe), f"run.dir={folder / mode}", *MODES[mode]]) == 0
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def spread(request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All modes one after another in one job: a run joins its group and leaves it."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    batch = f"train.micro_batch={SAMPLES // request.param}"
    runs = [["train", str(recipe), f"run.dir={folder / mode}", batch, *options] for mode, options in MODES.items()]
    job = launch(request.param, ["tests/training/rank_worker.py", json.dumps(runs), *map(str, free_ports(len(runs)))])
    output, _ = job.communicate(timeout=420)
    assert job.returncode == 0, output
    return folder


def test_shards_train_in_fp8_what_one_rank_does(recipe: Path, tmp_path: Path) -> None:
    assert cli.main(["train", str(recipe), f"run.dir={tmp_path / 'alone'}", *FP8]) == 0
    runs = [
        ["train", str(recipe), f"run.dir={tmp_path / 'spread'}", *FP8, "train.sharding=fsdp", "train.micro_batch=2"]
    ]
    job = launch(2, ["tests/training/rank_worker.py", json.dumps(runs), *map(str, free_ports(1))])
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    (_, row), (_, spread) = result(tmp_path / "alone"), result(tmp_path / "spread")
    assert row["step"] == spread["step"] == 3
    for name in ("loss", "kl", "theta_mse", "grad_norm"):
        assert spread[name] == pytest.approx(row[name], rel=2e-2), name


def test_shards_see_the_times_that_the_base_sees(recipe: Path, tmp_path: Path) -> None:
    """In bf16, without guidance: before the first update both are one model, to the last bit."""
    options = ["train.parameters=full", "train.sharding=fsdp", "precision.dtype=bf16", "train.micro_batch=2"]
    runs = [["train", str(recipe), f"run.dir={tmp_path / 'run'}", *options, "train.updates=1"]]
    runs[0].append("algorithm.guidance_scale=1")
    job = launch(2, ["tests/training/rank_worker.py", json.dumps(runs), *map(str, free_ports(1))])
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    assert result(tmp_path / "run")[1]["kl"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_ranks_train_what_one_rank_trains(alone: Path, spread: Path, mode: str) -> None:
    expected, row = result(alone / mode.partition("_")[0])
    got, spread_row = result(spread / mode)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert row["step"] == spread_row["step"] == 3
    names = ["loss", "kl", "grad_norm"]
    if not mode.endswith("parts"):
        names += ["implicit_reward_std", "reward_mapped_std", "samples"]  # of a micro-step
    for name in names:
        assert spread_row[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6), name
    assert spread_row["reward"] == pytest.approx(row["reward"], rel=1e-3)
    assert row["reward_std"]["jpeg_compressibility"] > 0
