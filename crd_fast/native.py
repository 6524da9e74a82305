"""The compiled C++ extension: the only module that imports it, and the tensor side of its interface."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crd_fast.errors import ExtensionMissingError

if TYPE_CHECKING:
    from types import ModuleType

BUILD_COMMAND = f"{sys.executable} -m pip install --no-deps --force-reinstall -e ."

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def extension() -> ModuleType:
    """The module `crd_fast._C`.

    Raises:
        ExtensionMissingError: it was not built, or not for this Python; the message has the build command.
    """
    try:
        return importlib.import_module("crd_fast._C")
    except ImportError as error:
        raise ExtensionMissingError(
            f"the C++ extension crd_fast._C could not be imported ({error}). Build it, from a checkout with "
            f"a C++17 compiler at hand, with `{BUILD_COMMAND}`; or set CRD_FAST_BACKEND=reference for the "
            f"slow PyTorch formulas"
        ) from error


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
        x0, out: CPU tensors (B, *latent) of one shape, float32, bfloat16 or float16 each; samples are
            contiguous, any stride (not overlapping in `out`) lies between them.
        sigma: (B,) float32, contiguous. sample_ids: (B,) int64, contiguous.
        seed: any Python integer, taken modulo 2^64. stream: int32.

    Raises:
        ExtensionMissingError: the extension is not there.
        ValueError: a tensor has another device, dtype, shape or layout, or the stream is not an int32.
    """
    if x0.shape != out.shape:
        raise ValueError(f"x0 is {tuple(x0.shape)} and out {tuple(out.shape)}; expected one shape")
    batch, dim = _rows("out", out)
    _rows("x0", x0)
    _vector("sigma", sigma, batch, torch.float32)
    _vector("sample_ids", sample_ids, batch, torch.int64)
    extension().noise(
        x0.data_ptr(),
        DTYPE_CODES[x0.dtype],
        _row_stride(x0, dim),
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        _row_stride(out, dim),
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
    batch, dim = _rows("out", out)
    _vector("sample_ids", sample_ids, batch, torch.int64)
    extension().epsilon(
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        _row_stride(out, dim),
        sample_ids.data_ptr(),
        batch,
        dim,
        seed % 2**64,
        _int32("stream", stream),
        torch.get_num_threads(),
    )


def _rows(name: str, tensor: Tensor) -> tuple[int, int]:
    """(batch, elements per sample) of a tensor the kernels can walk as dense rows."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; expected a CPU tensor")
    if tensor.dtype not in DTYPE_CODES:
        raise ValueError(f"{name} is {tensor.dtype}; expected float32, bfloat16 or float16")
    if tensor.dim() == 0:
        raise ValueError(f"{name} is a scalar; expected a batch (B, *latent)")
    batch = tensor.shape[0]
    if batch > 0 and not tensor[0].is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; expected contiguous "
            f"samples, call .contiguous() first"
        )
    return batch, tensor[:1].numel()


def _row_stride(tensor: Tensor, dim: int) -> int:
    return tensor.stride(0) if tensor.shape[0] > 1 else dim


def _vector(name: str, tensor: Tensor, batch: int, dtype: torch.dtype) -> None:
    if tensor.shape != (batch,) or tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} with strides "
            f"{tensor.stride()}; expected contiguous ({batch},) {dtype} on the CPU"
        )


def _int32(name: str, value: int) -> int:
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} is {value}; expected an int32")
    return value
