"""A sweep over beta: one DIDR run per temperature and way to use the reward, one after another, and their comparison.

    crd-fast didr recipes/shapes_didr.yaml run.dir=runs/sweep --beta 0.002 0.02 0.2 --reward-at diffused endpoint

Every run has a folder of its own, `<reward_at>-beta-<beta>`, as a single run leaves it. Beside them are config.yaml,
the recipe that all share, `report.html`, and `sweep.json`, which is made again after each run:

    name, model     of the recipe
    reward          name of the training reward; a side's summary has its mean under this key
    score           key of a side's summary that tells how good its images are: geneval_strict with the shapes suite,
                    else the reward's name; higher is better
    runs            how many were asked for; the sweep is finished when there are as many rows
    rows            of the runs that are evaluated, by reward_at, then beta:
        folder              of the run, in the sweep's
        reward_at, beta     algorithm.reward_at ("diffused", "endpoint") and algorithm.beta
        seed                run.seed
        before, after       summaries, as in summary.json: the one-step generator as it began and as it was trained
        reference           the same of the multi-step reference
        minutes             of training
    failed          runs given up in this start, because steps stayed not finite: folder, reward_at, beta, seed, reason
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crd_fast.didr import job
from crd_fast.didr.pareto import as_beta, write_sweep_report
from crd_fast.didr.recipe import DIDRRecipe, dump_recipe, load_recipe
from crd_fast.didr.report import write_report
from crd_fast.didr.report_files import SIDES, SWEEP
from crd_fast.errors import ConfigError, NonFiniteError
from crd_fast.progress import Reporter
from crd_fast.training.launch import Session, launch, open_directory
from crd_fast.training.run_directory import RunDirectory
from crd_fast.whole_files import write_json, write_text

Row = dict[str, Any]
NEW, UNFINISHED, FINISHED = "new", "unfinished", "finished"


@dataclass(frozen=True)
class Member:
    """One run of a sweep. folder: its name in the sweep's directory."""

    recipe: DIDRRecipe
    folder: str

    @classmethod
    def of(cls, recipe: DIDRRecipe) -> Member:
        algorithm = recipe.algorithm
        assert algorithm.beta is not None  # a sweep sets it
        return cls(recipe, f"{algorithm.reward_at}-beta-{as_beta(algorithm.beta)}")

    def within(self, directory: RunDirectory) -> DIDRRecipe:
        """The recipe, to be run in its folder there."""
        return replace(self.recipe, run=replace(self.recipe.run, dir=str(directory / self.folder)))

    def row(self) -> Row:
        algorithm = self.recipe.algorithm
        return {
            "folder": self.folder,
            "reward_at": algorithm.reward_at,
            "beta": algorithm.beta,
            "seed": self.recipe.run.seed,
        }


def sweep(
    path: str | Path,
    overrides: Sequence[str],
    betas: Sequence[float],
    rewards_at: Sequence[str] = (),
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Run a recipe for every one of `betas` and `rewards_at`; returns the sweep's directory. Under torchrun, every rank
    calls it.

    rewards_at: none leaves it to the recipe. resume: runs that are finished stay as they are, one that was stopped
    continues, and what was not asked for before is added.

    Raises ConfigError for a beta that is not a number > 0, for values that come twice, for a recipe without a reward,
    for a directory that has a run or a sweep already, or has none to resume; CrdFastError and Interrupted as `job.run`
    does. A run whose steps stay not finite does not end the others: NonFiniteError after the last of them.
    """
    base, members = plan(path, overrides, betas, rewards_at)

    def check_resumed(directory: RunDirectory) -> None:
        if not (directory / SWEEP).exists():
            raise ConfigError(
                f"--resume: {directory.path} holds a run, not a sweep: continue it without --beta, or name a sweep "
                "with run.dir=..."
            )
        base.check_resumed(directory)

    settings = replace(
        job.launch_settings(base),
        dumped="\n".join(dump_recipe(member.recipe) for member in members),
        check_resumed=check_resumed,
    )
    return launch(settings, lambda session: _Sweep(base, members, session).run(), resume=resume, reporter=reporter)


def plan(
    path: str | Path, overrides: Sequence[str], betas: Sequence[float], rewards_at: Sequence[str]
) -> tuple[DIDRRecipe, list[Member]]:
    """The recipe without a beta of the sweep, and its runs. Raises ConfigError, see `sweep`."""
    for option, key, values in (
        ("--beta", "algorithm.beta", betas),
        ("--reward-at", "algorithm.reward_at", rewards_at),
    ):
        if values and any(override.partition("=")[0] == key for override in overrides):
            raise ConfigError(f"{option} and {key}=... both say what it is: leave one of them out")
        twice = sorted({str(value) for value in values if list(values).count(value) > 1})
        if twice:
            raise ConfigError(f"{option} has {', '.join(twice)} more than once: give each value once")
    wrong = [beta for beta in betas if not (math.isfinite(beta) and beta > 0)]
    if wrong or not betas:
        raise ConfigError(f"--beta is {', '.join(map(str, wrong)) or 'empty'}: expected one or more numbers > 0")
    kinds = [[f"algorithm.reward_at={kind}"] for kind in rewards_at] or [[]]
    members = [
        Member.of(load_recipe(path, [*overrides, *kind, f"algorithm.beta={beta!r}"]))
        for kind in kinds
        for beta in betas
    ]
    base = load_recipe(path, overrides)
    if base.reward is None:
        raise ConfigError("--beta sets how much a reward counts, and the recipe has none: give it one, or leave it out")
    return base, members


class _Sweep:
    def __init__(self, base: DIDRRecipe, members: Sequence[Member], session: Session) -> None:
        self.base, self.members, self.session = base, members, session
        self.directory, self.ranks, self.report = session.directory, session.ranks, session.report
        self.failed: list[Row] = []

    def run(self) -> Path:
        with self.ranks.together("looking at the runs of the sweep"):
            states = self._states() if self.ranks.first else []
        states = self.ranks.tell(states)
        if self.ranks.first:
            write_text(self.directory / "config.yaml", dump_recipe(self.base))
        self._write()
        self.report.say(f"sweep directory {self.directory.path}")
        for number, (member, state) in enumerate(zip(self.members, states, strict=True), start=1):
            told = {NEW: "", UNFINISHED: ", continued", FINISHED: ", finished already"}[state]
            self.report.say(f"run {number} of {len(self.members)}: {member.folder}{told}")
            if state == FINISHED:
                if self.ranks.first:
                    write_report(self.directory / member.folder)
            else:
                self._run(member, resume=state == UNFINISHED)
            self._write()
        if self.ranks.first:
            self.report.say(f"report {self.directory / 'report.html'}")
        self.ranks.wait()
        if self.failed:
            names = ", ".join(row["folder"] for row in self.failed)
            raise NonFiniteError(
                f"{len(self.failed)} of {len(self.members)} runs failed ({names}); the others are done"
            )
        return self.directory.path

    def _run(self, member: Member, resume: bool) -> None:
        recipe = member.within(self.directory)
        directory = open_directory(job.launch_settings(recipe), resume, self.ranks)
        try:
            job.work(recipe, replace(self.session, directory=directory, resume=resume))
        except NonFiniteError as error:  # on every rank: gradients are averaged before they are looked at
            self.report.say(f"{member.folder} failed: {error}")
            self.failed.append(member.row() | {"reason": str(error)})
        finally:
            directory.release()
        _free(recipe)

    def _states(self) -> list[str]:
        """What is there of each run. Raises ConfigError for one that this sweep did not make, or made differently."""
        states = []
        for member in self.members:
            folder = RunDirectory(self.directory / member.folder)
            if not (folder / "config.yaml").exists():
                states.append(NEW)
                continue
            if not self.session.resume:
                raise ConfigError(f"{folder.path} already holds a run: name another run.dir, or move it away")
            member.recipe.check_resumed(folder)
            states.append(FINISHED if _finished(folder, member.recipe) else UNFINISHED)
        members = {member.folder for member in self.members}
        others = [row["folder"] for row in self._folders() if row["folder"] not in members]
        shorter = [name for name in others if not _finished(RunDirectory(self.directory / name), self.base)]
        if shorter:
            raise ConfigError(
                f"{', '.join(shorter)} of this sweep ended with other train.epochs, train.max_minutes or "
                "train.towards_start: name their values too, so that they continue, or leave the settings as they were"
            )
        return states

    def _write(self) -> None:
        """sweep.json and the page, of what there is by now, with the runs of earlier starts."""
        if not self.ranks.first:
            return
        rows = [row for row in map(self._read, self._folders()) if row is not None]
        suite = any("geneval_strict" in row["after"] for row in rows)
        assert self.base.reward is not None  # see `plan`
        reward = self.base.reward.name
        failed = {row["folder"] for row in self.failed}
        found = {
            "name": self.base.name,
            "model": self.base.model.path,
            "reward": reward,
            "score": "geneval_strict" if suite else reward,
            "runs": len({member.folder for member in self.members} | {row["folder"] for row in rows}),
            "rows": [row for row in rows if row["folder"] not in failed],
            "failed": self.failed,
        }
        write_json(self.directory / SWEEP, found)
        write_sweep_report(self.directory.path)

    def _folders(self) -> list[Row]:
        """Rows without scores: of this start's runs, and of those that an earlier start has finished."""
        file = self.directory / SWEEP
        earlier = json.loads(file.read_text())["rows"] if file.exists() else []
        known = {row["folder"]: row for row in [*earlier, *(member.row() for member in self.members)]}
        return sorted(known.values(), key=lambda row: (row["reward_at"], row["beta"]))

    def _read(self, row: Row) -> Row | None:
        """The row with what its run has left; None where it is not evaluated yet."""
        folder = self.directory / row["folder"]
        summary, timing = _json(folder / "summary.json"), _json(folder / "timing.json")
        if any(side not in summary for side in SIDES):
            return None
        return row | {side: summary[side] for side in SIDES} | {"minutes": timing.get("train_minutes")}


def _finished(directory: RunDirectory, recipe: DIDRRecipe) -> bool:
    """Whether a run is evaluated, after all of its epochs or minutes and as far back towards its start as it should."""
    summary, limit = _json(directory / "summary.json"), recipe.train.max_minutes
    if any(side not in summary for side in SIDES):
        return False
    if summary.get("towards_start", 0.0) != recipe.train.towards_start:
        return False
    spent = _json(directory / "timing.json").get("train_minutes", 0.0)
    return bool(summary["epochs"] >= recipe.train.epochs or (limit is not None and spent > limit))


def _json(file: Path) -> Row:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _free(recipe: DIDRRecipe) -> None:
    """Give back what a run's models held, and what was compiled of them."""
    gc.collect()
    if recipe.acceleration.compile:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_values(words: Iterable[str], overrides: list[str], option: str) -> list[str]:
    """The values of an option that takes several; words like key=value among them are overrides, and go there."""
    values: list[str] = []
    for word in words:
        (overrides if "=" in word else values).append(word)
    if not values:
        raise ConfigError(f"{option}: expected one or more values, got only overrides")
    return values


def read_betas(words: Iterable[str]) -> list[float]:
    """Numbers of text. Raises ConfigError naming what is none."""
    betas = []
    for word in words:
        try:
            betas.append(float(word))
        except ValueError:
            raise ConfigError(f"--beta {word!r}: expected a number > 0") from None
    return betas
