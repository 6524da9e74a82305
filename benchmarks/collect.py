"""What finished runs scored, in one file to be committed, with what made them and how long they took.

    python -m benchmarks.collect runs/seed-0 runs/seed-1 --out benchmarks/results/shapes_didr.json

`runs` holds of each directory, in the order given, its environment.json, summary.json and timing.json. Sides of a
summary that are equal in all runs are kept all the same: the file is read without this script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crd_fast.errors import DataError
from crd_fast.evaluation.run_files import read_object
from crd_fast.whole_files import write_json

FILES = ("environment", "summary", "timing")


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """The contents of the file. Raises DataError for a directory that has no finished run."""
    runs = []
    for folder in folders:
        found = {name: read_object(folder / f"{name}.json") for name in FILES}
        missing = [f"{name}.json" for name, values in found.items() if not values]
        if missing:
            raise DataError(f"{folder} holds no finished run: {', '.join(missing)} is missing")
        runs.append(found)
    return {"runs": runs}


def lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each side of each run: the scores that it has."""
    told = []
    for run in runs:
        summary, minutes = run["summary"], run["timing"].get("train_minutes")
        told.append(f"{run['environment'].get('command')}: {minutes} minutes")
        for side, scores in summary.items():
            if isinstance(scores, dict):
                numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
                told.append(f"  {side:10}" + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run directories")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    given = parser.parse_args(arguments)
    try:
        found = collect(given.folders)
    except DataError as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, found)
    print("\n".join(lines(found["runs"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
