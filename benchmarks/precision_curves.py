"""Does FP8 learn what bf16 learns? The shapes recipe in both, over several seeds, as curves of the training reward:

    python -m benchmarks.precision_curves --seeds 0 1 2 --epochs 60 --out benchmarks/results/precision_shapes_cpu

Runs that are there already are kept, so the command can be stopped and started again. A seed fixes prompts, noise and
noise levels for both precisions, so their curves are compared in pairs. The verdict is on the mean reward of the last
third of the epochs: the mean difference of the pairs against the spread of bf16 over the seeds.
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

import torch

from benchmarks.tables import environment

PRECISIONS = {"bf16": [], "fp8": ["precision.train=fp8", "precision.old=fp8"]}
REWARD = "geneval"


def curve(folder: Path, precision: str, seed: int, epochs: int) -> list[float]:
    """The mean training reward of every epoch, of a run that is made unless `folder` has it."""
    run = folder / f"{precision}-{seed}"
    metrics = run / "metrics.jsonl"
    if not metrics.is_file() or len(metrics.read_text().splitlines()) < epochs:
        command = [sys.executable, "-m", "crd_fast", "train", "recipes/shapes.yaml", f"run.dir={run}"]
        command += [f"run.seed={seed}", f"train.epochs={epochs}", f"train.cooldown={epochs // 3}"]
        command += ["train.max_minutes=null", "train.checkpoint_every=10", "precision.dtype=bf16"]
        command += ["evaluation.suite=null", *PRECISIONS[precision]]
        if run.is_dir():
            command.append("--resume")
        subprocess.run(command, check=True)
    return [json.loads(line)["reward"][REWARD] for line in metrics.read_text().splitlines()][:epochs]


def verdict(curves: dict[str, dict[int, list[float]]]) -> dict[str, object]:
    """Last-third means by precision and seed, the mean paired difference, and bf16's spread over the seeds."""
    last = {
        precision: {seed: statistics.fmean(values[-(len(values) // 3) :]) for seed, values in by_seed.items()}
        for precision, by_seed in curves.items()
    }
    first = {precision: statistics.fmean(v[0] for v in by_seed.values()) for precision, by_seed in curves.items()}
    differences = [last["fp8"][seed] - value for seed, value in last["bf16"].items()]
    spread = statistics.stdev(last["bf16"].values())
    difference = statistics.fmean(differences)
    return {
        "first_epoch": first,
        "last_third": last,
        "difference": difference,
        "seed_standard_deviation": spread,
        "within_seed_noise": abs(difference) <= spread,
    }


def plot(curves: dict[str, dict[int, list[float]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for precision, color in (("bf16", "tab:blue"), ("fp8", "tab:orange")):
        for number, values in enumerate(curves[precision].values()):
            axes.plot(values, color=color, alpha=0.8, linewidth=1.2, label=precision if number == 0 else None)
    axes.set(xlabel="epoch", ylabel="training reward (mean of the epoch)", title="shapes: one line a seed")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"), help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .json and .png are written")
    given = parser.parse_args(arguments)
    if len(given.seeds) < 2:
        parser.error("--seeds: expected at least two, their spread is what the difference is held against")
    if given.epochs < 3:
        parser.error("--epochs: expected at least 3")
    curves = {
        precision: {seed: curve(given.runs, precision, seed, given.epochs) for seed in given.seeds}
        for precision in PRECISIONS
    }
    result = verdict(curves)
    command = f"python -m benchmarks.precision_curves --seeds {' '.join(map(str, given.seeds))} --epochs {given.epochs}"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    aside = given.out.with_suffix(".tmp")
    aside.write_text(
        json.dumps(
            {"environment": environment(torch.device("cpu")), "command": command} | result | {"curves": curves},
            indent=1,
        )
        + "\n"
    )
    os.replace(aside, given.out.with_suffix(".json"))
    plot(curves, given.out.with_suffix(".png"))
    for precision, by_seed in result["last_third"].items():  # type: ignore[attr-defined]
        print(precision, " ".join(f"{value:.3f}" for value in by_seed.values()))
    print(f"difference {result['difference']:+.4f}, spread over seeds {result['seed_standard_deviation']:.4f}")
    return 0 if result["within_seed_noise"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
