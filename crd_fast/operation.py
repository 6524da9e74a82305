"""How a registered operator is called: through PyTorch's dispatcher, or straight, where that gives the same.

A call through the dispatcher boxes and unboxes every argument twice, which costs more than the arithmetic of a small
batch. In plain eager mode nobody listens to it, so the same kernel runs under the same autograd formula without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from crd_fast.errors import TransformError

Kernel = Callable[..., Any]
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class Operation:
    """`torch.ops.crd_fast.<name>` as a Python function.

    registered: the operator. kernels: device type -> what is registered for it. setup_context and backward: what is
    registered as its autograd formula, when it has one; differentiable: the places of the arguments that it gives a
    gradient.
    """

    def __init__(
        self,
        registered: Kernel,
        kernels: Mapping[str, Kernel],
        setup_context: Kernel | None = None,
        backward: Kernel | None = None,
        differentiable: tuple[int, ...] = (),
    ) -> None:
        self.registered = registered
        self.kernels = dict(kernels)
        self.differentiable = differentiable
        self.functions = {}
        if setup_context is not None and backward is not None:
            self.functions = {
                name: _function(run, setup_context, backward, differentiable) for name, run in kernels.items()
            }

    def __call__(self, *arguments: Any) -> Any:
        """
        Raises:
            TransformError: inside torch.func (grad, vjp, jvp, vmap, ...) or forward-mode differentiation.
        """
        if not self._is_straight(arguments):
            return self.registered(*arguments)
        device = arguments[0].device.type
        if not _is_differentiated(arguments):
            return self.kernels[device](*arguments)
        if device in self.functions:
            chosen = (arguments[place] for place in self.differentiable)
            return self.functions[device].apply(arguments, *chosen)
        return self.registered(*arguments)  # raises on the way back that it has no formula

    def is_differentiated_straight(self, *arguments: Any) -> bool:
        """Whether a call with these arguments would skip the dispatcher and make a node of the graph.

        Raises:
            TransformError: as a call would.
        """
        return self._is_straight(arguments) and _is_differentiated(arguments)

    def _is_straight(self, arguments: tuple[Any, ...]) -> bool:
        if torch.compiler.is_compiling():
            return False
        refuse_transforms(arguments[0])
        if arguments[0].device.type not in self.kernels or _someone_listens():
            return False
        for argument in arguments:  # a loop, as everything on the way of a call counts
            if isinstance(argument, Tensor) and (type(argument) not in PLAIN_TYPES or argument.is_neg()):
                return False  # the kernels read memory, where a lazy negation is not
        return True


def on_its_device(kernel: Kernel) -> Kernel:
    """`kernel` for tensors on any GPU: Triton launches on the current one, whatever its tensors are on."""

    @functools.wraps(kernel)
    def run(*arguments: Any) -> Any:
        device = arguments[0].device  # without an index: on the CPU, under Triton's interpreter
        if device.index is None or device.index == torch.cuda.current_device():
            return kernel(*arguments)
        with torch.cuda.device(device):
            return kernel(*arguments)

    return run


def _is_differentiated(arguments: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def _someone_listens() -> bool:
    """Whether anything sees operators pass the dispatcher: a dispatch mode or a tracer."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def refuse_transforms(first: Tensor) -> None:
    """PyTorch's own handling would be wrong without a word: tangents of zero, for one.

    Raises:
        TransformError: inside torch.func, or `first` has a tangent.
    """
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and forward_ad._current_level >= 0:
        transformed = forward_ad.unpack_dual(first).tangent is not None
    if transformed:
        raise TransformError(
            "crd_fast's operators have no rules for torch.func transforms (grad, vjp, jvp, vmap, ...) or forward-mode "
            "differentiation; take gradients with loss.backward() or torch.autograd.grad outside of them, and put "
            "further samples into the batch dimension instead of vmap"
        )


def _function(
    run: Kernel, setup_context: Kernel, backward: Kernel, differentiable: tuple[int, ...]
) -> type[torch.autograd.Function]:
    """Of (all arguments, *differentiable ones): the fewer that autograd looks at, the less it costs."""

    def run_forward(ctx: Any, arguments: tuple[Any, ...], *chosen: Tensor) -> Any:
        output = run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def run_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_arguments = backward(ctx, *grads)
        return None, *(of_arguments[place] for place in differentiable)

    members = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
    return type(f"Crd{run.__name__}", (torch.autograd.Function,), members)
