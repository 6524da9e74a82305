"""The real command on a tiny random pipeline: training, resuming, exporting, and every wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

import crd_fast
from crd_fast import cli, forward_process
from crd_fast.lora_file import read_adapter
from crd_fast.training.plan import DRAW_SHIFT
from tests.pipelines import flux2, sd3

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.save(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def recipe(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images rarely satisfy a prompt, so the reward counts squares of any colour where there are none."""
    folder = tmp_path_factory.mktemp("recipe")
    prompts = [
        {"tag": "counting", "include": [{"class": "square", "count": n}], "prompt": f"{n} squares"} for n in (2, 3)
    ]
    held_out = [p | {"prompt": p["prompt"] + " please"} for p in prompts]
    for name, rows in (("train", prompts), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "signs.jsonl").write_text(json.dumps({"prompt": "a sign without a quote", "tag": "text"}) + "\n")
    tree = {
        "model": {"path": str(pipeline)},
        "data": {"prompts": str(folder / "train.jsonl"), "test_prompts": str(folder / "test.jsonl")},
        "rewards": {"geneval": {"weight": 1, "score": "soft"}},
        "algorithm": {"guidance_scale": 2.0, "kl_fraction": 0.5},
        "lora": {"rank": 2, "alpha": 4},
        "rollout": {"steps": 2, "batch": 4},
        "train": {
            "epochs": 3,
            "groups": 2,
            "group_size": 2,
            "micro_batch": 2,
            "updates": 2,
            "timesteps": 2,
            "timestep_strategy": "uniform",
            "checkpoint_every": 1,
        },
        "precision": {"dtype": "fp32"},
        "evaluation": {"suite": "shapes", "images": 2, "steps": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(recipe: Path, *arguments: str, code: int = 0) -> None:
    assert cli.main(["train", str(recipe), *arguments]) == code


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics without the wall clock."""
    timed = ("seconds", "samples_per_second", "elapsed_seconds", "tflops_per_second")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe, f"run.dir={run}")
    return run


def test_snapshots_follow_by_optimiser_steps(finished: Path) -> None:
    """Two an epoch."""
    table = rows(finished)
    assert [row["step"] for row in table] == [2, 4, 6]
    assert [row["old_decay"] for row in table] == pytest.approx([0.26, 0.27, 0.28])
    assert [row["sampling_decay"] for row in table] == [0.0, 0.0, 0.0]


def test_a_run_leaves_every_file_of_its_contract(finished: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "environment.json", "report.html"):
        assert (finished / name).is_file(), name
    assert (finished / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((finished / "checkpoints").iterdir())) == 3
    table = rows(finished)
    assert [row["epoch"] for row in table] == [0, 1, 2] and [row["step"] for row in table] == [2, 4, 6]
    assert {"loss", "policy_loss", "kl_loss", "kl", "reward", "implicit_reward_std", "grad_norm"} <= set(table[0])
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["samples"] == 12 and {"geneval_strict", "clean", "tasks"} <= set(summary["after"])
    assert "tasks" in (finished / "report.html").read_text().lower()


def test_every_metric_is_explained(finished: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    table = page.split("## What to watch")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert rows(finished)[0].keys() - {"epoch", "step"} <= named


def test_tensorboard_has_the_same_numbers(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    table = rows(finished)
    expected_rows = {"loss": [r["loss"] for r in table], "reward/geneval": [r["reward"]["geneval"] for r in table]}
    for name, expected in expected_rows.items():
        assert [e.value for e in events.Scalars(name)] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert [e.step for e in events.Scalars(name)] == [0, 1, 2]


def test_the_same_seed_gives_the_same_run(recipe: Path, finished: Path, tmp_path: Path) -> None:
    train(recipe, f"run.dir={tmp_path / 'again'}")
    assert rows(tmp_path / "again") == rows(finished)
    assert (tmp_path / "again" / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
    train(recipe, f"run.dir={tmp_path / 'other'}", "run.seed=1")
    assert rows(tmp_path / "other") != rows(finished)


def test_resuming_repeats_the_uninterrupted_run(recipe: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe, f"run.dir={run}", "train.epochs=1")
    assert len(rows(run)) == 1
    train(recipe, f"run.dir={run}", "--resume")
    assert rows(run) == rows(finished)
    first, second = (load_file(r / "lora" / "pytorch_lora_weights.safetensors") for r in (run, finished))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_damaged_checkpoint_is_passed_over(
    recipe: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (state,) = (run / "checkpoints" / "epoch-000003" / "state").glob("*.distcp")
    state.write_bytes(state.read_bytes()[:-100])
    train(recipe, f"run.dir={run}", "--resume")
    out = capsys.readouterr().out
    assert "epoch-000003 is damaged" in out and "resumed from epoch-000002" in out
    assert rows(run) == rows(finished)


def test_the_learning_rate_rises_and_falls(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        recipe, f"run.dir={run}", "train.lr=1e-3", "train.warmup=4", "train.cooldown=2", "evaluation.suite=null"
    )  # two updates an epoch
    assert [row["lr"] for row in rows(run)] == pytest.approx([0.5e-3, 1e-3, 0.5e-3])


def test_a_run_that_goes_on_with_an_adapter_begins_with_it(
    recipe: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the adapter has gained already is no gain of this run."""
    run = tmp_path / "run"
    train(recipe, f"run.dir={run}", f"lora.path={finished}", "train.epochs=1")
    before = json.loads((run / "evaluation_before.json").read_text())
    assert before == json.loads((finished / "evaluation_after.json").read_text())
    assert cli.main(["eval", "--run", str(run), "--suite", "shapes", "--device", "cpu"]) == 0
    assert "| start |" in capsys.readouterr().out
    summary = json.loads((run / "eval-shapes" / "base" / "summary.json").read_text())
    assert summary["summary"]["geneval_soft"] == before["summary"]["geneval_soft"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_group_shares_its_noise_when_asked(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    seen: list[list[int]] = []

    def noise(*arguments: Any, sample_ids: torch.Tensor, **others: Any) -> crd_fast.Noised:
        seen.append(sample_ids.tolist())
        return forward_process.noise(*arguments, sample_ids=sample_ids, **others)

    monkeypatch.setattr(crd_fast, "noise", noise)
    train(
        recipe, f"run.dir={tmp_path / 'run'}", f"train.shared_noise={shared}", "train.epochs=2", "evaluation.suite=null"
    )
    # 2 epochs of 2 groups of 2 samples, a group a micro-step, each at 2 timesteps; ids count up over the run
    first = [[0, 0], [2, 2], [4, 4], [6, 6]] if shared else [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert seen == [[i + (draw << DRAW_SHIFT) for i in ids] for ids in first for draw in range(2)]


def test_sigterm_saves_and_resume_gives_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    """In its own process: a run long enough to be caught in the middle, against the same run left alone."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe, f"run.dir={whole}", "train.epochs=8")
    command = [sys.executable, "-m", "crd_fast", "train", str(recipe), f"run.dir={cut}", "train.epochs=8"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + 120
    while not (cut / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "stopped by SIGTERM" in out and "--resume" in out
    assert 1 <= len(rows(cut)) < 8
    saved = max((cut / "checkpoints").iterdir())
    adapter = read_adapter(str(saved))
    state = {f"trained.{n.removesuffix('.lora_A.weight')}.down": t for n, t in adapter.items() if "lora_A" in n}
    filled = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    dcp.load(filled, checkpoint_id=saved / "state")
    for name, tensor in state.items():
        assert torch.equal(filled[name], tensor), "state and adapter of a checkpoint belong together"
    train(recipe, f"run.dir={cut}", "train.epochs=8", "--resume")
    assert [row["epoch"] for row in rows(cut)] == list(range(8))
    assert rows(cut) == rows(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epoch=3"], "did you mean 'epochs'"),
        (["model.path=/nowhere/model"], "/nowhere/model is not a folder"),
        (["model.family=flux1"], "model.family is 'flux1'"),
        (["train.group_size=3"], "train.group_size 3 does not divide"),
        (["lora.targets=[attn.to_x]"], "no linear layer ends with"),
        (["model.resolution=50"], "expected a multiple of 16"),
        (["model.resolution=4096"], "model.resolution is 4096: expected at most "),
        (["--resume"], "holds no run"),
    ],
)
def test_wrong_input_exits_2_and_says_what_to_do(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    train(recipe, f"run.dir={tmp_path / 'run'}", *arguments, code=2)
    assert message in capsys.readouterr().err


def test_damaged_files_of_a_run_are_named_or_made_again(
    recipe: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (embeddings,) = (run / "embeddings").iterdir()
    whole = embeddings.read_bytes()
    embeddings.write_bytes(whole[:100])
    train(recipe, f"run.dir={run}", "--resume")
    assert embeddings.read_bytes() == whole
    (run / "environment.json").write_text("{")
    train(recipe, f"run.dir={run}", "--resume")
    assert json.loads((run / "environment.json").read_text())["code"] == {}
    (run / "evaluation_before.json").write_text("{")
    train(recipe, f"run.dir={run}", "--resume", code=2)
    assert "evaluation_before.json: not JSON" in capsys.readouterr().err
    (run / "config.yaml").write_text("a: [")
    train(recipe, f"run.dir={run}", "--resume", code=2)
    assert "config.yaml is not valid YAML" in capsys.readouterr().err


def test_ocr_prompts_need_their_quotes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signs = f"data.prompts={recipe.parent / 'signs.jsonl'}"
    train(recipe, f"run.dir={tmp_path / 'run'}", signs, "rewards={ocr: {weight: 1}}", code=2)
    assert "signs.jsonl:1" in capsys.readouterr().err


def test_prompts_that_the_reward_could_never_score_are_told_before_the_model_is_loaded(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "cows.jsonl"
    prompts.write_text(json.dumps({"prompt": "a cow", "include": [{"class": "cow", "count": 1}]}) + "\n")
    train(recipe, f"run.dir={tmp_path / 'run'}", f"data.prompts={prompts}", "model.path=nowhere", code=2)
    assert "cows.jsonl:1: reward 'geneval': include[0].class is 'cow'" in capsys.readouterr().err


def test_a_reward_of_the_users_own_trains(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = {"source": f"{ROOT / 'examples' / 'rewards' / 'colorfulness.py'}:colorfulness", "arguments": {"scale": 2.0}}
    rewards = {
        "custom:color": own | {"weight": 1, "runs": "process"},
        "custom:plain": own | {"arguments": {}, "weight": 0},
    }
    settings = [f"run.dir={run}", f"rewards={json.dumps(rewards)}"]
    train(recipe, *settings, "train.epochs=1")
    train(recipe, *settings, "train.epochs=2", "--resume")
    table = rows(run)
    assert len(table) == 2
    for row in table:
        assert row["reward"]["custom:color"] == pytest.approx(2 * row["reward"]["custom:plain"], rel=1e-6)
        assert row["grad_norm"] > 0 and row["reward_diagnostics"]["custom:color_tint"] > 0


def test_a_changed_reward_is_told_when_the_run_continues(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def level(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    settings = [f"run.dir={tmp_path / 'run'}", f"rewards={json.dumps({'custom': {'source': f'{own}:level'}})}"]
    train(recipe, *settings, "train.epochs=1")
    train(recipe, *settings, "train.epochs=2", "--resume")
    told = capsys.readouterr()
    assert "its code is not" not in told.out + told.err
    own.write_text(own.read_text() + "\n# other code\n")
    train(recipe, *settings, "train.epochs=3", "--resume")
    told = capsys.readouterr()
    assert "reward 'custom': its code is not what this run began with" in told.out + told.err


def test_a_reward_is_taken_out_by_null(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe, f"run.dir={run}", "rewards.geneval=null", "rewards.jpeg_compressibility={}", "train.epochs=1")
    assert set(rows(run)[0]["reward"]) == {"jpeg_compressibility"}


def test_overlapping_prompt_sets_are_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = f"data.test_prompts={recipe.parent / 'train.jsonl'}"
    train(recipe, f"run.dir={tmp_path / 'run'}", same, code=2)
    assert "2 squares" in capsys.readouterr().err


def test_a_run_directory_is_never_overwritten_nor_mixed(
    recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe, f"run.dir={finished}", code=2)
    assert "already holds a run: add --resume" in capsys.readouterr().err
    train(recipe, f"run.dir={finished}", "--resume", "train.lr=0.5", code=2)
    assert "train.lr was 0.0003, now 0.5" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    train(recipe, f"run.dir={tmp_path / 'file' / 'run'}", code=2)
    assert "cannot be written" in capsys.readouterr().err


def test_gradients_that_are_not_finite_stop_the_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that blows the adapter up: the first step overflows it, the second has nothing finite left."""
    train(
        recipe, f"run.dir={tmp_path / 'run'}", "train.lr=1e30", "train.max_skipped=1", "evaluation.suite=null", code=2
    )
    error = capsys.readouterr().err
    assert "1 optimiser steps in a row had a gradient that is not finite (epoch 0, sigma" in error
    assert "last good checkpoint: none yet" in error


def test_sample_writes_pictures_with_and_without_the_adapter(pipeline: Path, finished: Path, tmp_path: Path) -> None:
    common = ["sample", "--model", str(pipeline), "--prompt", "2 squares", "--count", "2", "--steps", "2"]
    assert cli.main([*common, "--out", str(tmp_path / "base")]) == 0
    assert cli.main([*common, "--out", str(tmp_path / "tuned"), "--lora", str(finished)]) == 0
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == ["00000.png", "00001.png"]
    assert cli.main([*common, "--lora", str(tmp_path)]) == 2


def test_doctor_reports_the_extension(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "extension    built" in out and "torch" in out


# --- guidance that a family does not have ---


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    """A recipe of a model without guidance, with the default guidance of the anchor, which asks for it."""
    (tmp_path / "train.txt").write_text("2 squares\n3 squares\n")
    pipeline = flux2.save(tmp_path / "pipeline", distilled=True)
    tree = {
        "model": {"path": str(pipeline), "max_sequence_length": 12, "resolution": 64},
        "data": {"prompts": str(tmp_path / "train.txt")},
        "rewards": {"jpeg_compressibility": {"weight": 1}},
        "lora": {"rank": 2},
        "rollout": {"steps": 1, "batch": 4},
        "train": {"epochs": 1, "groups": 2, "group_size": 2, "micro_batch": 2, "updates": 1, "timesteps": 1},
        "precision": {"dtype": "fp32"},
    }
    recipe = tmp_path / "distilled.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


@pytest.mark.parametrize("setting", ["algorithm.guidance_scale", "rollout.guidance_scale", "evaluation.guidance_scale"])
def test_it_is_refused_before_anything_is_sampled(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    run = tmp_path / "run"
    train(distilled, f"run.dir={run}", "algorithm.guidance_scale=1", f"{setting}=4", code=2)
    assert "guidance_scale is 4.0" in capsys.readouterr().err
    assert not (run / "samples").exists() and not (run / "metrics.jsonl").exists()


def test_no_anchor_asks_for_none(distilled: Path, tmp_path: Path) -> None:
    train(distilled, f"run.dir={tmp_path / 'run'}", "algorithm.kl_coef=0")
