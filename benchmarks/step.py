"""An epoch's updates, side by side with a baseline in the public trainers' order, lever by lever:

    python -m benchmarks.step --model shapes --out benchmarks/results/step_shapes_cpu
    python -m benchmarks.step --model sd35m --out FOLDER          # true size, random weights, on a GPU

Every row runs the same samples, noise levels' number, updates and adapters. The first is the baseline
(`benchmarks.public_step`), the second replaces its loss section alone, the others are this package's trainer with one
lever after another. `x` is samples a second against the first row: the median over rounds in which all rows take
turns, where all models fit into memory together, and of one row after another where they do not. Memory is the most
that a run holds beyond what was there before it: beyond weights, adapters and optimiser.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_bytes
from benchmarks.public_step import PublicStep, StepInputs
from benchmarks.step_models import MODELS, PROMPTS, StepModel
from benchmarks.tables import environment
from crd_fast.data.prompts import PromptSet
from crd_fast.lora import LoRABank
from crd_fast.ranks import Ranks
from crd_fast.rewards.scorer import Scorer
from crd_fast.rollout import RolloutBatch
from crd_fast.training.config import build_recipe
from crd_fast.training.experience import Experience
from crd_fast.training.flops import peak_flops
from crd_fast.training.prepare import prepare
from crd_fast.training.stop import StopRequest
from crd_fast.training.trainer import Trainer

RANK, ALPHA, LR = 32, 64.0, 3e-4
# what each row adds to the trainer's recipe; None is the baseline, "fused" the baseline with our loss section
ROWS: dict[str, dict[str, Any] | str | None] = {
    "public order": None,
    "public order, our loss": "fused",
    "crd-fast": {},
    "selective recomputation": {"acceleration": {"recompute": "selective"}},
    "compiled": {"acceleration": {"compile": True}},
    "kl_fraction .25": {"algorithm": {"kl_fraction": 0.25}},
    "kl_fraction .25, compiled": {"algorithm": {"kl_fraction": 0.25}, "acceleration": {"compile": True}},
    "kl_fraction .25, compiled, full recomputation": {
        "algorithm": {"kl_fraction": 0.25},
        "acceleration": {"compile": True, "recompute": "full"},
    },
    "kl_fraction .25, compiled, selective": {
        "algorithm": {"kl_fraction": 0.25},
        "acceleration": {"compile": True, "recompute": "selective"},
    },
    "kl_fraction .25, compiled, fp8": {
        "algorithm": {"kl_fraction": 0.25},
        "acceleration": {"compile": True},
        "precision": {"train": "fp8", "old": "fp8"},
    },
}


@dataclass(frozen=True)
class Sizes:
    """samples, in groups of group_size; micro_batch of them in a pass; timesteps of each, with an update for each."""

    samples: int
    group_size: int
    micro_batch: int
    timesteps: int = 2


SIZES = {
    "shapes": Sizes(288, 12, 72),
    "sd35m": Sizes(48, 24, 24),
    "flux1": Sizes(16, 8, 8),
    "z_image": Sizes(16, 8, 8),
}


@dataclass(frozen=True)
class Measured:
    """One row: seconds of an epoch's updates in every round, bytes and operations (None: not counted) of one."""

    seconds: list[float]
    peak: int
    flops: float | None
    phases: dict[str, float]


def inputs(model: StepModel, sizes: Sizes) -> StepInputs:
    generator = torch.Generator().manual_seed(1)
    device = model.backbone.device
    latents = torch.randn(sizes.samples, *model.backbone.latent_shape, generator=generator).to(device)
    prompts = torch.arange(sizes.samples // sizes.group_size).repeat_interleave(sizes.group_size) % PROMPTS
    return StepInputs(
        latents=latents,
        conditioning=model.conditioning[prompts.to(device)],
        unconditional=model.unconditional,
        advantages=torch.randn(sizes.samples, generator=generator),
        group_size=sizes.group_size,
        micro_batch=sizes.micro_batch,
        timesteps=sizes.timesteps,
        guidance_scale=model.guidance_scale,
    )


def trainer_run(
    model: StepModel, sizes: Sizes, dtype: torch.dtype, extra: dict[str, Any]
) -> tuple[Callable[[], None], Trainer]:  # fmt: skip
    """The trainer's own updates of one epoch after another."""
    given = inputs(model, sizes)
    groups = sizes.samples // sizes.group_size
    algorithm = {"guidance_scale": model.guidance_scale} | extra.get("algorithm", {})
    recipe = build_recipe(
        {
            "model": {"path": "benchmark"},
            "data": {"prompts": "benchmark"},
            "rewards": {"jpeg_compressibility": {}},
            "algorithm": algorithm,
            "acceleration": extra.get("acceleration", {}),
            "precision": {"dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]} | extra.get("precision", {}),
            "train": {
                "groups": groups,
                "group_size": sizes.group_size,
                "micro_batch": sizes.micro_batch,
                "timesteps": sizes.timesteps,
                "updates": sizes.timesteps,
                "timestep_strategy": "uniform",
                "lr": LR,
            },
        },
        "step",
    )
    bank = LoRABank(model.backbone.transformer, model.targets, rank=RANK, alpha=ALPHA, seed=0)
    trainer = Trainer(
        recipe,
        model.backbone,
        bank,
        prepare(bank, model.backbone, recipe, Ranks(), model.unconditional),
        PromptSet(("benchmark",) * groups, ({},) * groups, "benchmark", tuple(range(groups))),
        given.conditioning,  # a row a sample
        model.unconditional,
        Scorer({}),
        StopRequest(),
        Ranks(),
    )
    samples = torch.arange(sizes.samples)
    batch = RolloutBatch(given.latents, samples, samples // sizes.group_size, samples)
    experience = Experience(batch, given.advantages, None, {})

    def run() -> None:
        trainer.phases.seconds.clear()
        trainer.optimize(trainer.epoch, experience)
        trainer.epoch += 1

    return run, trainer


def built(name: str, model_name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The run of a row on a model of its own, and the trainer whose phases it fills, if it is ours."""
    model, extra = MODELS[model_name](device, dtype), ROWS[name]
    if isinstance(extra, dict):
        return trainer_run(model, sizes, dtype, extra)
    given, fused = inputs(model, sizes), extra == "fused"
    step = PublicStep(model.backbone, model.targets, RANK, ALPHA, LR)
    return (lambda: step.run(given, fused=fused)), None


def timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def described(run: Callable[[], None], trainer: Trainer | None, device: torch.device, seconds: list[float]) -> Measured:
    peak = peak_bytes(run, device)
    if trainer is not None:
        phases = {name: round(value, 4) for name, value in trainer.phases.seconds.items()}
        if trainer.recipe.acceleration.compile:  # the counter cannot look into compiled graphs
            return Measured(seconds, peak, None, phases)
    with FlopCounterMode(display=False) as counter:
        run()
    return Measured(seconds, peak, float(counter.get_total_flops()), {} if trainer is None else phases)


def measure(
    names: Sequence[str], model_name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Measured]:
    """All rows. Those of a small model take turns; a large model is made anew for every row."""
    together = model_name == "shapes"
    if together:
        runs = {name: built(name, model_name, sizes, device, dtype) for name in names}
        for name, (run, _) in runs.items():
            print(f"warming up {name}", file=sys.stderr, flush=True)
            run()
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for name, (run, _) in runs.items():
                seconds[name].append(timed(run, device))
        return {name: described(run, trainer, device, seconds[name]) for name, (run, trainer) in runs.items()}
    results = {}
    for name in names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        run, trainer = built(name, model_name, sizes, device, dtype)
        run()
        results[name] = described(run, trainer, device, [timed(run, device) for _ in range(rounds)])
        del run, trainer
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def table(results: dict[str, Measured], sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    base = results[next(iter(results))]
    peak = peak_flops(device)
    rows = []
    for name, result in results.items():
        seconds = statistics.median(result.seconds)
        achieved = None if result.flops is None else result.flops / seconds
        rows.append(
            {
                "row": name,
                "seconds": seconds,
                "samples_per_second": sizes.samples * sizes.timesteps / seconds,
                "x": statistics.median(a / b for a, b in zip(base.seconds, result.seconds, strict=True)),
                "peak_mib": result.peak / 2**20,
                "memory": result.peak / base.peak,
                "tflops_per_second": None if achieved is None else achieved / 1e12,
                "mfu": None if achieved is None or peak is None else achieved / peak,
                "phases": result.phases,
            }
        )
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':46} {'samples/s':>10} {'x':>6} {'peak MiB':>9} {'memory':>7} {'TFLOP/s':>8} {'MFU':>6}"]
    for row in rows:
        achieved = "" if row["tflops_per_second"] is None else f"{row['tflops_per_second']:8.3f}"
        share = "" if row["mfu"] is None else f"{row['mfu']:6.1%}"
        lines.append(
            f"{row['row']:46} {row['samples_per_second']:10.1f} {row['x']:6.2f} {row['peak_mib']:9.1f} "
            f"{row['memory']:7.2f} {achieved:>8} {share:>6}"
        )
    return "\n".join(lines)


def write(
    folder: Path | None,
    model: str,
    sizes: Sizes,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> None:
    """Measure rows, print them, and leave step.json and step.csv in a folder, if one is given."""
    results = measure(names, model, sizes, device, dtype, rounds)
    rows = table(results, sizes, device)
    print(shown(rows))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "model": model,
        "sizes": asdict(sizes),
        "environment": environment(device),
        "rows": rows,
        "seconds": {name: result.seconds for name, result in results.items()},
    }
    (folder / "step.json").write_text(json.dumps(document, indent=1) + "\n")
    with (folder / "step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "phases"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="shapes")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.csv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", help="comma-separated indices of rows, the first being the baseline: 0,2,6")
    parser.add_argument("--samples", type=int, help="of an epoch; default by model")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and given.model != "shapes":
        parser.error(f"--model {given.model} has its true size and needs a GPU; use --model shapes on a CPU")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    sizes = SIZES[given.model]
    if given.samples is not None:
        sizes = Sizes(given.samples, sizes.group_size, sizes.micro_batch, sizes.timesteps)
    names = list(ROWS)
    if given.rows is None:
        # FP8 products are far slower than fp32 ones on a CPU
        names = [name for name in names if device.type == "cuda" or "fp8" not in name]
    else:
        names = [names[int(index)] for index in given.rows.split(",")]
    write(given.out, given.model, sizes, names, device, dtype, given.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
