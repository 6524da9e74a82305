"""Rewards of the user's own: a function or a class in a file or a package, named by the recipe.

A recipe that names code runs it, so somebody else's is to be read before it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from crd_fast.errors import ConfigError, CrdFastError, nearest
from crd_fast.rewards.base import BrokenRewardError, Metadata

RUNS = ("here", "thread", "process")


@dataclass(frozen=True)
class CustomOptions:
    """source: "FILE.py:NAME" or "package.module:NAME", a function or a class; arguments: keywords of the function at
    every call, of the class when it is made.

    runs: "here" on the caller's thread, in a "thread", for what waits, or in a "process" of its own, for what computes
    on a core; workers: so many of them.
    """

    source: str
    arguments: dict[str, Any] | None = None
    runs: str = "here"
    workers: int = 1

    def __post_init__(self) -> None:
        place, _, name = self.source.rpartition(":")
        if not place or not name.isidentifier():
            raise ConfigError(
                f"source of a custom reward is {self.source!r}: expected FILE.py:NAME or package.module:NAME, "
                "the name of a function or a class there"
            )
        if self.runs not in RUNS:
            raise ConfigError(f"runs of a custom reward is {self.runs!r}{nearest(self.runs, RUNS)}")
        if self.workers < 1 or (self.workers > 1 and self.runs == "here"):
            expected = "at least 1" if self.workers < 1 else "1, or runs set to thread or process"
            raise ConfigError(f"workers of a custom reward is {self.workers}: expected {expected}")


class CustomReward:
    """What `source` names, as a `Reward`.

    It is called with images (B, 3, H, W) in [0, 1], B prompts and B metadata entries, and returns B numbers (a tensor,
    an array or a list), or a dict of them: the score under "score", or under its attribute `name` where it has one, and
    diagnostics. Its attributes `requires`, `range`, `differentiable`, `differentiable_scores` and `check_prompt` are
    those of `Reward`, `DifferentiableReward` and `ChecksPrompts`, where it has them; without `differentiable_scores`
    gradients go through the call.

    Raises ConfigError where the source cannot be had, BrokenRewardError, with the line, where its code fails.
    """

    def __init__(self, options: CustomOptions, name: str = "custom") -> None:
        self.name, self._source = name, options.source
        found, arguments = _load(options.source, name), dict(options.arguments or {})
        if isinstance(found, type):
            with self._blaming():
                found, arguments = found(**arguments), {}
        if not callable(found):
            raise ConfigError(
                f"reward {name!r}: {options.source} is of type {type(found).__name__}, which cannot be called with "
                "images, prompts and metadata"
            )
        self._own: Callable[..., Any] = found
        self._arguments = arguments
        self._key = str(getattr(found, "name", "score"))
        self.requires: frozenset[str] = frozenset(getattr(found, "requires", ()))
        self.range: tuple[float, float] | None = getattr(found, "range", None)
        self.differentiable = bool(getattr(found, "differentiable", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """float32 (B,) CPU tensors: the score under this reward's name, and its diagnostics."""
        with torch.no_grad(), self._blaming():
            columns = self._columns(self._own(images, prompts, metadata, **self._arguments))
            values = {key: torch.as_tensor(value).detach().cpu().float() for key, value in columns.items()}
        return {self.name: values.pop(self._key)} | values

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores (B,) with a graph to the images, on their device."""
        call = getattr(self._own, "differentiable_scores", self._own)
        with self._blaming():
            scores = self._columns(call(images, prompts, metadata, **self._arguments))[self._key]
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (len(prompts),):
            shown = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise BrokenRewardError(f"reward {self.name!r} returned {shown}: expected a tensor ({len(prompts)},)")
        return scores.to(images.device)

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Its own check, where it has one. Raises DataError where that does."""
        with self._blaming():
            getattr(self._own, "check_prompt", lambda prompt, metadata: None)(prompt, metadata)

    def _columns(self, found: Any) -> dict[str, Any]:
        columns = dict(found) if isinstance(found, Mapping) else {self._key: found}
        if self._key not in columns:
            raise BrokenRewardError(
                f"reward {self.name!r}: {self._source} returned {sorted(columns)}: expected its score under "
                f"{self._key!r}"
            )
        return columns

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Errors become BrokenRewardError with the last line of the source's own file that was reached."""
        try:
            yield
        except CrdFastError:
            raise
        except Exception as error:
            raise BrokenRewardError(f"reward {self.name!r} failed in {_place(error, self._source)}") from error


def source_digest(options: CustomOptions) -> str:
    """SHA-256 of the file that a reward's code is in: scores of other code are not its own."""
    return hashlib.sha256(Path(_file(options.source)).read_bytes()).hexdigest()


def _load(source: str, reward: str) -> Any:
    place, _, name = source.rpartition(":")
    try:
        module = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
    except CrdFastError:
        raise
    except Exception as error:
        raise ConfigError(f"reward {reward!r}: {source} cannot be imported: {_place(error, source)}") from error
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(f"reward {reward!r}: {place} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def _module_of_file(path: str) -> ModuleType:
    """The module in a file, once a process: what it holds, such as a model, is shared by the rewards that use it."""
    file = Path(path).resolve()
    name = f"crd_fast_custom_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ConfigError(f"source of a custom reward is in {path}, which is not a file (looked for {file})")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _file(source: str) -> str:
    """The file of a source; of a module its name where it is no file."""
    place = source.rpartition(":")[0]
    if place.endswith(".py"):
        return str(Path(place).resolve())
    return getattr(sys.modules.get(place), "__file__", None) or place


def _place(error: Exception, source: str) -> str:
    """What happened and where, as far down as the code of the source goes."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _file(source)]
    where = f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: " if own else f"{source}: "
    return f"{where}{type(error).__name__}: {error}"
