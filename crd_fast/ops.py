"""The latent-sized operations `torch.ops.crd_fast.*`: registered here, and their implementation chosen here.

| op            | CPU, float16 / bfloat16 / float32 | CUDA, the same | float64, other devices |
|---------------|-----------------------------------|----------------|------------------------|
| noise         | C++ extension                     | Triton         | PyTorch formulas       |
| epsilon       | C++ extension                     | Triton         | PyTorch formulas       |
| residual_stats| C++ extension                     | Triton         | PyTorch formulas       |
| residual_grad | C++ extension                     | Triton         | PyTorch formulas       |

"PyTorch formulas" is `crd_fast.reference`, which runs wherever PyTorch does. `CRD_FAST_BACKEND=reference`
selects it for everything. Where the table says C++ or Triton and that is missing, the call raises
ExtensionMissingError.

Arguments are trusted: the public functions have checked them. Seeds are 64 bits passed as a signed int64.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crd_fast import native, reference
from crd_fast.errors import ConfigError, ExtensionMissingError
from crd_fast.reference import ResidualInputs

if TYPE_CHECKING:
    from types import ModuleType

BACKENDS = ("auto", "reference")

_RESIDUAL_ARGUMENTS = (
    "Tensor predicted, Tensor? target, Tensor? x0, Tensor? sigma, Tensor? sample_ids, SymInt seed, "
    "SymInt stream, Tensor? ref, Tensor? ref_uncond, float guidance_scale, Tensor? mask, str prediction"
)


def signed_seed(seed: int) -> int:
    """The int64 with the same 64 bits as a seed in [0, 2^64): operator schemas have no unsigned integers."""
    return seed - 2**64 if seed >= 2**63 else seed


def _compiled(*dtypes: torch.dtype) -> bool:
    """Whether an op on these dtypes belongs to the extension, or to Triton."""
    backend = os.environ.get("CRD_FAST_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ConfigError(f"CRD_FAST_BACKEND={backend!r}: expected one of {', '.join(BACKENDS)} (unset means auto)")
    return backend == "auto" and all(dtype in native.FLOAT_DTYPES for dtype in dtypes)


def _triton() -> ModuleType:
    """The Triton kernels, imported at the first CUDA call: Triton is not there on every platform."""
    try:
        return importlib.import_module("crd_fast.kernels")
    except ImportError as error:
        raise ExtensionMissingError(
            f"the Triton kernels could not be imported ({error}). Install Triton with `pip install "
            "'crd-fast[triton]'`; or set CRD_FAST_BACKEND=reference for the slow PyTorch formulas"
        ) from error


def _compiled_residual(inputs: ResidualInputs) -> bool:
    latents = (inputs.predicted, inputs.target, inputs.x0, inputs.ref, inputs.ref_uncond)
    return _compiled(*(tensor.dtype for tensor in latents if tensor is not None))


# --- noise ------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::noise",
    mutates_args=(),
    schema="(Tensor x0, Tensor sigma, Tensor sample_ids, SymInt seed, SymInt stream, ScalarType dtype) -> Tensor",
)
def noise(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma eps, contiguous (B, *latent) in `dtype`; differentiable in x0."""
    return reference.noise(x0, sigma, sample_ids, seed, stream, dtype)


@noise.register_kernel("cpu")
def _noise_cpu(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(x0.dtype, dtype):
        return reference.noise(x0, sigma, sample_ids, seed, stream, dtype)
    out = torch.empty(x0.shape, dtype=dtype)
    native.noise(x0, sigma.float().contiguous(), sample_ids.contiguous(), seed, stream, out)
    return out


@noise.register_kernel("cuda")
def _noise_cuda(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(x0.dtype, dtype):
        return reference.noise(x0, sigma, sample_ids, seed, stream, dtype)
    return _triton().noise(x0, sigma.float(), sample_ids, seed, stream, dtype)


@noise.register_fake
def _noise_fake(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    return x0.new_empty(x0.shape, dtype=dtype)


def _noise_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x0, sigma = inputs[:2]
    ctx.save_for_backward(sigma)
    ctx.x0_dtype = x0.dtype


def _noise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (sigma,) = ctx.saved_tensors
    keep = (1.0 - sigma).view(-1, *(1,) * (grad.ndim - 1))  # (B, 1, ..., 1)
    return (keep * grad).to(ctx.x0_dtype), None, None, None, None, None


noise.register_autograd(_noise_backward, setup_context=_noise_setup_context)


@torch.library.custom_op(
    "crd_fast::epsilon",
    mutates_args=(),
    schema="(Tensor sample_ids, SymInt[] shape, SymInt seed, SymInt stream, ScalarType dtype) -> Tensor",
)
def epsilon(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """The standard normals that `noise` adds, contiguous (B, *latent) in `dtype`."""
    return reference.epsilon(sample_ids, shape, seed, stream, dtype)


@epsilon.register_kernel("cpu")
def _epsilon_cpu(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(dtype):
        return reference.epsilon(sample_ids, shape, seed, stream, dtype)
    out = torch.empty(tuple(shape), dtype=dtype)
    native.epsilon(sample_ids.contiguous(), seed, stream, out)
    return out


@epsilon.register_kernel("cuda")
def _epsilon_cuda(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(dtype):
        return reference.epsilon(sample_ids, shape, seed, stream, dtype)
    return _triton().epsilon(sample_ids, tuple(shape), seed, stream, dtype)


@epsilon.register_fake
def _epsilon_fake(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    return sample_ids.new_empty(tuple(shape), dtype=dtype)


# --- residual statistics and their gradient ---------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::residual_stats",
    mutates_args=(),
    schema=f"({_RESIDUAL_ARGUMENTS}) -> (Tensor mse, Tensor mae, Tensor kl)",
)
def residual_stats(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """E, M, K, each (B,), of `ResidualInputs`; differentiable in `predicted` alone, through E and K."""
    return reference.residual_stats(ResidualInputs(*arguments))


@residual_stats.register_kernel("cpu")
def _residual_stats_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _dense_ids(ResidualInputs(*arguments))
    if not _compiled_residual(inputs):
        return reference.residual_stats(inputs)
    factor, count = reference.factor_and_count(inputs, torch.float64)
    mean = native.residual_sums(inputs) / count[:, None]  # (B, 3)
    mse, mae, kl = (mean * torch.stack((factor.square(), factor, factor.square()), 1)).float().unbind(1)
    return mse.clone(), mae.clone(), kl.clone()


@residual_stats.register_kernel("cuda")
def _residual_stats_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ResidualInputs(*arguments)
    if not _compiled_residual(inputs):
        return reference.residual_stats(inputs)
    mse, mae, kl = _triton().residual_stats(*_triton_arguments(inputs))
    return mse, mae, kl


@residual_stats.register_fake
def _residual_stats_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ResidualInputs(*arguments)
    shape, dtype = (inputs.predicted.shape[0],), reference.statistics_dtype(inputs)
    mse, mae, kl = (inputs.predicted.new_empty(shape, dtype=dtype) for _ in range(3))
    return mse, mae, kl


@torch.library.custom_op(
    "crd_fast::residual_grad",
    mutates_args=(),
    schema=f"({_RESIDUAL_ARGUMENTS}, Tensor grad_mse, Tensor grad_kl) -> Tensor",
)
def residual_grad(*arguments: Any) -> Tensor:
    """dL/dpredicted from dL/dE and dL/dK, each (B,); shape, dtype and layout of `predicted`."""
    *inputs, grad_mse, grad_kl = arguments
    return reference.residual_grad(ResidualInputs(*inputs), grad_mse, grad_kl)


@residual_grad.register_kernel("cpu")
def _residual_grad_cpu(*arguments: Any) -> Tensor:
    *shared, grad_mse, grad_kl = arguments
    inputs = _dense_ids(ResidualInputs(*shared))
    if not _compiled_residual(inputs):
        return reference.residual_grad(inputs, grad_mse, grad_kl)
    factor, count = reference.factor_and_count(inputs, torch.float64)
    scale = 2.0 * factor.square() / count  # (B,)
    out = torch.empty_like(inputs.predicted)
    native.residual_grad(inputs, (scale * grad_mse).float(), (scale * grad_kl).float(), out)
    return out


def _dense_ids(inputs: ResidualInputs) -> ResidualInputs:
    return inputs if inputs.sample_ids is None else inputs._replace(sample_ids=inputs.sample_ids.contiguous())


@residual_grad.register_kernel("cuda")
def _residual_grad_cuda(*arguments: Any) -> Tensor:
    *shared, grad_mse, grad_kl = arguments
    inputs = ResidualInputs(*shared)
    if not _compiled_residual(inputs):
        return reference.residual_grad(inputs, grad_mse, grad_kl)
    return _triton().residual_grad(*_triton_arguments(inputs), grad_mse.float(), grad_kl.float())


def _triton_arguments(inputs: ResidualInputs) -> tuple[Any, ...]:
    """What the launchers of statistics and gradient share. Velocity without a mask launches nothing here."""
    kernels = _triton()
    kinds = {"v": kernels.VELOCITY, "x0": kernels.CLEAN, "eps": kernels.NOISE}
    kind = kernels.TENSOR if inputs.target is not None else kinds[inputs.prediction]
    target = inputs.target if kind == kernels.TENSOR else None if kind == kernels.NOISE else inputs.x0
    factor = count = None
    if inputs.prediction != "v" or inputs.mask is not None:
        factor, count = reference.factor_and_count(inputs, torch.float32)
    return (
        inputs.predicted,
        target,
        kind,
        inputs.sample_ids,
        inputs.seed,
        inputs.stream,
        inputs.ref,
        inputs.ref_uncond,
        inputs.guidance_scale,
        inputs.mask,
        factor if inputs.prediction != "v" else None,
        count if inputs.mask is not None else None,
    )


@residual_grad.register_fake
def _residual_grad_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0])


def _residual_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    given = ResidualInputs(*inputs)
    ctx.save_for_backward(
        given.predicted,
        given.target,
        given.x0,
        given.sigma,
        given.sample_ids,
        given.ref,
        given.ref_uncond,
        given.mask,
    )
    ctx.numbers = (given.seed, given.stream, given.guidance_scale, given.prediction)
    ctx.mark_non_differentiable(output[1])


def _residual_backward(ctx: Any, grad_mse: Tensor, grad_mae: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    predicted, target, x0, sigma, sample_ids, ref, ref_uncond, mask = ctx.saved_tensors
    seed, stream, guidance_scale, prediction = ctx.numbers
    inputs = ResidualInputs(
        predicted,
        target,
        x0,
        sigma,
        sample_ids,
        seed,
        stream,
        ref,
        ref_uncond,
        guidance_scale,
        mask,
        prediction,
    )
    grad = residual_grad(*inputs, grad_mse, grad_kl)
    return grad, *(None,) * (len(inputs) - 1)


residual_stats.register_autograd(_residual_backward, setup_context=_residual_setup_context)
