"""What surrounds the work of every training command: the device, the ranks, the run directory, signals, and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from crd_fast.errors import ConfigError, CrdFastError
from crd_fast.progress import Reporter
from crd_fast.ranks import RankError, Ranks, choose_device, lost
from crd_fast.training.config import RunSettings
from crd_fast.training.run_directory import RunDirectory
from crd_fast.training.stop import Interrupted, StopRequest


@dataclass(frozen=True)
class Session:
    """One start of a run on one rank. resume: it goes on with an earlier start."""

    directory: RunDirectory
    report: Reporter
    stop: StopRequest
    ranks: Ranks
    device: torch.device
    resume: bool


@dataclass(frozen=True)
class Launch:
    """What has to be known of a recipe before anything of it is loaded.

    name: of the recipe; dumped: all of it as text, equal on every rank; timeout_minutes: after which a rank that waits
    for another gives up; less_memory: which settings to lower when memory runs out. check_resumed: raises ConfigError
    when the run in a directory was made with other settings.
    """

    name: str
    run: RunSettings
    dumped: str
    timeout_minutes: float
    less_memory: str
    check_resumed: Callable[[RunDirectory], None]


def launch(
    settings: Launch, work: Callable[[Session], Path], *, resume: bool, reporter: Reporter | None = None
) -> Path:
    """Do the work of a run and return what it returns. Under torchrun, every rank calls this.

    Raises CrdFastError for anything the user can mend, and Interrupted after a signal.
    """
    device = choose_device(settings.run.device)
    ranks = Ranks.from_environment(device, settings.timeout_minutes)
    try:
        ranks.same("the recipe", settings.dumped)
        with ranks.together("opening the run directory"):
            directory = open_directory(settings, resume, ranks)
        with reporter or (Reporter() if ranks.first else Reporter.silent()) as report, StopRequest() as stop:
            try:
                return work(Session(directory, report, stop, ranks, device, resume))
            except Interrupted as stopped:
                report.say(f"{stopped}; continue with --resume run.dir={directory.path}")
                raise
            except torch.OutOfMemoryError as error:
                raise CrdFastError(
                    f"out of memory on {device}: lower {settings.less_memory}; {directory.path} can be continued with "
                    f"--resume ({error})"
                ) from error
            except dist.DistError as error:
                raise lost(ranks, error) from error
            finally:
                directory.release()
    finally:
        ranks.close()


def open_directory(settings: Launch, resume: bool, ranks: Ranks) -> RunDirectory:
    """The first rank finds or makes the directory, and holds it until its `release`; the others are told of it."""
    name = directory = None
    failure: ConfigError | None = None
    if ranks.first:
        try:
            directory = RunDirectory.open(settings.run.dir, settings.name, resume=resume)
            if resume:
                settings.check_resumed(directory)
            name = str(directory.path)
        except ConfigError as error:
            failure = error
            if directory is not None:
                directory.release()
    name = ranks.tell(name)
    if failure is not None:
        raise failure
    if name is None:
        raise RankError("the first rank could not open the run directory: see its message")
    return directory or RunDirectory(Path(name))
