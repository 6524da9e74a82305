"""Errors a user can act on. Each says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
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


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, or the list of valid names."""
    names = sorted(valid)
    listed = f"; valid names: {', '.join(names)}" if names else ""
    return did_you_mean(name, names) or listed


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, nothing where none is close."""
    close = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
