"""The operations of DIDR's generator stage, `torch.ops.crd_fast.generator_*`: registered here, as is the choice of
their implementations.

| op                   | CPU, float16 / bfloat16 / float32 | CUDA, the same | float64, other devices |
|----------------------|-----------------------------------|----------------|------------------------|
| generator_statistics | C++ extension                     | Triton         | PyTorch formulas       |
| generator_gradient   | C++ extension                     | Triton         | PyTorch formulas       |
| generator_value      | PyTorch; its gradient is generator_gradient | the same | the same          |

"PyTorch formulas" is `crd_fast.didr.reference`. What selects them, what happens where something is missing and how
operations are called is as in `crd_fast.ops`. Arguments are trusted: the public functions have checked them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crd_fast.didr import native, reference
from crd_fast.didr.reference import GeneratorInputs, Statistics
from crd_fast.operation import Operation, on_its_device
from crd_fast.ops import _compiled, _triton

_INPUTS = "Tensor ta, Tensor ref, Tensor? ref_uncond, float guidance_scale, Tensor s_r, Tensor slope, Tensor level"
_FIELDS = len(GeneratorInputs._fields)


def _is_compiled(inputs: GeneratorInputs, *others: Tensor | None) -> bool:
    latents = (inputs.ta, inputs.ref, inputs.ref_uncond, inputs.s_r, *others)
    return _compiled(inputs.level.dtype, *[tensor.dtype for tensor in latents if tensor is not None])


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _with_dense_vectors(inputs: GeneratorInputs) -> GeneratorInputs:
    return inputs._replace(slope=inputs.slope.float().contiguous(), level=inputs.level.float().contiguous())


# --- statistics -------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::generator_statistics",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? x0, Tensor? x_t, Tensor? shift) "
    "-> (Tensor distance, Tensor gap, Tensor correction, Tensor difference, Tensor invalid)",
)
def _statistics_op(*arguments: Any) -> tuple[Tensor, ...]:
    """`reference.Statistics` of `GeneratorInputs`, (B,) each; differentiable in nothing."""
    return reference.generator_statistics(GeneratorInputs(*arguments[:_FIELDS]), *arguments[_FIELDS:])


@_statistics_op.register_kernel("cpu")
def _statistics_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (x0, x_t, shift) = GeneratorInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    if not _is_compiled(inputs, x0, x_t):
        return reference.generator_statistics(inputs, x0, x_t, shift)
    return native.generator_statistics(_with_dense_vectors(inputs), x0, x_t, _dense(shift))


@_statistics_op.register_kernel("cuda")
@on_its_device
def _statistics_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (x0, x_t, shift) = GeneratorInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    if not _is_compiled(inputs, x0, x_t):
        return reference.generator_statistics(inputs, x0, x_t, shift)
    return tuple(_triton().generator_statistics(*_with_dense_vectors(inputs), x0, x_t, _dense(shift)))


@_statistics_op.register_fake
def _statistics_fake(*arguments: Any) -> tuple[Tensor, ...]:
    level = GeneratorInputs(*arguments[:_FIELDS]).level
    distance, gap, correction, difference = (level.new_empty(level.shape) for _ in range(4))
    return Statistics(distance, gap, correction, difference, level.new_empty(level.shape, dtype=torch.int64))


generator_statistics = Operation(_statistics_op, {"cpu": _statistics_cpu, "cuda": _statistics_cuda})


# --- the gradient -----------------------------------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::generator_gradient",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor scale, Tensor? upstream, ScalarType dtype) -> Tensor",
)
def _gradient_op(*arguments: Any) -> Tensor:
    """`reference.generator_gradient` of `GeneratorInputs`: g times upstream in `dtype`, like `ta`."""
    return reference.generator_gradient(GeneratorInputs(*arguments[:_FIELDS]), *arguments[_FIELDS:])


@_gradient_op.register_kernel("cpu")
def _gradient_cpu(*arguments: Any) -> Tensor:
    inputs, (scale, upstream, dtype) = GeneratorInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    if not (_is_compiled(inputs) and _compiled(dtype)):
        return reference.generator_gradient(inputs, scale, upstream, dtype)
    out = torch.empty_like(inputs.ta, dtype=dtype)
    native.generator_gradient(_with_dense_vectors(inputs), scale.float().contiguous(), _dense(upstream), out)
    return out


@_gradient_op.register_kernel("cuda")
@on_its_device
def _gradient_cuda(*arguments: Any) -> Tensor:
    inputs, (scale, upstream, dtype) = GeneratorInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    if not (_is_compiled(inputs) and _compiled(dtype)):
        return reference.generator_gradient(inputs, scale, upstream, dtype)
    return _triton().generator_gradient(*_with_dense_vectors(inputs), _dense(scale), _dense(upstream), dtype)


@_gradient_op.register_fake
def _gradient_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0], dtype=arguments[-1])


generator_gradient = Operation(_gradient_op, {"cpu": _gradient_cpu, "cuda": _gradient_cuda})


# --- a number with that gradient --------------------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::generator_value",
    mutates_args=(),
    schema=f"(Tensor x0, Tensor value, {_INPUTS}, Tensor scale) -> Tensor",
)
def _value_op(x0: Tensor, value: Tensor, *arguments: Any) -> Tensor:
    """The number `value`, (), whose derivative in x0 (B, *latent) is g / numel, and nothing elsewhere."""
    return _value(x0, value, *arguments)


@_value_op.register_fake
def _value(x0: Tensor, value: Tensor, *arguments: Any) -> Tensor:
    return value.clone()


def _value_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x0, _, *shared, scale = inputs
    given = GeneratorInputs(*shared)
    ctx.save_for_backward(given.ta, given.ref, given.ref_uncond, given.s_r, given.slope, given.level, scale)
    ctx.guidance_scale, ctx.dtype, ctx.numel = given.guidance_scale, x0.dtype, x0.numel()


def _value_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ta, ref, ref_uncond, s_r, slope, level, scale = ctx.saved_tensors
    inputs = GeneratorInputs(ta, ref, ref_uncond, ctx.guidance_scale, s_r, slope, level)
    return generator_gradient(*inputs, scale, grad / ctx.numel, ctx.dtype), *(None,) * (_FIELDS + 2)


_value_op.register_autograd(_value_backward, setup_context=_value_setup_context)
generator_value = Operation(
    _value_op, {"cpu": _value, "cuda": _value}, _value_setup_context, _value_backward, differentiable=(0,)
)
