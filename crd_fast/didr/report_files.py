"""The files of a DIDR run's directory, read and checked for its report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from crd_fast.errors import DataError
from crd_fast.evaluation.plots import finite
from crd_fast.evaluation.run_files import Metrics, Row, Run, read_evaluations, read_object, read_run

ONE_STEP = ("before", "after")  # sides of the generator
REFERENCE = "reference"
SIDES = (*ONE_STEP, REFERENCE)
SWEEP = "sweep.json"  # in the directory of several runs, see `crd_fast.didr.sweep`
_METRICS = Metrics(
    numbers=("epoch", "iteration"),
    mappings=("reward", "correction_ratio", "grad_norm", "skipped_steps", "seconds"),
)


@dataclass(frozen=True)
class DIDRRun:
    """A run, and what its config.yaml says of it; None where that is not known.

    run: its summary has the sides that were evaluated, also where the run is not finished. beta: as measured or set.
    towards_start: share of the way back to the start that the result was moved. suite: whether images were judged by a
    suite, which has tasks, and not by the reward alone.
    """

    run: Run
    reward: str | None
    beta: float | None
    reward_at: str | None
    steps: int | None
    towards_start: float | None

    @property
    def suite(self) -> bool:
        evaluated = [self.run.side(side) for side in SIDES if self.run.side(side)]
        return not evaluated or any("tasks" in side for side in evaluated)


def read_didr_run(run_dir: Path) -> DIDRRun:
    """Read and check the files; raises DataError as `crd_fast.didr.report.write_report` does."""
    run = read_run(run_dir, _METRICS)
    # a run that is not finished may have been evaluated already, but has no summary yet
    run = replace(run, summary=read_evaluations(run_dir, SIDES) | run.summary)
    config = _config(run)
    algorithm, measured = _section(config, "algorithm"), read_object(run_dir / "beta.json")
    beta = finite(algorithm.get("beta"))
    name, reward_at = _section(config, "reward").get("name"), algorithm.get("reward_at")
    steps = _section(config, "evaluation").get("steps")
    return DIDRRun(
        run=run,
        reward=None if name is None else str(name),
        beta=finite(measured.get("beta")) if beta is None else beta,
        reward_at=None if reward_at is None else str(reward_at),
        steps=steps if isinstance(steps, int) else None,
        towards_start=finite(_section(config, "train").get("towards_start")),
    )


def _config(run: Run) -> Row:
    """The resolved recipe. Raises DataError when config.yaml is something else."""
    if run.config is None:
        return {}
    path = run.directory / "config.yaml"
    try:
        config = yaml.safe_load(run.config)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({error}): repair or delete it") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds a {type(config).__name__}, expected the sections of a recipe")
    return config


def _section(config: Row, name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
