"""Does a faster way of running learn the same? The shapes recipe over several seeds, as curves of the training reward:

    python -m benchmarks.learning_curves --seeds 0 1 2 --epochs 60 --out benchmarks/results/learning_shapes_cpu

Beside one rank in bf16 stand trained and old predictions in FP8, and two ranks. Runs that are there already are kept,
so the command can be stopped and started again. A seed fixes prompts, noise and noise levels for all, so curves are
compared in pairs. The verdict is on the mean reward of the last third of the epochs: the mean difference of the pairs
against the spread of bf16 over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import environment

BASE = "bf16"
VARIANTS: dict[str, tuple[int, list[str]]] = {  # ranks, and overrides of the recipe
    BASE: (1, []),
    "fp8": (1, ["precision.train=fp8", "precision.old=fp8"]),
    "2 ranks": (2, ["train.micro_batch=36"]),
}
REWARD = "geneval"


def curve(folder: Path, variant: str, seed: int, epochs: int) -> list[float]:
    """The mean training reward of every epoch, of a run that is made unless `folder` has it."""
    ranks, overrides = VARIANTS[variant]
    run = folder / f"{variant.replace(' ', '-')}-{seed}"
    metrics = run / "metrics.jsonl"
    if not metrics.is_file() or len(metrics.read_text().splitlines()) < epochs:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
        command = [sys.executable, "-m", *torchrun, "crd_fast", "train", "recipes/shapes.yaml", f"run.dir={run}"]
        command += [f"run.seed={seed}", f"train.epochs={epochs}", f"train.cooldown={epochs // 3}"]
        command += ["train.max_minutes=null", "train.checkpoint_every=10", "precision.dtype=bf16"]
        command += ["evaluation.suite=null", *overrides]
        if run.is_dir():
            command.append("--resume")
        subprocess.run(command, check=True)
    return [json.loads(line)["reward"][REWARD] for line in metrics.read_text().splitlines()][:epochs]


def verdict(curves: dict[str, dict[int, list[float]]]) -> dict[str, dict[str, Any]]:
    """By variant: the last-third mean of every seed, and beside the base the mean paired difference.

    seed_standard_deviation is the base's; a variant learns the same where its difference is not more.
    """
    last = {
        variant: {seed: statistics.fmean(values[-(len(values) // 3) :]) for seed, values in by_seed.items()}
        for variant, by_seed in curves.items()
    }
    spread = statistics.stdev(last[BASE].values())
    result: dict[str, dict[str, Any]] = {}
    for variant, by_seed in last.items():
        result[variant] = {
            "first_epoch": statistics.fmean(values[0] for values in curves[variant].values()),
            "last_third": by_seed,
        }
        if variant == BASE:
            result[variant]["seed_standard_deviation"] = spread
            continue
        difference = statistics.fmean(value - last[BASE][seed] for seed, value in by_seed.items())
        result[variant] |= {"difference": difference, "within_seed_noise": abs(difference) <= spread}
    return result


def plot(curves: dict[str, dict[int, list[float]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for variant, color in zip(curves, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for number, values in enumerate(curves[variant].values()):
            axes.plot(values, color=color, alpha=0.8, linewidth=1.2, label=variant if number == 0 else None)
    axes.set(xlabel="epoch", ylabel="training reward (mean of the epoch)", title="shapes: one line a seed")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_curves"), help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .json and .png are written")
    given = parser.parse_args(arguments)
    if len(given.seeds) < 2:
        parser.error("--seeds: expected at least two, their spread is what the difference is held against")
    if given.epochs < 3:
        parser.error("--epochs: expected at least 3")
    curves = {
        variant: {seed: curve(given.runs, variant, seed, given.epochs) for seed in given.seeds} for variant in VARIANTS
    }
    result = verdict(curves)
    command = f"python -m benchmarks.learning_curves --seeds {' '.join(map(str, given.seeds))} --epochs {given.epochs}"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    aside = given.out.with_suffix(".tmp")
    content = {
        "environment": environment(torch.device("cpu")),
        "command": command,
        "variants": result,
        "curves": curves,
    }
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, given.out.with_suffix(".json"))
    plot(curves, given.out.with_suffix(".png"))
    for variant, found in result.items():
        print(f"{variant:<8}", " ".join(f"{value:.3f}" for value in found["last_third"].values()), end="  ")
        told = "seed_standard_deviation" if variant == BASE else "difference"
        print(told.replace("_", " "), f"{found[told]:.4f}")
    return 0 if all(found.get("within_seed_noise", True) for found in result.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
