"""Epoch after epoch of any trainer: metrics, checkpoints, a time limit, and a stop that can be resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from crd_fast.errors import CheckpointError, NonFiniteError
from crd_fast.ranks import OtherRankError, RankError
from crd_fast.training.checkpoint import CheckpointStore
from crd_fast.training.launch import Session
from crd_fast.training.resume import EpochStart, EpochTrainer
from crd_fast.training.stop import Interrupted
from crd_fast.training.tensorboard import Scalars
from crd_fast.training.wandb_log import WandbLog


@dataclass(frozen=True)
class LoopSettings:
    """epochs: in all; max_minutes: stop after the epoch that passes it; checkpoint_every: epochs."""

    epochs: int
    max_minutes: float | None
    checkpoint_every: int


class EpochLoop:
    """Runs a trainer to its last epoch in a run directory.

    export: writes what goes into a checkpoint besides the state, such as an adapter. note: what a glance at an epoch's
    row should tell. wandb: project that metrics go to as well.

    Raises ConfigError where that cannot be had.
    """

    def __init__(
        self,
        session: Session,
        store: CheckpointStore,
        trainer: EpochTrainer,
        settings: LoopSettings,
        export: Callable[[Path], None],
        note: Callable[[dict[str, Any]], str],
        wandb: str | None = None,
    ) -> None:
        self.session, self.store, self.trainer, self.settings = session, store, trainer, settings
        self.export, self.note = export, note
        self.logs: list[Scalars | WandbLog] = []
        with session.ranks.together("beginning a run of wandb"):
            if wandb is not None and session.ranks.first:
                self.logs.append(WandbLog(wandb, session.directory.path, session.report.say))

    def restore(self) -> None:
        """Go back to the newest whole checkpoint, or to the beginning where there is none."""
        trainer, report, ranks = self.trainer, self.session.report, self.session.ranks
        epochs = 0
        if self.store.newest_path() is None:
            report.say("no checkpoint yet: starting from the beginning")
        else:
            path, values = self.store.latest(report.say)
            self.store.load(path, trainer.tensors())
            trainer.set_values(values)
            epochs = trainer.epoch
            report.say(f"resumed from {path.name} after {epochs} epochs")
        if ranks.first:
            self.session.directory.truncate_metrics(epochs)
        ranks.wait()

    def run(self) -> None:
        """Train the epochs that are left.

        Raises Interrupted when a stop was asked for, after a checkpoint to continue from; NonFiniteError, which names
        the last good checkpoint.
        """
        if self.session.ranks.first:
            self.logs.append(Scalars(self.session.directory / "tensorboard", self.trainer.epoch))
        failed = True
        try:
            self._run()
            failed = False
        except Interrupted:
            failed = False
            raise
        finally:
            for log in self.logs:
                log.close(failed)

    def _run(self) -> None:
        trainer, settings, report = self.trainer, self.settings, self.session.report
        ranks, directory = self.session.ranks, self.session.directory
        report.begin("training", settings.epochs, trainer.epoch)
        started, elapsed_before = time.perf_counter(), ranks.tell(self._elapsed_before())
        over = self._over(elapsed_before)
        start = None
        while trainer.epoch < settings.epochs and not over:
            del start  # its copies go before the next are made
            start = EpochStart(trainer)
            try:
                row = trainer.run_epoch()
            except Interrupted:
                self._save_interrupted(start)
                raise
            except NonFiniteError as error:
                self.store.finish()
                last = self.store.newest_path()
                raise NonFiniteError(f"{error}; last good checkpoint: {last or 'none yet'}") from error
            except Exception as error:
                self._finish_after(error)
                raise
            row["elapsed_seconds"] = ranks.tell(elapsed_before + time.perf_counter() - started)
            if ranks.first:
                directory.append_metrics(row)
            for log in self.logs:
                log.write(row)
            report.update(trainer.epoch, self.note(row), line=True)
            over = self._over(row["elapsed_seconds"])
            if trainer.epoch % settings.checkpoint_every == 0 or trainer.epoch == settings.epochs or over:
                self._save()
        if over:
            report.say(f"train.max_minutes {settings.max_minutes} reached after {trainer.epoch} epochs")
        self.store.finish()

    def _over(self, seconds: float) -> bool:
        """Whether a run that has trained so long has used up its time."""
        return self.settings.max_minutes is not None and seconds > 60 * self.settings.max_minutes

    def _elapsed_before(self) -> float:
        """Training seconds of the epochs a resumed run already has."""
        path = self.session.directory / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return float(json.loads(rows[-1])["elapsed_seconds"]) if rows else 0.0

    def _finish_after(self, error: Exception) -> None:
        """Let the save that is being written come to its end, which every rank has to do for it."""
        if isinstance(error, dist.DistError | RankError) and not isinstance(error, OtherRankError):
            return  # one that waits for a rank that is gone would not finish
        try:
            self.store.finish()
        except CheckpointError as also:
            self.session.report.say(str(also))  # what came first is what the user has to see

    def _save(self, *, wait: bool = False) -> None:
        trainer = self.trainer
        self.store.save(trainer.epoch, trainer.tensors(), trainer.values(), self.export, wait=wait)

    def _save_interrupted(self, start: EpochStart) -> None:
        """A stopped epoch is begun again: what is saved is its start, where that is still known."""
        report = self.session.report
        if start.restore(self.trainer):
            self._save(wait=True)
            report.say(f"saved after {self.trainer.epoch} epochs")
            return
        self.store.finish()
        last = self.store.newest_path()
        report.say(f"stopped inside an epoch's updates; {f'{last.name} is the last checkpoint' if last else ''}")
