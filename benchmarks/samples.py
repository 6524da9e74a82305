"""Samples of a finished run as one picture: a column of images for each prompt, a row for each side of the run.

    python -m benchmarks.samples runs/seed-0 --out benchmarks/results/shapes_samples.png [--columns 7]

Nothing is chosen by hand: every task has its first prompt, then every task its second, until the columns are full.
All sides start from the same noise. Where images were scored, a frame tells right ones (green) from wrong ones (red).
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from crd_fast.errors import DataError
from crd_fast.evaluation.pictures import read_image
from crd_fast.evaluation.plots import finite
from crd_fast.evaluation.report_tasks import task_key
from crd_fast.evaluation.run_files import Row, Run, read_run

SIDES = ("before", "after", "reference")
RIGHT, WRONG = "#2e8b57", "#c8442f"


def first_of_each_task(rows: Sequence[Row], count: int) -> list[Row]:
    """Round by round: the first row of each task, then the second, `count` in all or as many as there are."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(str(row.get("tag") or "samples"), []).append(row)
    rounds = zip_longest(*(tasks[name] for name in sorted(tasks, key=task_key)))
    return [row for row in chain.from_iterable(rounds) if row is not None][:count]


def draw(run: Run, columns: int, file: Path) -> list[Row]:
    """Writes the picture and returns the rows that it shows. Raises DataError where the run has no samples."""
    from matplotlib.figure import Figure

    rows = first_of_each_task(run.samples, columns)
    sides = [side for side in SIDES if (run.directory / "samples" / side).is_dir()]
    if not rows or not sides:
        raise DataError(f"{run.directory} has no samples: give the directory of a run that has been evaluated")
    figure = Figure(figsize=(1.25 * len(rows) + 0.4, 1.3 * len(sides) + 0.55), layout="constrained")
    grid = figure.subplots(len(sides), len(rows), squeeze=False)
    for line, (side, axes_of_side) in enumerate(zip(sides, grid, strict=True)):
        axes_of_side[0].set_ylabel(side)
        for row, axes in zip(rows, axes_of_side, strict=True):
            image = read_image(run.directory / "samples" / side / row["file_name"])
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if line == 0:
                axes.set_title("\n".join(textwrap.wrap(str(row["prompt"]), 20)), fontsize=7)
            value = finite(row.get(side))
            for spine in axes.spines.values():
                spine.set_visible(value is not None)
                if value is not None:
                    spine.set(color=RIGHT if value >= 1 else WRONG, linewidth=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--columns", type=int, default=7, help="prompts (default: 7)")
    given = parser.parse_args(arguments)
    try:
        rows = draw(read_run(given.folder), given.columns, given.out)
    except DataError as error:
        print(f"samples: {error}", file=sys.stderr)
        return 2
    for row in rows:
        marks = "  ".join(f"{side} {row[side]:g}" for side in SIDES if finite(row.get(side)) is not None)
        print(f"{row['prompt']}: {marks}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
