"""Every kernel against its formula in float64, on whatever device: what `benchmarks.gpu_suite` begins with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from crd_fast import ops, reference
from crd_fast.didr import ops as didr_ops
from crd_fast.didr import reference as didr_reference
from crd_fast.didr.reference import GeneratorInputs
from crd_fast.reference import ResidualInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_kernels(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """What differs from the fp64 formulas by more than fp32 arithmetic explains, or is not the same twice."""
    return [
        *_wrong_normals(device, shapes),
        *_wrong_residuals(device, shapes),
        *_wrong_generators(device, shapes),
    ]


def _wrong_normals(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    wrong = []
    for shape in shapes:
        ids = torch.arange(shape[0], device=device) - 1
        truth = reference.epsilon(ids.cpu(), shape, -3, 2**31 - 1, torch.float32)
        drawn = ops.epsilon(ids, shape, -3, 2**31 - 1, torch.float32).cpu()
        ulp = torch.nextafter(truth.abs(), torch.tensor(torch.inf)) - truth.abs()
        if not ((drawn - truth).abs() <= 4 * ulp).all():
            wrong.append(f"normals {shape}: more than 4 ulp off")
    return wrong


def _wrong_sums(
    name: str, labels: Sequence[str], values: Sequence[Tensor], again: Sequence[Tensor], truths: Sequence[Tensor]
) -> list[str]:
    wrong = []
    for label, value, twice, truth in zip(labels, values, again, truths, strict=True):
        if not torch.allclose(value.double(), truth.double(), rtol=2e-5, atol=1e-7):
            wrong.append(f"{label} {name}")
        if not torch.equal(value, twice):
            wrong.append(f"{label} {name}: not the same twice")
    return wrong


def _is_close(gradient: Tensor, truth: Tensor) -> bool:
    """To a rounding of each element, and to 1e-5 of a sample's largest where its terms cancel."""
    info = torch.finfo(gradient.dtype)
    largest = truth.abs().flatten(1).amax(1).view(-1, *(1,) * (truth.ndim - 1))
    bound = info.eps * truth.abs() + 1e-5 * largest + info.smallest_normal
    return bool(((gradient.double() - truth).abs() <= bound).all())


# --- residual statistics and gradient ---


def _residual_cases(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[tuple[str, ResidualInputs]]:
    """Every combination of dtype, target, anchor and mask, at every shape."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for shape, dtype, prediction, masked in itertools.product(shapes, DTYPES, (None, "v", "x0", "eps"), (False, True)):

        def tensor(shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        seeded = prediction is not None
        mask = torch.rand(shape, generator=generator) < 0.6 if masked else None
        inputs = ResidualInputs(
            predicted=tensor(),
            target=None if seeded else tensor(),
            x0=tensor() if seeded else None,
            sigma=torch.rand(shape[0], generator=generator).to(device) if seeded else None,
            sample_ids=torch.arange(shape[0], device=device) + 2**40 if seeded else None,
            seed=-12345,
            stream=7,
            ref=tensor(),
            ref_uncond=tensor(),
            guidance_scale=4.5,
            mask=None if mask is None else mask.to(device),
            prediction=prediction or "v",
            old=tensor() if masked == seeded else None,
        )
        cases.append((f"{shape} {dtype} {prediction or 'tensor'}{' masked' if masked else ''}", inputs))
    return cases


def _wrong_residuals(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    wrong = []
    for name, inputs in _residual_cases(device, shapes):
        weights = torch.rand(2, len(inputs.predicted), device=device)
        doubled = inputs._replace(predicted=inputs.predicted.double())
        statistics, again = ops.residual_stats(*inputs), ops.residual_stats(*inputs)
        wrong += _wrong_sums(
            name, ("E", "M", "K", "old E", "old M"), statistics, again, reference.residual_stats(doubled)
        )
        gradient = ops.residual_grad(*inputs, *weights, None)
        if not _is_close(gradient, reference.residual_grad(doubled, *weights.double())):
            wrong.append(f"gradient {name}")
    return wrong


# --- DIDR's generator statistics and gradient ---


def _wrong_generators(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for shape, dtype, guided, normalised in itertools.product(shapes, DTYPES, (False, True), (False, True)):

        def latents(shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        def vector(shape: tuple[int, ...] = shape) -> Tensor:
            return (0.1 + torch.rand(shape[0], generator=generator)).to(device)

        inputs = GeneratorInputs(
            ta=latents(),
            ref=latents(),
            ref_uncond=latents() if guided else None,
            guidance_scale=4.5,
            s_r=latents(),
            slope=-vector(),
            level=vector(),
        )
        inputs.s_r.view(-1)[0] = torch.nan  # counted and left out
        others = (latents(), latents(), vector()) if normalised else (None, None, None)
        scale, upstream = vector(), torch.full((), 0.5, device=device)
        doubled = inputs._replace(level=inputs.level.double())
        name = f"{shape} {dtype}{' guided' if guided else ''}{' normalised' if normalised else ''}"
        statistics, again = (didr_ops.generator_statistics(*inputs, *others) for _ in range(2))
        truth = didr_reference.generator_statistics(doubled, *others)
        wrong += _wrong_sums(f"generator {name}", truth._fields, statistics, again, truth)
        gradient = didr_ops.generator_gradient(*inputs, scale, upstream, dtype)
        exact = didr_reference.generator_gradient(doubled, scale.double(), upstream.double(), torch.float64)
        if not _is_close(gradient, exact):
            wrong.append(f"generator gradient {name}")
    return wrong
