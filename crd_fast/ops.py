"""The operations `torch.ops.crd_fast.*`, on latents and the loss between them: registered here, as is the choice of
their implementations.

| op            | CPU, float16 / bfloat16 / float32 | CUDA, the same | float64, other devices |
|---------------|-----------------------------------|----------------|------------------------|
| noise         | C++ extension                     | Triton         | PyTorch formulas       |
| epsilon       | C++ extension                     | Triton         | PyTorch formulas       |
| residual_stats| C++ extension                     | Triton         | PyTorch formulas       |
| residual_grad | C++ extension                     | Triton         | PyTorch formulas       |
| objective     | C++ extension                     | Triton         | PyTorch formulas       |

"PyTorch formulas" is `crd_fast.reference` and `crd_fast.reference_objective`, which run wherever PyTorch has float64:
Apple's GPUs have none, so nothing is noised there.
`CRD_FAST_BACKEND=reference` selects it for everything. Where the table says C++ or Triton and that is missing, the
call raises ExtensionMissingError.

Each is called as an `Operation`, which skips the dispatcher where that gives the same.

Arguments are trusted: the public functions have checked them. Seeds are 64 bits passed as a signed int64.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crd_fast import native, reference, reference_objective
from crd_fast.errors import ConfigError, ExtensionMissingError, TransformError
from crd_fast.operation import Operation, on_its_device
from crd_fast.reference import ResidualInputs
from crd_fast.reference_objective import ObjectiveInputs

if TYPE_CHECKING:
    from types import ModuleType

BACKENDS = ("auto", "reference")

_RESIDUAL_ARGUMENTS = (
    "Tensor predicted, Tensor? target, Tensor? x0, Tensor? sigma, Tensor? sample_ids, SymInt seed, "
    "SymInt stream, Tensor? ref, Tensor? ref_uncond, float guidance_scale, Tensor? mask, str prediction, Tensor? old"
)
_STATISTICS = "Tensor mse, Tensor mae, Tensor kl, Tensor old_mse, Tensor old_mae"


def signed_seed(seed: int) -> int:
    """The int64 with the same 64 bits as a seed in [0, 2^64): operator schemas have no unsigned integers."""
    return seed - 2**64 if seed >= 2**63 else seed


def _compiled(*dtypes: torch.dtype) -> bool:
    """Whether an op on these dtypes belongs to the extension, or to Triton."""
    backend = os.environ.get("CRD_FAST_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ConfigError(f"CRD_FAST_BACKEND={backend!r}: expected one of {', '.join(BACKENDS)} (unset means auto)")
    return backend == "auto" and native.FLOAT_DTYPES.issuperset(dtypes)


def _triton() -> ModuleType:
    """The Triton kernels, imported at the first CUDA call: Triton is not there on every platform."""
    try:
        return importlib.import_module("crd_fast.kernels")
    except ImportError as error:
        if (error.name or "").startswith("crd_fast.kernels"):  # setup.py gives the folder kernels/ that name
            raise ExtensionMissingError(
                f"the Triton kernels are not where they are imported from ({error}), because crd_fast is used from a "
                f"checkout that is not installed. Install it with `{native.BUILD_COMMAND}`"
            ) from error
        raise ExtensionMissingError(
            f"the Triton kernels could not be imported ({error}). Install Triton with `pip install "
            "'crd-fast[triton]'`; or set CRD_FAST_BACKEND=reference for the slow PyTorch formulas"
        ) from error


def _compiled_residual(inputs: ResidualInputs) -> bool:
    latents = (inputs.predicted, inputs.target, inputs.x0, inputs.ref, inputs.ref_uncond, inputs.old)
    return _compiled(*[tensor.dtype for tensor in latents if tensor is not None])


# --- noise ------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::noise",
    mutates_args=(),
    schema="(Tensor x0, Tensor sigma, Tensor sample_ids, SymInt seed, SymInt stream, ScalarType dtype) -> Tensor",
)
def _noise_op(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma eps, contiguous (B, *latent) in `dtype`; differentiable in x0."""
    return reference.noise(x0, sigma, sample_ids, seed, stream, dtype)


@_noise_op.register_kernel("cpu")
def _noise_cpu(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(x0.dtype, dtype):
        return reference.noise(x0, sigma, sample_ids, seed, stream, dtype)
    out = native.empty(*x0.shape, dtype=dtype)
    native.noise(x0, sigma.float().contiguous(), sample_ids.contiguous(), seed, stream, out)
    return out


@_noise_op.register_kernel("cuda")
@on_its_device
def _noise_cuda(x0: Tensor, sigma: Tensor, sample_ids: Tensor, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(x0.dtype, dtype):
        return reference.noise(x0, sigma, sample_ids, seed, stream, dtype)
    return _triton().noise(x0, sigma.float(), sample_ids, seed, stream, dtype)


@_noise_op.register_fake
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


_noise_op.register_autograd(_noise_backward, setup_context=_noise_setup_context)
noise = Operation(
    _noise_op, {"cpu": _noise_cpu, "cuda": _noise_cuda}, _noise_setup_context, _noise_backward, differentiable=(0,)
)


@torch.library.custom_op(
    "crd_fast::epsilon",
    mutates_args=(),
    schema="(Tensor sample_ids, SymInt[] shape, SymInt seed, SymInt stream, ScalarType dtype) -> Tensor",
)
def _epsilon_op(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """The standard normals that `noise` adds, contiguous (B, *latent) in `dtype`."""
    return reference.epsilon(sample_ids, shape, seed, stream, dtype)


@_epsilon_op.register_kernel("cpu")
def _epsilon_cpu(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(dtype):
        return reference.epsilon(sample_ids, shape, seed, stream, dtype)
    out = native.empty(*shape, dtype=dtype)
    native.epsilon(sample_ids.contiguous(), seed, stream, out)
    return out


@_epsilon_op.register_kernel("cuda")
@on_its_device
def _epsilon_cuda(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    if not _compiled(dtype):
        return reference.epsilon(sample_ids, shape, seed, stream, dtype)
    return _triton().epsilon(sample_ids, tuple(shape), seed, stream, dtype)


@_epsilon_op.register_fake
def _epsilon_fake(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    return sample_ids.new_empty(tuple(shape), dtype=dtype)


epsilon = Operation(_epsilon_op, {"cpu": _epsilon_cpu, "cuda": _epsilon_cuda})


# --- residual statistics and their gradient ---------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::residual_stats",
    mutates_args=(),
    schema=f"({_RESIDUAL_ARGUMENTS}) -> ({_STATISTICS})",
)
def _residual_stats_op(*arguments: Any) -> tuple[Tensor, ...]:
    """E, M, K of `ResidualInputs`, each (B,), and E and M of its `old`; differentiable in `predicted` alone, through E
    and K."""
    return reference.residual_stats(ResidualInputs(*arguments))


@_residual_stats_op.register_kernel("cpu")
def _residual_stats_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _dense_ids(ResidualInputs(*arguments))
    if not _compiled_residual(inputs):
        return reference.residual_stats(inputs)
    return native.residual_stats(inputs, *_scales(inputs, torch.float64))


@_residual_stats_op.register_kernel("cuda")
@on_its_device
def _residual_stats_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = ResidualInputs(*arguments)
    if not _compiled_residual(inputs):
        return reference.residual_stats(inputs)
    return tuple(_triton().residual_stats(*_triton_arguments(inputs), inputs.old))


@_residual_stats_op.register_fake
def _residual_stats_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = ResidualInputs(*arguments)
    batch, dtype = inputs.predicted.shape[0], reference.statistics_dtype(inputs)
    of_old = 0 if inputs.old is None else batch
    return tuple(inputs.predicted.new_empty(size, dtype=dtype) for size in (batch, batch, batch, of_old, of_old))


@torch.library.custom_op(
    "crd_fast::residual_grad",
    mutates_args=(),
    schema=f"({_RESIDUAL_ARGUMENTS}, Tensor? grad_mse, Tensor? grad_kl, Tensor? upstream) -> Tensor",
)
def _residual_grad_op(*arguments: Any) -> Tensor:
    """dL/dpredicted from dL/dE and dL/dK, each (B,) or None, times upstream, (), (B,) or None.

    Shape, dtype and layout are those of `predicted`; `old` has no part in it.
    """
    *inputs, grad_mse, grad_kl, upstream = arguments
    return reference.residual_grad(ResidualInputs(*inputs), grad_mse, grad_kl, upstream)


@_residual_grad_op.register_kernel("cpu")
def _residual_grad_cpu(*arguments: Any) -> Tensor:
    *shared, grad_mse, grad_kl, upstream = arguments
    inputs = _dense_ids(ResidualInputs(*shared))
    if not _compiled_residual(inputs):
        return reference.residual_grad(inputs, grad_mse, grad_kl, upstream)
    out = torch.empty_like(inputs.predicted)
    slopes = (_slope(grad_mse), _slope(grad_kl), _slope(upstream))
    native.residual_grad(inputs, *_scales(inputs, torch.float64), *slopes, out)
    return out


def _slope(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.float().contiguous()


def _scales(inputs: ResidualInputs, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(B,) velocity factor and number of valid elements, None where every one is 1 and everything is valid."""
    if inputs.prediction == "v" and inputs.mask is None:
        return None, None
    factor, count = reference.factor_and_count(inputs, dtype)
    return (
        factor.contiguous() if inputs.prediction != "v" else None,
        count.contiguous() if inputs.mask is not None else None,
    )


def _dense_ids(inputs: ResidualInputs) -> ResidualInputs:
    return inputs if inputs.sample_ids is None else inputs._replace(sample_ids=inputs.sample_ids.contiguous())


@_residual_grad_op.register_kernel("cuda")
@on_its_device
def _residual_grad_cuda(*arguments: Any) -> Tensor:
    *shared, grad_mse, grad_kl, upstream = arguments
    inputs = ResidualInputs(*shared)
    if not _compiled_residual(inputs):
        return reference.residual_grad(inputs, grad_mse, grad_kl, upstream)
    return _triton().residual_grad(*_triton_arguments(inputs), _slope(grad_mse), _slope(grad_kl), _slope(upstream))


def _triton_arguments(inputs: ResidualInputs) -> tuple[Any, ...]:
    """What the launchers of statistics and gradient share. Velocity without a mask launches nothing here."""
    kernels = _triton()
    kinds = {"v": kernels.VELOCITY, "x0": kernels.CLEAN, "eps": kernels.NOISE}
    kind = kernels.TENSOR if inputs.target is not None else kinds[inputs.prediction]
    target = inputs.target if kind == kernels.TENSOR else None if kind == kernels.NOISE else inputs.x0
    factor, count = _scales(inputs, torch.float32)
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
        factor,
        count,
    )


@_residual_grad_op.register_fake
def _residual_grad_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0])


def _residual_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept for what cannot be taken."""


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise TransformError(
        "crd_fast's losses have first derivatives only: their gradient is one fused kernel. A gradient penalty or a "
        "Hessian-vector product needs PyTorch operations; write the formula of crd_fast.loss's docstring in them"
    )


_residual_grad_op.register_autograd(_no_second_derivative, setup_context=_residual_grad_setup_context)
residual_grad = Operation(_residual_grad_op, {"cpu": _residual_grad_cpu, "cuda": _residual_grad_cuda})


_SAVED = ("predicted", "target", "x0", "sigma", "sample_ids", "ref", "ref_uncond", "mask")


def _save(ctx: Any, inputs: ResidualInputs, *others: Tensor) -> None:
    """What the gradient needs: everything but `old`."""
    ctx.save_for_backward(*(getattr(inputs, name) for name in _SAVED), *others)
    nothing: dict[str, Any] = dict.fromkeys((*_SAVED, "old"))
    ctx.numbers = inputs._replace(**nothing)


def _saved(ctx: Any) -> tuple[ResidualInputs, Sequence[Tensor]]:
    tensors = ctx.saved_tensors
    inputs = ctx.numbers._replace(**dict(zip(_SAVED, tensors, strict=False)))
    return inputs, tensors[len(_SAVED) :]


def _residual_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = ResidualInputs(*inputs)
    _save(ctx, given)
    ctx.mark_non_differentiable(output[1], output[3], output[4])
    ctx.set_materialize_grads(False)


def _residual_backward(
    ctx: Any, grad_mse: Tensor | None, grad_mae: None, grad_kl: Tensor | None, *of_old: None
) -> tuple[Tensor | None, ...]:
    inputs, _ = _saved(ctx)
    unused = grad_mse is None and grad_kl is None
    grad = None if unused else residual_grad(*inputs, grad_mse, grad_kl, None)
    return grad, *(None,) * (len(inputs) - 1)


_residual_stats_op.register_autograd(_residual_backward, setup_context=_residual_setup_context)
residual_stats = Operation(
    _residual_stats_op,
    {"cpu": _residual_stats_cpu, "cuda": _residual_stats_cuda},
    _residual_setup_context,
    _residual_backward,
    differentiable=(0,),
)


# --- the objective ----------------------------------------------------------------------------------------


@torch.library.custom_op(
    "crd_fast::objective",
    mutates_args=(),
    schema="(Tensor mse, Tensor mae, Tensor kl, Tensor old_mse, Tensor old_mae, Tensor advantages, "
    "Tensor? group_ids, Tensor? sample_weights, Tensor? kl_weights, Tensor? member_ids, Tensor? members, "
    "float beta, float kl_coef, float adv_clip, bool adaptive_weight, bool adaptive_kl, float temperature, "
    "str loss_type, str reduction) "
    "-> (Tensor loss, Tensor parts, Tensor samples, Tensor slopes, Tensor metrics)",
)
def _objective_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference_objective.Objective` of `ObjectiveInputs`; its loss is differentiable in mse and kl."""
    return reference_objective.objective(ObjectiveInputs(*arguments))


def _compiled_objective(inputs: ObjectiveInputs) -> bool:
    return _compiled(inputs.mse.dtype, inputs.old_mse.dtype)


@_objective_op.register_kernel("cpu")
def _objective_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = ObjectiveInputs(*arguments)
    if not _compiled_objective(inputs):
        return reference_objective.objective(inputs)
    return native.objective(inputs)


@_objective_op.register_kernel("cuda")
@on_its_device
def _objective_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = ObjectiveInputs(*arguments)
    if not _compiled_objective(inputs):
        return reference_objective.objective(inputs)
    loss, parts, samples, slopes, metrics = _triton().objective(*inputs)
    return loss, parts, samples, slopes, metrics


@_objective_op.register_fake
def _objective_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = ObjectiveInputs(*arguments)
    batch, dtype = inputs.mse.shape[0], reference_objective.objective_dtype(inputs.mse, inputs.old_mse)
    shape = (batch,) if inputs.reduction == "none" else ()
    shapes = (shape, (2, *shape), (3, batch), (2, batch), (len(reference_objective.METRICS),))
    loss, parts, samples, slopes, metrics = (inputs.mse.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, parts, samples, slopes, metrics


def _objective_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = ObjectiveInputs(*inputs)
    _, parts, samples, slopes, metrics = output
    ctx.save_for_backward(slopes)
    ctx.anchored = given.kl_coef != 0
    ctx.dtypes = (given.mse.dtype, given.kl.dtype)
    ctx.mark_non_differentiable(parts, samples, slopes, metrics)
    ctx.set_materialize_grads(False)


def _objective_backward(ctx: Any, grad_loss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (len(ObjectiveInputs._fields) - 3)
    if grad_loss is None:
        return None, None, None, *rest
    (slopes,) = ctx.saved_tensors
    grad = slopes * grad_loss  # (2, B)
    mse_dtype, kl_dtype = ctx.dtypes
    return grad[0].to(mse_dtype), None, grad[1].to(kl_dtype) if ctx.anchored else None, *rest


_objective_op.register_autograd(_objective_backward, setup_context=_objective_setup_context)
objective = Operation(
    _objective_op,
    {"cpu": _objective_cpu, "cuda": _objective_cuda},
    _objective_setup_context,
    _objective_backward,
    differentiable=(0, 2),
)


# --- from predictions to the loss ---------------------------------------------------------------------------


Between = Callable[[Sequence[Tensor]], ObjectiveInputs]
"""What a loss does with residual statistics before the objective: adds its (B,) inputs, asks other ranks."""


def objective_of_predictions(inputs: ResidualInputs, between: Between) -> Any:
    """`objective(*between(residual_stats(*inputs)))`, differentiable in `predicted`.

    In plain eager mode the two are one node of the graph, whose gradient is a single call.
    """
    if residual_stats.is_differentiated_straight(*inputs):
        return _ObjectiveOfPredictions.apply(inputs.predicted, inputs, between)
    return objective(*between(residual_stats(*inputs)))


class _ObjectiveOfPredictions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predicted: Tensor, inputs: ResidualInputs, between: Between) -> tuple[Tensor, ...]:
        device = predicted.device.type
        given = between(residual_stats.kernels[device](*inputs))
        loss, parts, samples, slopes, metrics = objective.kernels[device](*given)
        ctx.anchored = given.kl_coef != 0
        _save(ctx, inputs, slopes)
        ctx.mark_non_differentiable(parts, samples, slopes, metrics)
        ctx.set_materialize_grads(False)
        return loss, parts, samples, slopes, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: None) -> tuple[Tensor | None, None, None]:
        if grad_loss is None:
            return None, None, None
        inputs, (slopes,) = _saved(ctx)
        kl_slope = slopes[1] if ctx.anchored else None
        # under create_graph the operator itself is called, which refuses to be differentiated once more
        run = residual_grad if torch.is_grad_enabled() else residual_grad.kernels[inputs.predicted.device.type]
        return run(*inputs, slopes[0], kl_slope, grad_loss), None, None
