"""A model's repeated blocks compiled one by one.

    counter = compile_blocks(model, ("transformer_blocks",))
    ...                      # every kind of pass once
    counter.mark_warm()
    ...                      # training
    counter.recompiles       # 0, or a shape or a setting changed

Blocks with the same layers share their compiled code, so a deep model compiles about as fast as a shallow one. One
graph is made for every kind of block, every shape and every way of running it: with gradients, without, with one
adapter or several, with merged weights. What is compiled once is not compiled again: adapters are inputs of a graph, so
new values cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from crd_fast.errors import ConfigError, nearest

# graphs that the code of one block may have; beyond it compiling is an error, not a silent return to eager
RECOMPILE_LIMIT = 64


class CompileCounter:
    """A backend of torch.compile that counts the graphs it is given and hands them to another.

    graphs: compiled so far. A backward pass belongs to the graph of its forward pass.
    """

    def __init__(self, backend: str) -> None:
        known = torch._dynamo.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigError(f"unknown compile backend {backend!r}{nearest(backend, known)}")
        self._compile: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        self._warm = 0
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return self._compile(graph, inputs)

    def mark_warm(self) -> None:
        """Every graph from here on is a recompilation."""
        self._warm = self.graphs

    @property
    def recompiles(self) -> int:
        """Graphs compiled since `mark_warm`."""
        return self.graphs - self._warm


class CompileMetrics:
    """What an epoch's row tells of compiling. Of one process: a resumed run compiles again."""

    def __init__(self, counters: Sequence[CompileCounter]) -> None:
        self._counters = counters
        self._settled = False

    def row(self, settled: bool = True) -> dict[str, Any]:
        """Graphs compiled so far, and how many of them since the first settled epoch; nothing without a counter.

        settled: whether the epoch has had every kind of pass.
        """
        if not self._counters:
            return {}
        if not self._settled:
            for counter in self._counters:
                counter.mark_warm()
            self._settled = settled
        return {
            "compiled_graphs": sum(counter.graphs for counter in self._counters),
            "recompiles": sum(counter.recompiles for counter in self._counters),
        }


def compile_blocks(model: nn.Module, block_lists: Iterable[str], *, backend: str = "inductor") -> CompileCounter:
    """Compile every block of the named lists in place, when it first runs. Names of layers and parameters stay.

    A graph that breaks, or more than `RECOMPILE_LIMIT` graphs of one block, is an error of torch._dynamo. That limit
    is set for the whole process and stays, because blocks compile whenever a new shape comes. Kernels of attention are
    chosen when a graph is made: set them with `use_attention` first, and run every prediction in its context.

    Raises ConfigError: a list that does not exist, naming the nearest, or an unknown backend.
    """
    blocks = repeated_blocks(model, block_lists)
    counter = CompileCounter(backend)
    _set_limit()
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    return counter


def repeated_blocks(model: nn.Module, block_lists: Iterable[str]) -> list[nn.Module]:
    """The blocks of the named lists, in order. Raises ConfigError naming the nearest list that exists."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name in (chosen := list(block_lists)):
        if name not in lists:
            raise ConfigError(f"{type(model).__name__} has no list of blocks {name!r}{nearest(name, lists)}")
    return [block for name in chosen for block in lists[name]]


def _set_limit() -> None:
    """Raise dynamo's limit of graphs, never lower it, and make passing it an error."""
    config = torch._dynamo.config
    # torch 2.6 has the older names
    renamed = hasattr(config, "recompile_limit")
    limit = "recompile_limit" if renamed else "cache_size_limit"
    fail = "fail_on_recompile_limit_hit" if renamed else "fail_on_cache_limit_hit"
    setattr(config, limit, max(RECOMPILE_LIMIT, getattr(config, limit)))
    setattr(config, fail, True)
