"""Rewards of the user's own: a function or a class in a file or a package, named by the recipe.

A recipe that names code runs it, so somebody else's is to be read before it is used.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        if not place or place.endswith(":") or not name.isidentifier():
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

    It is called with images (B, 3, H, W) in [0, 1], B prompts and B metadata entries, all of them its own to change,
    and returns B numbers (a tensor, an array or a list), or a dict of them: the score under "score", or under its
    attribute `name`, and diagnostics. Its attributes `requires`, `range`, `differentiable`, `differentiable_scores` and
    `check_prompt` are those of `Reward`, `DifferentiableReward` and `ChecksPrompts`, where it has them; without
    `differentiable_scores` gradients go through the call.

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
        with self._blaming():
            own_name, requires, limits = (getattr(found, key, None) for key in ("name", "requires", "range"))
            self.differentiable = bool(getattr(found, "differentiable", False))
        self._keys = ("score",) if own_name is None else (str(own_name), "score")
        self.requires: frozenset[str] = self._names(requires)
        self.range: tuple[float, float] | None = self._limits(limits)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """float32 (B,) CPU tensors: the score under this reward's name, and its diagnostics."""
        with torch.no_grad(), self._blaming():
            # copies: other rewards see the same images, and the next epoch the same metadata
            found = self._own(images.clone(), list(prompts), copy.deepcopy(list(metadata)), **self._arguments)
        score, others = self._parts(found)
        return {self.name: self._numbers(score, len(prompts))} | {
            key: self._numbers(value, len(prompts), key) for key, value in others.items()
        }

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores (B,) with a graph to the images, on their device; errors of its code pass."""
        call, arguments = self._own, self._arguments
        if hasattr(call, "differentiable_scores"):
            call, arguments = call.differentiable_scores, {}
        # as it is: what recomputes activations ends a forward pass by exceptions of its own, through this code
        found = call(images, list(prompts), copy.deepcopy(list(metadata)), **arguments)
        scores, _ = self._parts(found)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (len(prompts),):
            shown = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise self._wrong(f"its differentiable scores are {shown}: expected a tensor ({len(prompts)},)")
        if images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise self._wrong(
                "its differentiable scores have no gradient in the images: expected arithmetic of PyTorch alone, "
                "without no_grad, detach or a way through arrays"
            )
        return scores.to(images.device)

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Its own check, where it has one. Raises DataError where that does."""
        with self._blaming():
            getattr(self._own, "check_prompt", lambda prompt, metadata: None)(prompt, copy.deepcopy(metadata))

    def _parts(self, found: Any) -> tuple[Any, dict[str, Any]]:
        """The score, and the diagnostics by name."""
        if not isinstance(found, Mapping):
            return found, {}
        columns = dict(found)
        key = next((key for key in self._keys if key in columns), None)
        if key is None:
            raise self._wrong(f"it returned {sorted(map(str, columns))}: expected its score under {self._keys[-1]!r}")
        score = columns.pop(key)
        if self.name in columns:
            raise self._wrong(f"it returned a diagnostic under its own name, {self.name!r}: name it otherwise")
        return score, {str(name): value for name, value in columns.items()}

    def _numbers(self, value: Any, count: int, key: str = "") -> Tensor:
        what = f"its diagnostic {key!r}" if key else "it"
        try:
            given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32, device="cpu")
            numbers = given.detach().cpu().float()
        except (TypeError, ValueError, RuntimeError) as error:
            shown = f"a {type(value).__name__}" if not isinstance(value, list | tuple) else repr(value)[:200]
            raise self._wrong(
                f"{what} returned {shown}: expected {count} numbers, NaN for an image that cannot be scored"
            ) from error
        if tuple(numbers.shape) != (count,):
            raise self._wrong(f"{what} returned shape {tuple(numbers.shape)} for {count} images: expected ({count},)")
        return numbers

    def _names(self, requires: Any) -> frozenset[str]:
        names = () if requires is None else requires
        if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(key, str) for key in names):
            raise ConfigError(
                f"reward {self.name!r}: requires is {requires!r}: expected names of metadata keys, such as ['style']"
            )
        return frozenset(names)

    def _limits(self, limits: Any) -> tuple[float, float] | None:
        if limits is None:
            return None
        try:
            low, high = (float(limit) for limit in limits)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reward {self.name!r}: range is {limits!r}: expected (lowest, highest)") from error
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(
                f"reward {self.name!r}: range is {limits!r}: expected two finite numbers, the lowest first; leave it "
                "out where one side has no end"
            )
        return low, high

    def _wrong(self, what: str) -> BrokenRewardError:
        return BrokenRewardError(f"reward {self.name!r}, {self._source}: {what}")

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Errors become BrokenRewardError with the last line of the source's own file that was reached."""
        try:
            yield
        except CrdFastError:
            raise
        except (Exception, SystemExit) as error:  # code that exits would end a run as if it were finished
            raise BrokenRewardError(f"reward {self.name!r} failed in {_place(error, self._source)}") from error


def source_digest(options: CustomOptions) -> str:
    """SHA-256 of the file that a reward's code is in: scores of other code are not its own. Of its name alone where it
    is compiled into Python."""
    file = Path(_file(options.source))
    return hashlib.sha256(file.read_bytes() if file.is_file() else str(file).encode()).hexdigest()


def code_digests(options: Mapping[str, Any]) -> dict[str, str]:
    """`source_digest` of each reward that is the user's own, by name."""
    return {name: source_digest(given) for name, given in options.items() if isinstance(given, CustomOptions)}


def changed_code(name: str) -> str:
    """What a run that continues says of a reward whose digest has changed."""
    return f"reward {name!r}: its code is not what this run began with; numbers before and after may not compare"


def _load(source: str, reward: str) -> Any:
    place, _, name = source.rpartition(":")
    try:
        module = _module_of_file(place) if place.endswith(".py") else _module_of_package(place)
    except CrdFastError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward {reward!r}: {source} cannot be imported: {_place(error, source)}") from error
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(f"reward {reward!r}: {place} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def _module_of_package(name: str) -> ModuleType:
    """As Python finds it, and in the working directory, which a console script does not look into."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _module_of_file(path: str) -> ModuleType:
    """The module in a file, once a process: what it holds, such as a model, is shared by the rewards that use it."""
    file = Path(path).expanduser().resolve()
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
        return str(Path(place).expanduser().resolve())
    return getattr(sys.modules.get(place), "__file__", None) or place


def _place(error: BaseException, source: str) -> str:
    """What happened and where, as far down as the code of the source goes."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _file(source)]
    where = f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: " if own else f"{source}: "
    return f"{where}{type(error).__name__}: {error}"
