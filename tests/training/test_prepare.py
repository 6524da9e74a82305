"""Precision, attention, recomputation, compilation and passes over the same samples, through the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from crd_fast import cli
from crd_fast.training.flops import TRAINED_PASSES
from crd_fast.training.frozen import FrozenPredictions
from crd_fast.training.trainer import Trainer
from tests.pipelines import sd3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "train.txt").write_text("2 squares\n3 squares\n")
    tree = {
        "model": {"path": str(sd3.save(folder / "pipeline")), "max_sequence_length": 1},
        "data": {"prompts": str(folder / "train.txt")},
        "rewards": {"jpeg_compressibility": {"weight": 1}},
        "algorithm": {"guidance_scale": 2.0, "kl_fraction": 0.5},
        "lora": {"rank": 2, "alpha": 4},
        "rollout": {"steps": 2, "batch": 4},
        "train": {"epochs": 2, "groups": 2, "group_size": 4, "micro_batch": 4, "updates": 2, "timesteps": 2}
        | {"timestep_strategy": "uniform", "lr": 1e-2},
        "precision": {"dtype": "fp32"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(recipe: Path, run: Path, *overrides: str) -> list[dict[str, Any]]:
    assert cli.main(["train", str(recipe), f"run.dir={run}", *overrides]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(recipe, tmp_path_factory.mktemp("plain") / "run")


LEARNED = ("loss", "kl", "implicit_reward_std", "grad_norm", "theta_mse")


@pytest.mark.parametrize(
    "overrides",
    [
        ["acceleration.recompute=full"],
        ["acceleration.recompute=selective", "acceleration.attention=sdpa"],
        ["acceleration.compile=true"],
        ["lora.merge=false"],
    ],
    ids=str,
)
def test_what_a_pass_computes_does_not_change(
    recipe: Path, plain: list[dict[str, Any]], tmp_path: Path, overrides: list[str]
) -> None:
    rows = train(recipe, tmp_path / "run", *overrides)
    for row, expected in zip(rows, plain, strict=True):
        for name in LEARNED:
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), name


def test_the_micro_batch_changes_nothing_but_the_order_of_sums(recipe: Path, tmp_path: Path) -> None:
    """8 are two groups; 2 and 1 are parts of one, which are centered with the rest of their group."""
    of = {
        size: train(recipe, tmp_path / f"of-{size}", f"train.micro_batch={size}", "algorithm.kl_fraction=1")
        for size in (4, 8, 2, 1)
    }
    whole = of.pop(4)
    for size, (
        row,
        _,
    ) in of.items():
        for name in (set(LEARNED) | {"policy_loss"}) - {"implicit_reward_std"}:  # a spread within a micro-step
            assert row[name] == pytest.approx(whole[0][name], rel=1e-5, abs=1e-9), (size, name)
        assert row["singleton_groups"] == 0 and row["grad_norm"] > 0
        assert ("preview" in row["seconds"]) == (size < 4), size


def test_a_batch_of_one_has_nothing_to_be_centered_with(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run.dir={tmp_path / 'run'}", "algorithm.centering=batch", "train.micro_batch=1"]
    assert cli.main(["train", str(recipe), *words]) == 2
    assert "algorithm.centering is 'batch' but a micro-step has one sample" in capsys.readouterr().err


@pytest.mark.parametrize(("micro_batch", "previewed"), [(4, 0), (2, 16)])
def test_every_pass_is_counted_as_arithmetic(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int, previewed: int
) -> None:
    """2 groups of 4 at 2 noise levels, of which half are anchored with guidance."""
    seen = []
    original = Trainer._throughput

    def counting(trainer: Trainer, seconds: float) -> dict[str, Any]:
        seen.append((trainer.frozen.predicted, trainer._previewed, trainer._trained))
        row = original(trainer, seconds)
        passes = 16 + 2 * 8 + previewed + 16 * TRAINED_PASSES["lora"]
        assert row["tflops_per_second"] * 1e12 * seconds == pytest.approx(passes * trainer.prepared.forward_flops)
        return row

    monkeypatch.setattr(Trainer, "_throughput", counting)
    train(recipe, tmp_path / "run", f"train.micro_batch={micro_batch}")
    assert seen == [(16 + 2 * 8, previewed, 16)] * 2


def test_nothing_is_compiled_after_the_first_epoch(recipe: Path, tmp_path: Path) -> None:
    """Rollout, pass without gradients and trained pass: graphs of the first epoch serve all others."""
    rows = train(recipe, tmp_path / "run", "acceleration.compile=true", "train.epochs=3")
    assert [row["recompiles"] for row in rows] == [0, 0, 0]
    assert rows[0]["compiled_graphs"] == rows[2]["compiled_graphs"] > 0


@pytest.mark.parametrize("everything", [False, True])
def test_fp8_trains_close_to_the_exact_run(
    recipe: Path, plain: list[dict[str, Any]], tmp_path: Path, everything: bool
) -> None:
    roles = ("train", "old", "ref", "rollout") if everything else ("train", "old")
    rows = train(recipe, tmp_path / "run", *(f"precision.{role}=fp8" for role in roles))
    assert rows[0]["theta_mse"] == pytest.approx(plain[0]["theta_mse"], rel=0.05)
    assert rows[0]["theta_mse"] != plain[0]["theta_mse"], "FP8 rounds"
    # the first update finds old and trained model equal, to the last bit where they round alike
    assert rows[0]["implicit_reward_mean"] == pytest.approx(plain[0]["implicit_reward_mean"], abs=1e-3)


def test_the_reference_is_measured_before_it_is_fp8(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guidance 1 and a fresh adapter: the trained model is the reference, so FP8 is all that would tell them apart."""
    arguments = [f"run.dir={tmp_path / 'run'}", "precision.ref=fp8", "algorithm.guidance_scale=1"]
    assert cli.main(["train", str(recipe), *arguments]) == 2
    assert "set precision.ref=bf16" in capsys.readouterr().err


def test_a_reference_without_a_term_is_not_measured(recipe: Path, tmp_path: Path) -> None:
    """And the exact weights go all the same, once, in the first epoch."""
    roles = [f"precision.{role}=fp8" for role in ("train", "old", "ref", "rollout")]
    rows = train(recipe, tmp_path / "run", *roles, "algorithm.kl_coef=0", "algorithm.guidance_scale=1")
    assert [row["kl_loss"] for row in rows] == [0, 0]


def test_the_gate_recompiles_nothing_that_counts(recipe: Path, tmp_path: Path) -> None:
    roles = [f"precision.{role}=fp8" for role in ("train", "old", "ref", "rollout")]
    rows = train(recipe, tmp_path / "run", *roles, "acceleration.compile=true", "train.epochs=3")
    assert [row["recompiles"] for row in rows] == [0, 0, 0]


def test_a_reward_of_ones_own_computes_in_its_own_precision(recipe: Path, tmp_path: Path) -> None:
    """The trained model of full fine-tuning runs under autocast; what scores its images does not."""
    source = tmp_path / "exact.py"
    source.write_text(
        "import torch\n"
        "def exact(images, prompts, metadata):\n"
        "    score = images.flatten(1) @ torch.full((images[0].numel(),), 0.1)\n"
        "    assert score.dtype == torch.float32, score.dtype\n"
        "    return score.numpy()\n"
    )
    options = [f"rewards={{custom: {{source: '{source}:exact'}}}}", "train.parameters=full", "precision.dtype=bf16"]
    assert len(train(recipe, tmp_path / "run", *options, "train.lr=1e-4")) == 2


def test_a_model_and_an_adapter_may_lie_under_home(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(recipe.parent))
    first = train(recipe, recipe.parent / "first", "model.path=~/pipeline")
    again = train(recipe, tmp_path / "again", "model.path=~/pipeline", "lora.path=~/first")
    assert first[0]["theta_mse"] != again[0]["theta_mse"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision.train=fp8", "set both alike"),
        ("precision.ref=fp4", "precision.ref is 'fp4': expected 'fp8'"),
        ("acceleration.attention=xfromers", "did you mean 'xformers'"),
        ("acceleration.recompute=fll", "did you mean 'full'"),
        ("train.sharding=fsdp", "there is one rank"),
        ("rollout.solver=heun", "rollout.solver is 'heun'"),
        ("train.parameters=full lora.path=/nowhere", "no adapter to start"),
    ],
)
def test_wrong_settings_say_what_is_right(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert cli.main(["train", str(recipe), f"run.dir={tmp_path / 'run'}", *override.split()]) == 2
    assert message in capsys.readouterr().err


def test_fixed_noise_predicts_the_frozen_models_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    predict = FrozenPredictions._predict

    def counted(self: FrozenPredictions, *arguments: Any) -> Any:
        calls.append(1)
        return predict(self, *arguments)

    monkeypatch.setattr(FrozenPredictions, "_predict", counted)
    options = ["train.inner_epochs=3", "train.epochs=1"]
    kept = train(recipe, tmp_path / "kept", *options, "train.fixed_noise=true")
    assert len(calls) == 4 and kept[0]["step"] == 6
    # predicting them again gives the same run
    monkeypatch.setattr(FrozenPredictions, "predict", FrozenPredictions._predict)
    again = train(recipe, tmp_path / "again", *options, "train.fixed_noise=true")
    assert len(calls) == 4 + 12
    assert {name: kept[0][name] for name in LEARNED} == {name: again[0][name] for name in LEARNED}
    fresh = train(recipe, tmp_path / "fresh", *options)
    assert fresh[0]["theta_mse"] != kept[0]["theta_mse"]


def test_without_a_kl_term_the_reference_is_not_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []
    predict = FrozenPredictions._predict_rows

    def seen(self: FrozenPredictions, plan: Any, *arguments: Any) -> torch.Tensor:
        rows.append(plan)
        return predict(self, plan, *arguments)

    monkeypatch.setattr(FrozenPredictions, "_predict_rows", seen)
    row = train(recipe, tmp_path / "run", "algorithm.kl_coef=0", "train.epochs=1")[0]
    assert rows == [[("old", 4)]] * 4 and row["kl_loss"] == 0


def test_out_of_memory_names_the_keys_to_lower_and_loses_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train.epochs=3", "train.checkpoint_every=1"]
    whole = train(recipe, tmp_path / "whole", *options)
    predict, calls = FrozenPredictions.predict, []

    def full(self: FrozenPredictions, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # in the second epoch, after its first update
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return predict(self, *arguments)

    monkeypatch.setattr(FrozenPredictions, "predict", full)
    run = tmp_path / "run"
    assert cli.main(["train", str(recipe), f"run.dir={run}", *options]) == 2
    message = capsys.readouterr().err
    assert "out of memory" in message and "train.micro_batch (4)" in message and f"{run} can be continued" in message
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    resumed = train(recipe, run, *options, "--resume")
    for row, expected in zip(resumed, whole, strict=True):
        assert {name: row[name] for name in LEARNED} == {name: expected[name] for name in LEARNED}
