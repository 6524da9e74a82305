"""Activations of repeated blocks computed again in the backward pass instead of kept.

    checkpoint_blocks(model, ("transformer_blocks",), "selective", around=attention)

"off" keeps everything that the gradient needs. "selective" keeps the results of matrix products and of attention, which
are dear, and computes the rest again. "full" keeps a block's inputs alone and runs the block twice. Gradients are the
same. Nothing happens in passes without gradients.

A block is recomputed when the adapters and the precision chosen for its forward pass, and the context that predictions
run in, have been left. All are entered again, so `LoRABank.use` and `Precisions.use` surround the prediction only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from crd_fast.acceleration.compilation import repeated_blocks
from crd_fast.acceleration.precision import SwitchedLinear
from crd_fast.errors import ConfigError, nearest
from crd_fast.lora import BankLinear

MODES = ("off", "selective", "full")
Around = Callable[[], AbstractContextManager[Any]]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# matrix products, with the positions of their two factors
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "_scaled_mm": (0, 1)}
_KEPT = {
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
}
_ATTENTION_LIBRARIES = ("xformers", "flash_attn")  # beginnings of their operators' namespaces
# A product with a result this many times wider than what it sums over is cheap for its size: an adapter's second half,
# and the first of an MLP, whose result is the largest of a block.
_CHEAP = 4


def checkpoint_blocks(model: nn.Module, block_lists: Iterable[str], mode: str, around: Around = nullcontext) -> None:
    """Recompute every block of the named lists in the backward pass, in place; may be called again to change it.

    Blocks keep their parameters' names and become instances of a subclass of their own class. Compiled blocks recompute
    inside their graph. Sharding with `fully_shard` comes after this.

    around: makes the context that predictions run in, such as `use_attention`'s result.

    Raises ConfigError: an unknown mode or list of blocks, naming the nearest. RuntimeError: the blocks are sharded.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown recomputation mode {mode!r}{nearest(mode, MODES)}")
    blocks = repeated_blocks(model, block_lists)
    if any(isinstance(block, FSDPModule) for block in blocks):
        raise RuntimeError("the blocks are sharded already: choose what is recomputed before fully_shard")
    for block in blocks:
        plain: Any = getattr(type(block), "without_recomputing", type(block))
        block.__class__ = plain if mode == "off" else _recomputed(plain, mode == "selective")
        vars(block)["around"] = around


@cache
def _recomputed(plain: Any, selective: bool) -> type:
    """The class of blocks that recompute. One for all blocks of a class, so that those share compiled code."""
    run = plain.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(self, *args, **kwargs)
        block = partial(run, self)
        if not torch.compiler.is_compiling():
            return checkpoint(
                block, *args, use_reentrant=False, context_fn=partial(_contexts, self, selective), **kwargs
            )
        # A graph holds its own backward pass: nothing has to be entered again.
        if selective:
            return checkpoint(block, *args, use_reentrant=False, context_fn=_saving_products, **kwargs)
        return checkpoint(block, *args, use_reentrant=False, **kwargs)

    return type(f"Recomputed{plain.__name__}", (plain,), {"without_recomputing": plain, "forward": forward})


def _saving_products() -> Contexts:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = operator.name().partition("::")
    name = name.partition(".")[0]
    if namespace == "aten" and name in _PRODUCTS:
        left, right = (args[position] for position in _PRODUCTS[name])
        dear = right.shape[-1] < _CHEAP * left.shape[-1]
    else:
        dear = name in _KEPT if namespace == "aten" else namespace.startswith(_ATTENTION_LIBRARIES)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(block: nn.Module, selective: bool) -> Contexts:
    """What surrounds a block's forward pass, and what surrounds its recomputation."""
    if not selective:
        return nullcontext(), _Again(block, nullcontext())
    saving, reusing = _saving_products()
    return saving, _Again(block, reusing)


class _Again:
    """The state in which a block ran: the chosen adapters and precision, and the context of predictions."""

    def __init__(self, block: Any, inner: AbstractContextManager[Any]) -> None:
        plans: list[Any] = [layer._plan for layer in block.modules() if isinstance(layer, BankLinear)]
        precisions = [layer._precisions for layer in block.modules() if isinstance(layer, SwitchedLinear)]
        shared = {id(state): state for state in (*plans, *precisions)}  # by all layers of a model
        self._chosen = [(vars(state), dict(vars(state))) for state in shared.values()]
        self._around = block.around
        self._inner = inner
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for state, chosen in self._chosen:
                stack.callback(_replace, state, dict(state))
                _replace(state, chosen)
            stack.enter_context(self._around())
            stack.enter_context(self._inner)
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


def _replace(state: dict[str, Any], by: dict[str, Any]) -> None:
    state.clear()
    state.update(by)
