"""Errors a user can act on. Each says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class CrdFastError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it and exits with code 2."""


class ConfigError(CrdFastError, ValueError):
    """A recipe, an override or a combination of settings is wrong."""


class DataError(CrdFastError, ValueError):
    """A prompt set or its metadata is wrong."""


class RewardError(CrdFastError, RuntimeError):
    """A reward could not score a batch, or returned something that is not a score."""


class CheckpointError(CrdFastError, RuntimeError):
    """No usable checkpoint where one was asked for."""


class ExtensionMissingError(CrdFastError, ImportError):
    """The compiled C++ extension is not there."""


class TransformError(CrdFastError, NotImplementedError):
    """An operator was called under a function transform that it has no rule for."""


class NonFiniteError(CrdFastError, FloatingPointError):
    """Losses or gradients stayed NaN or infinite."""


def exhausted(error: BaseException) -> str | None:
    """What the machine has run out of, memory or room on a disk, and what to do; None for any other error."""
    seen: BaseException | None = error
    while seen is not None:
        text = (str(seen).splitlines() or [""])[0]
        no_room = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if no_room or "No space left on device" in text:
            return f"no room is left on the disk ({text}): make some, and start again; runs continue with --resume"
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError" or _CPU_MEMORY in text:
            return (
                f"out of memory ({text}): use less at a time, such as train.micro_batch, rollout.batch or "
                "decode.micro_batch of a recipe, --batch of eval and score, or see docs/precision_and_memory.md"
            )
        seen = seen.__cause__ or seen.__context__
    return None


_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, or the list of valid names."""
    names = sorted(valid)
    listed = f"; valid names: {', '.join(names)}" if names else ""
    return did_you_mean(name, names) or listed


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, nothing where none is close."""
    close = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
