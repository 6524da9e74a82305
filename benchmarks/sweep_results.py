"""A finished sweep over beta as a file and a picture to be committed.

    python -m benchmarks.sweep_results runs/sweep --out benchmarks/results/shapes_didr_sweep

Writes `.json`: of each run what `benchmarks.collect` keeps, besides its reward_at and beta; and `.png`: the score over
the Fréchet distance, a line of betas for each reward_at, beside the start and the multi-step reference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.collect import collect, lines
from crd_fast.didr.pareto import AFTER, BEFORE, LABELS, Sweep, read_sweep
from crd_fast.didr.report_files import REFERENCE
from crd_fast.errors import DataError
from crd_fast.evaluation.plots import finite
from crd_fast.whole_files import write_json

COST = "frechet"


def gather(directory: Path, sweep: Sweep) -> dict[str, Any]:
    """The contents of the file. Raises DataError for a sweep that is not finished, or a run of it that is not."""
    if len(sweep.rows) != sweep.runs:
        raise DataError(
            f"{directory}: {len(sweep.rows)} of {sweep.runs} runs have been evaluated: continue the sweep with --resume"
        )
    found = collect([directory / str(row["folder"]) for row in sweep.rows])
    for row, run in zip(sweep.rows, found["runs"], strict=True):
        run |= {"reward_at": row["reward_at"], "beta": row["beta"]}
    return {"score": sweep.score, **found}


def plot(sweep: Sweep, file: Path) -> None:
    """Raises DataError where a run, the start or the reference has no Fréchet distance."""
    from matplotlib.figure import Figure

    sides = [*(row[AFTER] for row in sweep.rows), sweep.shared(BEFORE), sweep.shared(REFERENCE)]
    if any(finite(side.get(COST)) is None for side in sides):
        raise DataError(f"the runs of {sweep.name} have no Fréchet distance: set evaluation.suite, or more images")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in sweep.kinds():
        rows = sorted(sweep.of(kind), key=lambda row: float(row["beta"]))
        across, up = ([row[AFTER][key] for row in rows] for key in (COST, sweep.score))
        axes.plot(across, up, marker="o", label=f"reward at {kind}, over beta")
        for row, x, y in zip(rows, across, up, strict=True):
            axes.annotate(f"{row['beta']:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    for side, marker in ((BEFORE, "s"), (REFERENCE, "^")):
        scores = sweep.shared(side)
        axes.plot(scores[COST], scores[sweep.score], marker, color="0.3", label=LABELS[side])
    axes.set(xlabel="Fréchet distance", ylabel=sweep.title(sweep.score), title=sweep.name)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="directory of the sweep")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .json and .png are written")
    given = parser.parse_args(arguments)
    try:
        sweep = read_sweep(given.folder)
        found = gather(given.folder, sweep)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        plot(sweep, given.out.with_suffix(".png"))
    except DataError as error:
        print(f"sweep_results: {error}", file=sys.stderr)
        return 2
    write_json(given.out.with_suffix(".json"), found)
    print("\n".join(lines(found["runs"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
