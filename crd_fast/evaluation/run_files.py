"""The files of a run directory, read and checked for the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crd_fast.errors import DataError
from crd_fast.evaluation.plots import finite

Row = dict[str, Any]


@dataclass(frozen=True)
class Metrics:
    """What a row of metrics.jsonl must have: numbers, and metrics that are objects of numbers where they are there."""

    numbers: tuple[str, ...] = ("epoch",)
    mappings: tuple[str, ...] = ("reward", "reward_std", "reward_diagnostics", "seconds")


@dataclass(frozen=True)
class Run:
    """What a run directory records; None or empty where a file is not there yet."""

    directory: Path
    config: str | None
    epochs: list[Row]
    samples: list[Row]
    summary: Row
    environment: Row

    @property
    def name(self) -> str:
        return str(self.summary.get("name") or self.directory.resolve().name)

    @property
    def finished(self) -> bool:
        return bool(self.summary.get("after"))

    def side(self, name: str) -> Row:
        """The summary's `before` or `after`; empty when it was not evaluated."""
        return self.summary.get(name) or {}


def read_run(run_dir: Path, metrics: Metrics = Metrics()) -> Run:
    """Read and check the files of a run directory; raises DataError as `write_report` does."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a directory: give the run directory a training run wrote")
    config = run_dir / "config.yaml"
    run = Run(
        directory=run_dir,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        epochs=_read_metrics(run_dir / "metrics.jsonl", metrics),
        samples=_read_lines(run_dir / "samples" / "metadata.jsonl", required=("file_name", "prompt")),
        summary=read_object(run_dir / "summary.json") | _measured_minutes(run_dir),
        environment=read_object(run_dir / "environment.json"),
    )
    for line, row in enumerate(run.samples, start=1):
        if Path(str(row["file_name"])).name != row["file_name"]:
            where = run_dir / "samples" / "metadata.jsonl"
            raise DataError(f"{where}, line {line}: file_name is {row['file_name']!r}, expected a bare file name")
    return run


def read_evaluations(run_dir: Path, sides: Sequence[str]) -> dict[str, Row]:
    """By side, what summary.json will say of it: of a run that is not finished these are all the scores there are."""
    files = {side: run_dir / f"evaluation_{side}.json" for side in sides}
    found: dict[str, Row] = {}
    for side, file in files.items():
        if file.is_file():
            summary = read_object(file).get("summary")
            if not isinstance(summary, dict):
                raise DataError(f"{file}: summary is {summary!r}, expected an object: delete it and resume the run")
            found[side] = summary
    return found


def _measured_minutes(run_dir: Path) -> Row:
    """Wall time is kept apart, so that equal runs have equal summaries; the page shows it in place of the limit."""
    timing = read_object(run_dir / "timing.json")
    return {"minutes": timing["train_minutes"]} if "train_minutes" in timing else {}


def _parse(text: str, where: str) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}): repair or delete it") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_object(path: Path) -> Row:
    """A JSON object; empty where there is no such file. Raises DataError for anything else, naming the file."""
    return _parse(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def _read_lines(path: Path, required: Iterable[str]) -> list[Row]:
    if not path.is_file():
        return []
    rows = []
    content = path.read_text(encoding="utf-8")
    # Not splitlines(): it would also split at a U+2028 inside a prompt.
    for line, text in enumerate(content.removesuffix("\n").split("\n") if content else [], start=1):
        where = f"{path}, line {line}"
        row = _parse(text, where)
        missing = [key for key in required if key not in row]
        if missing:
            raise DataError(f"{where}: no {' and no '.join(map(repr, missing))} in {sorted(row)}")
        rows.append(row)
    return rows


def _read_metrics(path: Path, metrics: Metrics) -> list[Row]:
    rows = _read_lines(path, metrics.numbers)
    for line, row in enumerate(rows, start=1):
        _check_metrics(row, f"{path}, line {line}", metrics)
    return rows


def _check_metrics(row: Mapping[str, Any], where: str, metrics: Metrics) -> None:
    for key in metrics.mappings:
        if not isinstance(row.get(key) or {}, dict):
            raise DataError(f"{where}: {key} is {row[key]!r}, expected an object of name to number")
    for key in metrics.numbers:
        if finite(row[key]) is None:
            raise DataError(f"{where}: {key} is {row[key]!r}, expected a number")
