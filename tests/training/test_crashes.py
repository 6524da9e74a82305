"""Processes killed at random moments, ranks that disappear, signals to a job: runs go on from whole checkpoints."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from crd_fast import cli
from tests.pipelines import sd3

ROOT = Path(__file__).parents[2]
EPOCHS = 40


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "train.txt").write_text("2 squares\n3 squares\n")
    tree = {
        "model": {"path": str(sd3.save(folder / "pipeline")), "max_sequence_length": 1},
        "data": {"prompts": str(folder / "train.txt")},
        "rewards": {"jpeg_compressibility": {"weight": 1}},
        "algorithm": {"guidance_scale": 2.0},
        "lora": {"rank": 2, "alpha": 4},
        "rollout": {"steps": 2, "batch": 4},
        "train": {"epochs": EPOCHS, "groups": 2, "group_size": 4, "micro_batch": 4, "updates": 1, "timesteps": 1}
        | {"timestep_strategy": "uniform", "checkpoint_every": 1, "timeout_minutes": 1},
        "precision": {"dtype": "fp32"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(recipe: Path, run: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "crd_fast", "train", str(recipe), f"run.dir={run}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def epochs(run: Path) -> list[int]:
    """Of the whole lines: a process killed while it writes one leaves a part of it."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line)["epoch"] for line in lines]


def wait_for_epochs(run: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while len(epochs(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_random_moments_a_run_continues(recipe: Path, tmp_path: Path) -> None:
    """The number of kills is the environment's CRD_FAST_TEST_KILLS, 3 unless told."""
    run, draw = tmp_path / "run", random.Random(0)
    for kill in range(int(os.environ.get("CRD_FAST_TEST_KILLS", "3"))):
        before = len(epochs(run))
        process = start(recipe, run, *(["--resume"] if kill else []))
        wait_for_epochs(run, process, min(max(1, before - 2), EPOCHS))
        time.sleep(draw.uniform(0, 0.6))
        process.kill()
        process.communicate()
    assert cli.main(["train", str(recipe), f"run.dir={run}", "--resume"]) == 0
    assert epochs(run) == list(range(EPOCHS))
    whole = tmp_path / "whole"
    assert cli.main(["train", str(recipe), f"run.dir={whole}"]) == 0
    adapters = [(folder / "lora" / "pytorch_lora_weights.safetensors").read_bytes() for folder in (run, whole)]
    assert adapters[0] == adapters[1], "a run that was killed ends as one that was not"


def test_a_lost_rank_ends_the_job_and_the_run_continues(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(recipe, run, "train.micro_batch=2", ranks=2)
    wait_for_epochs(run, job, 2)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = job.communicate(timeout=90)
    assert job.returncode != 0
    assert "lost the others" in output or "Signal 9 (SIGKILL)" in output, output
    done = len(epochs(run))
    again = start(recipe, run, "train.micro_batch=2", "--resume", f"train.epochs={done + 2}", ranks=2)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert epochs(run) == list(range(done + 2))
    assert "resumed from epoch-" in output


def test_sigterm_to_a_job_saves_once_and_another_number_of_ranks_resumes(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(recipe, run, "train.micro_batch=2", ranks=2)
    wait_for_epochs(run, job, 2)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)  # one rank is told, all stop
    output, _ = job.communicate(timeout=90)
    assert job.returncode == 0, output
    assert "stopped by" in output and "--resume" in output
    done = len(epochs(run))
    assert cli.main(["train", str(recipe), f"run.dir={run}", "--resume", f"train.epochs={done + 1}"]) == 0
    assert epochs(run) == list(range(done + 1))


FAILING = """
import os
import torch

class Failing:
    calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls > {calls} and os.environ["RANK"] == "1":
            raise {error}
        return torch.arange(len(images)).float() / len(images)

failing = Failing()
"""


@pytest.mark.parametrize("error", ["ValueError('no such colour')", "MemoryError('too large')"])
def test_a_failure_beside_a_save_leaves_the_save_whole_and_ends_the_job(
    recipe: Path, tmp_path: Path, error: str
) -> None:
    """One rank fails in the second epoch, while the threads of all ranks still write the first one's checkpoint."""
    source = tmp_path / "failing.py"
    source.write_text(FAILING.format(calls=2, error=error))  # the trial, and an epoch
    run = tmp_path / "run"
    rewards = json.dumps({"custom:failing": {"source": f"{source}:failing", "runs": "here", "weight": 1}})
    worker = "tests/training/slow_save_worker.py"
    arguments = ["train", str(recipe), f"run.dir={run}", "train.micro_batch=2", "rollout.batch=4"]
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, *arguments]
        + ["rewards.jpeg_compressibility=null", f"rewards={rewards}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode != 0
    assert "no such colour" in output or "too large" in output, output
    assert "could not be written" not in output and "lost the others at a checkpoint" not in output, output
    assert epochs(run) == [0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch-000001"], output
