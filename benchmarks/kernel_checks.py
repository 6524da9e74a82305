"""Every kernel against its formula in float64, on whatever device: what `benchmarks.gpu_suite` begins with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crd_fast import ops, reference, reference_objective
from crd_fast.didr import ops as didr_ops
from crd_fast.didr import reference as didr_reference
from crd_fast.didr.reference import GeneratorInputs
from crd_fast.reference import ResidualInputs
from crd_fast.reference_objective import ObjectiveInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_kernels(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """What differs from the fp64 formulas by more than fp32 arithmetic explains, or is not the same twice."""
    return [
        *_wrong_normals(device, shapes),
        *_wrong_noise(device, shapes),
        *_wrong_residuals(device, shapes),
        *_wrong_objectives(device),
        *_wrong_generators(device, shapes),
    ]


def _dtypes(shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> tuple[torch.dtype, ...]:
    """All of them at the first shapes and one at each other: every combination is a kernel to be compiled."""
    place = shapes.index(shape)
    return DTYPES if place < 3 else (DTYPES[place % 3],)


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


def _wrong_noise(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """x_t of dense and of strided latents: within a rounding of the formula, of noise that is checked by itself."""
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for shape, strided in itertools.product(shapes, (False, True)):
        for dtype in _dtypes(shapes, shape):
            x0 = torch.randn(shape, generator=generator).to(dtype)
            sigma, ids = torch.rand(shape[0], generator=generator), torch.arange(shape[0]) + 2**33
            truth = reference.noise(x0.double(), sigma.double(), ids, 5, 1, torch.float64)
            given = _strided(x0.to(device)) if strided else x0.to(device)
            made = ops.noise(given, sigma.to(device), ids.to(device), 5, 1, dtype).cpu()
            size = x0.double().abs() + truth.abs()
            if not ((made.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-6 * (1 + size)).all():
                wrong.append(f"noise {shape} {dtype}{' strided' if strided else ''}")
    return wrong


def _strided(latents: Tensor) -> Tensor:
    """The same values in another layout: the last axis first in memory, with room between its elements."""
    turned = latents.movedim(-1, 1).contiguous().movedim(1, -1)
    return torch.stack((turned, turned), -1)[..., 0]


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
    kinds = itertools.product(shapes, (None, "v", "x0", "eps"), (False, True))
    for (shape, prediction, masked), dtype in ((kind, d) for kind in kinds for d in _dtypes(shapes, kind[0])):

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
        name = f"{shape} {dtype} {prediction or 'tensor'}{' masked' if masked else ''}"
        cases.append((name, inputs))
        if dtype == DTYPES[0]:
            cases.append((f"{name} strided", inputs._replace(predicted=_strided(inputs.predicted))))
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
        exact = reference.residual_grad(doubled, *weights.double())
        for scale in (None, torch.full((), 0.5, device=device)):
            gradient = ops.residual_grad(*inputs, *weights, scale)
            if not _is_close(gradient, exact if scale is None else 0.5 * exact):
                wrong.append(f"gradient {name}{'' if scale is None else ' scaled'}")
    return wrong


# --- the objective ---


def _objective_cases(device: torch.device) -> list[tuple[str, ObjectiveInputs]]:
    """Every kind of centering, loss and reduction; one group and several, gathered members, left-out samples."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    settings = list(itertools.product((math.inf, 0.0, 0.5), ("mse", "bce"), ("none", "sum", "mean"), (False, True)))
    for number, (temperature, loss_type, reduction, gathered) in enumerate(settings):
        batch, grouped, weighted = (1, 7, 300)[number % 3], number % 2 == 0, number % 5 < 3

        def vector(size: int, low: float = 0.1) -> Tensor:
            return (low + torch.rand(size, generator=generator)).to(device)

        def ids(size: int, groups: int) -> Tensor:
            return (2**53 + torch.randint(0, groups, (size,), generator=generator)).to(device)

        group_ids = ids(batch, 4) if grouped else None
        member_ids = members = None
        if gathered:
            own = torch.zeros(batch, dtype=torch.int64, device=device) if group_ids is None else group_ids
            member_ids = torch.cat((own, ids(90, 5)))
            members = torch.stack((*(vector(batch + 90, -0.5) for _ in range(2)), (vector(batch + 90) < 0.9).float()))
        inputs = ObjectiveInputs(
            *(vector(batch) for _ in range(5)),
            advantages=6 * vector(batch, -0.5),
            group_ids=group_ids,
            sample_weights=vector(batch) * (vector(batch) < 0.7) if weighted else None,
            kl_weights=vector(batch) * (vector(batch) < 0.7) if weighted else None,
            member_ids=member_ids,
            members=members,
            beta=2.0,
            kl_coef=0.1,
            adv_clip=(0.5, 5.0)[number % 2],
            adaptive_weight=number % 4 != 0,
            adaptive_kl=number % 4 != 1,
            temperature=temperature,
            loss_type=loss_type,
            reduction=reduction,
        )
        name = f"temperature {temperature}, {loss_type}, {reduction}, batch {batch}"
        kinds = [kind for kind, on in (("grouped", grouped), ("weighted", weighted), ("gathered", gathered)) if on]
        cases.append((", ".join([name, *kinds]), inputs))
    return cases


def _wrong_objectives(device: torch.device) -> list[str]:
    """No more than twice off what the same formulas are in fp32, and 1e-6 of the size of what is added up."""
    wrong = []
    for name, inputs in _objective_cases(device):
        vectors = {key: value for key, value in inputs._asdict().items() if isinstance(value, Tensor)}
        doubled = inputs._replace(**{k: v.double() for k, v in vectors.items() if v.is_floating_point()})
        truth, eager = reference_objective.objective(doubled), reference_objective.objective(inputs)
        found, again = ops.objective(*inputs), ops.objective(*inputs)
        for label, got, twice, exact, rounded in zip(truth._fields, found, again, truth, eager, strict=True):
            allowed = 2 * (rounded.double() - exact).abs().max() + 1e-6 * (1 + exact.abs().max())
            if not (got.double() - exact).abs().max() <= allowed:
                wrong.append(f"objective's {label} {name}")
            if not torch.equal(got, twice):
                wrong.append(f"objective's {label} {name}: not the same twice")
    return wrong


# --- DIDR's generator statistics and gradient ---


def _wrong_generators(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    wrong = []
    kinds = itertools.product(shapes, (False, True), (False, True))
    for (shape, guided, normalised), dtype in ((kind, d) for kind in kinds for d in _dtypes(shapes, kind[0])):

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
