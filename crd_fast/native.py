"""The compiled C++ extension: the only module that imports it, and the tensor side of its interface."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from crd_fast.errors import ExtensionMissingError
from crd_fast.reference import ResidualInputs
from crd_fast.reference_objective import METRICS, Objective, ObjectiveInputs

if TYPE_CHECKING:
    from types import ModuleType

BUILD_COMMAND = f"{sys.executable} -m pip install --no-deps --force-reinstall -e ."

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
FLOAT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the extension writes into, whatever the default dtype and device of the program are."""
    return torch.empty(sizes, dtype=dtype, device="cpu")


_forked = False  # since this module was imported


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def extension() -> ModuleType:
    """The module `crd_fast._C`.

    Raises:
        ExtensionMissingError: it was not built, or not for this Python; the message has the build command.
    """
    try:
        module = importlib.import_module("crd_fast._C")
    except ImportError as error:
        raise ExtensionMissingError(
            f"the C++ extension crd_fast._C could not be imported ({error}). Build it, from a checkout with "
            f"a C++17 compiler at hand, with `{BUILD_COMMAND}`; or set CRD_FAST_BACKEND=reference for the "
            f"slow PyTorch formulas"
        ) from error
    if _forked:
        module.after_fork()
    return module


def instruction_set() -> str:
    """The instruction set the kernels run with on this machine: "portable", "avx2" or "avx512"."""
    return str(extension().instruction_set())


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 (Salmon et al., SC11): four 32-bit words."""
    w0, w1, w2, w3 = extension().philox4x32(counter, key)
    return w0, w1, w2, w3


def noise(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, out: Tensor) -> None:
    """Writes (1 - sigma) x0 + sigma epsilon(seed, stream, sample_ids) into `out`, rounding fp32 once.

    Args:
        x0, out: CPU tensors (B, *latent) of one shape in any layout (not overlapping in `out`), float32, bfloat16
            or float16 each.
        sigma: (B,) float32, contiguous. sample_ids: (B,) int64, contiguous.
        seed: any Python integer, taken modulo 2^64. stream: int32.

    Raises:
        ExtensionMissingError: the extension is not there.
        ValueError: a tensor has another device, dtype, shape or layout, or the stream is not an int32.
    """
    batch, dim = _sizes("out", out)
    _vector("sigma", sigma, batch, torch.float32)
    _vector("sample_ids", sample_ids, batch, torch.int64)
    extension().noise(
        _rows("x0", x0, out),
        _rows("out", out, out),
        sigma.data_ptr(),
        sample_ids.data_ptr(),
        batch,
        dim,
        seed % 2**64,
        _int32("stream", stream),
        torch.get_num_threads(),
    )


def epsilon(sample_ids: Tensor, seed: int, stream: int, out: Tensor) -> None:
    """Writes the standard normals of `noise` into `out` (B, *latent); arguments and errors as there."""
    batch, dim = _sizes("out", out)
    _vector("sample_ids", sample_ids, batch, torch.int64)
    extension().noise(
        None,
        _rows("out", out, out),
        0,
        sample_ids.data_ptr(),
        batch,
        dim,
        seed % 2**64,
        _int32("stream", stream),
        torch.get_num_threads(),
    )


def residual_stats(inputs: ResidualInputs, factor: Tensor | None, count: Tensor | None) -> tuple[Tensor, ...]:
    """E, M, K and the E and M of `old`, (B,) float32 each, the last two (0,) without it.

    factor, count: (B,) float64, contiguous, the velocity factor and the number of valid elements; None for 1 and all.

    Raises:
        ExtensionMissingError: the extension is not there.
        ValueError: a tensor has another device, dtype or shape.
    """
    batch, dim = _sizes("predicted", inputs.predicted)
    of_old = 0 if inputs.old is None else batch
    stats = tuple(empty(size) for size in (batch, batch, batch, of_old, of_old))
    predicted, *rest = _residual_arguments(inputs)
    old = None
    if inputs.old is not None:
        axes = _memory_order(inputs)
        old = _rows("old", _ordered(inputs.old, axes), _ordered(inputs.predicted, axes))
    extension().residual_stats(
        predicted,
        old,
        *rest,
        _optional_vector("factor", factor, batch, torch.float64),
        _optional_vector("count", count, batch, torch.float64),
        batch,
        dim,
        *(tensor.data_ptr() for tensor in stats),
        torch.get_num_threads(),
    )
    return stats


def residual_grad(
    inputs: ResidualInputs,
    factor: Tensor | None,
    count: Tensor | None,
    grad_mse: Tensor | None,
    grad_kl: Tensor | None,
    upstream: Tensor | None,
    out: Tensor,
) -> None:
    """Writes dL/dpredicted into `out`, zero where the mask is.

    grad_mse, grad_kl: (B,) float32, contiguous, dL/dE and dL/dK, or None for none; a slope of zero drops its term.
    upstream: () or (B,) float32, contiguous, multiplies both, or None for 1. out: like `predicted`, any layout. factor,
    count and errors as in `residual_stats`.
    """
    batch, dim = _sizes("predicted", inputs.predicted)
    axes = _memory_order(inputs)
    scalar = upstream is not None and upstream.dim() == 0
    if upstream is not None and scalar:
        upstream = upstream.view(1)
    extension().residual_grad(
        *_residual_arguments(inputs),
        _optional_vector("factor", factor, batch, torch.float64),
        _optional_vector("count", count, batch, torch.float64),
        batch,
        dim,
        _optional_vector("grad_mse", grad_mse, batch, torch.float32),
        _optional_vector("grad_kl", grad_kl, batch, torch.float32),
        _optional_vector("upstream", upstream, 1 if scalar else batch, torch.float32),
        not scalar,
        _rows("grad", _ordered(out, axes), _ordered(inputs.predicted, axes)),
        torch.get_num_threads(),
    )


def objective(inputs: ObjectiveInputs) -> Objective:
    """The CRD loss from residual statistics; floating-point vectors are rounded to float32 first.

    Raises:
        ExtensionMissingError: the extension is not there.
        ValueError: a tensor has another device or shape.
    """
    batch = inputs.mse.shape[0]
    kept: list[Tensor] = []  # converted tensors live until the call is over

    def vector(name: str, tensor: Tensor | None, size: int, dtype: torch.dtype = torch.float32) -> int:
        if tensor is None:
            return 0
        if tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = tensor.to(dtype).contiguous()
            kept.append(tensor)
        _vector(name, tensor, size, dtype)
        return tensor.data_ptr()

    members = 0 if inputs.member_ids is None else inputs.member_ids.shape[0]
    shape = (batch,) if inputs.reduction == "none" else ()
    result = Objective(
        loss=empty(*shape),
        parts=empty(2, *shape),
        samples=empty(3, batch),
        slopes=empty(2, batch),
        metrics=empty(len(METRICS)),
    )
    extension().objective(
        vector("mse", inputs.mse, batch),
        vector("mae", inputs.mae, batch),
        vector("kl", inputs.kl, batch),
        vector("old_mse", inputs.old_mse, batch),
        vector("old_mae", inputs.old_mae, batch),
        vector("advantages", inputs.advantages, batch),
        vector("group_ids", inputs.group_ids, batch, torch.int64),
        vector("sample_weights", inputs.sample_weights, batch),
        vector("kl_weights", inputs.kl_weights, batch),
        vector("member_ids", inputs.member_ids, members, torch.int64),
        0 if inputs.members is None else vector("members", inputs.members.flatten(), 3 * members),
        batch,
        members,
        inputs.beta,
        inputs.kl_coef,
        inputs.adv_clip,
        inputs.adaptive_weight,
        inputs.adaptive_kl,
        inputs.temperature,
        _LOSS_TYPES[inputs.loss_type],
        _REDUCTIONS[inputs.reduction],
        *(tensor.data_ptr() for tensor in result),
    )
    return result


_LOSS_TYPES = {"mse": 0, "bce": 1}  # csrc/objective.h
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}

_TENSOR, _VELOCITY, _CLEAN, _NOISE = range(4)  # csrc/residual.h, enum Target


def _residual_arguments(inputs: ResidualInputs) -> tuple[Any, ...]:
    """The arguments that sums and gradient share, up to the mask."""
    kind = _TENSOR if inputs.target is not None else {"v": _VELOCITY, "x0": _CLEAN, "eps": _NOISE}[inputs.prediction]
    target = {_TENSOR: inputs.target, _NOISE: None}.get(kind, inputs.x0)
    axes = _memory_order(inputs)
    predicted = _ordered(inputs.predicted, axes)

    def rows(name: str, tensor: Tensor | None) -> _Rows | None:
        return None if tensor is None else _rows(name, _ordered(tensor, axes), predicted)

    sample_ids = 0
    if kind in (_VELOCITY, _NOISE):
        if inputs.sample_ids is None:
            raise ValueError("residual op: expected a target tensor, or all of x0, sigma and sample_ids")
        _vector("sample_ids", inputs.sample_ids, predicted.shape[0], torch.int64)
        sample_ids = inputs.sample_ids.data_ptr()
    mask = None if inputs.mask is None else inputs.mask.expand(inputs.predicted.shape)
    return (
        _rows("predicted", predicted, predicted),
        kind,
        rows("target", target),
        sample_ids,
        inputs.seed % 2**64,
        _int32("stream", inputs.stream),
        rows("ref", inputs.ref),
        rows("ref_uncond", inputs.ref_uncond),
        inputs.guidance_scale,
        rows("mask", mask),
    )


def _memory_order(inputs: ResidualInputs) -> tuple[int, ...] | None:
    """The axes of `predicted` in the order of memory, None where elements are walked in their logical order.

    Any order is as good when the target is a tensor; noise belongs to an element's place in the logical order.
    """
    predicted = inputs.predicted
    if inputs.target is None or predicted.is_contiguous():
        return None
    return (0, *sorted(range(1, predicted.ndim), key=predicted.stride, reverse=True))


def _ordered(tensor: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    return tensor if axes is None else tensor.permute(axes)


# Address, dtype code, elements between rows, sizes and strides of a row's axes.
_Rows: TypeAlias = tuple[int, int, int, list[int], list[int]]


def _sizes(name: str, tensor: Tensor) -> tuple[int, int]:
    """(batch, elements per sample)."""
    if tensor.dim() == 0:
        raise ValueError(f"{name} is a scalar; expected a batch (B, *latent)")
    return tensor.shape[0], tensor.shape[1:].numel()


def _rows(name: str, tensor: Tensor, like: Tensor) -> _Rows:
    """What the extension needs to know of a tensor with the shape of `like`; neighbouring axes are merged."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; expected a CPU tensor")
    if tensor.dtype not in DTYPE_CODES:
        raise ValueError(f"{name} is {tensor.dtype}; expected float32, bfloat16 or float16")
    if tensor.shape != like.shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {tuple(like.shape)}")
    if tensor.is_contiguous():
        dim = tensor.stride(0) if tensor.shape[0] > 1 else tensor.numel()
        return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], dim, [dim], [1]
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride(0), sizes or [1], strides or [1]


def _vector(name: str, tensor: Tensor, batch: int, dtype: torch.dtype) -> None:
    if tensor.shape != (batch,) or tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} with strides "
            f"{tensor.stride()}; expected contiguous ({batch},) {dtype} on the CPU"
        )


def _optional_vector(name: str, tensor: Tensor | None, batch: int, dtype: torch.dtype) -> int:
    """The address of a vector, 0 for none."""
    if tensor is None:
        return 0
    _vector(name, tensor, batch, dtype)
    return tensor.data_ptr()


def _int32(name: str, value: int) -> int:
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} is {value}; expected an int32")
    return value
