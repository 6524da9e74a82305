"""Models that score images: loaded at the first use, one copy of each for all rewards that need it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError

from crd_fast.errors import ConfigError, RewardError, nearest

Module = TypeVar("Module", bound=torch.nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelOptions:
    """Where a reward's model comes from and how it runs.

    model: folder or hub id. device: None takes the GPU if there is one. batch_size: images in one forward pass.
    offload: the model waits in host memory between calls, and comes to the device for each; a model that rewards
    share waits there only if all of them say so.
    """

    model: str
    device: str | None = None
    dtype: str = "fp32"
    batch_size: int = 16
    offload: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("the reward's model is '': expected a folder or a hub id")
        if self.dtype not in DTYPES:
            raise ConfigError(f"the reward's dtype is {self.dtype!r}{nearest(self.dtype, DTYPES)}")
        if self.batch_size < 1:
            raise ConfigError(f"the reward's batch_size is {self.batch_size}: expected at least 1")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


class _Loaded(Generic[Module]):
    """A model, how many are at work with it, and whether one of its rewards keeps it on the device."""

    def __init__(self, module: Module) -> None:
        self.module, self.users, self.resident, self.lock = module, 0, False, RLock()


# A model goes when the last reward that uses it goes.
_SHARED: WeakValueDictionary[tuple[Any, ...], _Loaded[Any]] = WeakValueDictionary()
_LOADING = RLock()


class SharedModel(Generic[Module]):
    """A frozen model in evaluation mode that rewards with equal settings use together.

    `load` maps a folder or hub id to a module on the CPU; with `kind`, a name for what it loads, it decides which
    models are the same. Rewards may use one model from several threads.
    """

    def __init__(self, kind: str, options: ModelOptions, load: Callable[[str], Module]) -> None:
        self._options, self._load = options, load
        source = os.path.realpath(options.model) if os.path.exists(options.model) else options.model
        self._key = (kind, source, options.dtype, options.torch_device)
        self._loaded: _Loaded[Module] | None = None

    def module(self) -> Module:
        """The model, wherever it is now. Raises RewardError saying what is missing and what to do."""
        return self._get().module

    def _get(self) -> _Loaded[Module]:
        with _LOADING:
            if self._loaded is None:
                loaded = _SHARED.get(self._key)
                if loaded is None:
                    with missing_files(self._options.model):
                        module = self._load(self._options.model)
                    loaded = _Loaded(module.to(self._options.torch_dtype).eval().requires_grad_(False))
                    _SHARED[self._key] = loaded
                loaded.resident |= not self._options.offload
                self._loaded = loaded
            return self._loaded

    @contextmanager
    def on_device(self) -> Iterator[Module]:
        """The model on its device; inside, autocast is off, so that it runs in its own dtype.

        A backward pass through an offloaded model belongs inside as well.
        """
        loaded, device = self._get(), self._options.torch_device
        with loaded.lock:
            loaded.module.to(device)
            loaded.users += 1
        try:
            with torch.autocast(device.type, enabled=False):
                yield loaded.module
        finally:
            with loaded.lock:
                loaded.users -= 1
                if not (loaded.users or loaded.resident):
                    loaded.module.to("cpu")


@contextmanager
def missing_files(source: str) -> Iterator[None]:
    """Turns what the libraries raise about files that cannot be had, or packages that are not there, into a
    RewardError naming `source`."""
    try:
        yield
    except ImportError as error:
        raise RewardError(
            f"the reward's model {source!r} needs a package that is missing ({error}): pip install 'crd-fast[rewards]'"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise RewardError(
            f"the reward's model {source!r} cannot be loaded: {error}; give a folder with its files, or make the hub "
            f"reachable (hf download {source})"
        ) from error
