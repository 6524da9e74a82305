"""Triton kernels under the interpreter, against the C++ extension: run by test_interpreter.py in a process of its own.

The interpreter is chosen when a kernel is decorated, so TRITON_INTERPRET=1 must be set before the import.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crd_fast import kernels, native, ops, reference, reference_objective
from crd_fast.didr import ops as generator_ops
from crd_fast.didr import reference as generator_reference
from crd_fast.didr.reference import GeneratorInputs
from crd_fast.reference import ResidualInputs
from crd_fast.reference_objective import ObjectiveInputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (2, 63), (3, 1000), (1, 5000), (2, 3, 4, 5), (2, 9, 6)]


@pytest.fixture(autouse=True)
def unwritten_elements_show():
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dim", [1, 4, 63, 1000, 4100])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (-1, 2**31 - 1), (2**33 + 1, 7), (-(2**63), 1)])
def test_normals_equal_the_extension(dim, seed, stream):
    ids = torch.tensor([0, 3, 2**40, 2**62 + 2**33, -1])
    expected = torch.empty(len(ids), dim)
    native.epsilon(ids, seed, stream, expected)
    got = kernels.epsilon(ids, expected.shape, seed, stream, torch.float32)
    ulp = torch.nextafter(expected.abs(), torch.tensor(torch.inf)) - expected.abs()
    assert ((got - expected).abs() <= 4 * ulp).all()


@pytest.mark.parametrize("x0_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_equals_the_extension(shape, x0_dtype, out_dtype):
    generator = torch.Generator().manual_seed(0)
    x0, sigma = torch.randn(shape, generator=generator).to(x0_dtype), torch.rand(shape[0], generator=generator)
    ids = torch.arange(shape[0]) + 5
    expected = torch.empty(shape, dtype=out_dtype)
    native.noise(x0, sigma, ids, 3, 1, expected)
    got = kernels.noise(x0, sigma, ids, 3, 1, out_dtype)
    eps = torch.finfo(out_dtype).eps
    torch.testing.assert_close(got, expected, rtol=2 * eps, atol=2 * torch.finfo(torch.float32).eps)


def residual_case(shape, seeded, prediction, dtype, anchored, guided, mask_shape, transposed=False, old=False):
    generator = torch.Generator().manual_seed(1)

    def tensor(kind=dtype):
        drawn = torch.randn(shape, generator=generator).to(kind)
        if transposed:
            axes = (0, *range(drawn.ndim - 1, 0, -1))
            drawn = drawn.permute(axes).contiguous().permute(axes)
        return drawn

    batch = shape[0]
    return ResidualInputs(
        predicted=tensor(),
        target=None if seeded else tensor(torch.float32),
        x0=tensor() if seeded else None,
        sigma=torch.rand(batch, generator=generator) if seeded else None,
        sample_ids=torch.arange(batch) + 2**33 if seeded else None,
        seed=11,
        stream=2,
        ref=tensor() if anchored else None,
        ref_uncond=tensor(torch.bfloat16) if guided else None,
        guidance_scale=3.5,
        mask=None if mask_shape is None else torch.rand(mask_shape, generator=generator) < 0.6,
        prediction=prediction,
        old=tensor(torch.float16) if old else None,
    )


arguments = ops._triton_arguments  # what the CUDA dispatch gives the launchers


def statistics(inputs):
    return kernels.residual_stats(*arguments(inputs), inputs.old)


CASES = [
    residual_case((1, 1), False, "v", torch.float32, False, False, None),
    residual_case((2, 63), True, "v", torch.bfloat16, True, True, None, old=True),
    residual_case((3, 1000), True, "x0", torch.float16, True, False, (3, 1000)),
    residual_case((1, 5000), True, "eps", torch.float32, True, True, (1, 5000), old=True),
    residual_case((2, 3, 4, 5), False, "v", torch.bfloat16, True, True, (2, 1, 4, 1), transposed=True, old=True),
    residual_case((2, 3, 4, 5), True, "v", torch.float32, True, True, (1, 3, 1, 5), transposed=True),
    residual_case((2, 9, 6), True, "v", torch.bfloat16, True, True, (2, 9, 1)),
    residual_case((2, 3, 2, 4, 2, 3), False, "v", torch.float32, True, False, (1, 3, 1, 4, 1, 3)),
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_statistics_equal_fp64_formulas(index):
    inputs = CASES[index]
    doubled = inputs._replace(predicted=inputs.predicted.double())
    for got, truth in zip(statistics(inputs), reference.residual_stats(doubled), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_gradient_equals_fp64_formula(index):
    inputs = CASES[index]
    weights = torch.tensor([[0.7, -0.3, 0.0], [1.5, 0.0, 0.2]])[:, : len(inputs.predicted)]
    upstream = (None, torch.tensor(0.5), torch.tensor([2.0, -1.0, 0.25])[: len(inputs.predicted)])[index % 3]
    got = kernels.residual_grad(*arguments(inputs), *weights, upstream)
    truth = reference.residual_grad(inputs._replace(predicted=inputs.predicted.double()), *weights.double(), upstream)
    assert got.dtype == inputs.predicted.dtype and got.stride() == inputs.predicted.stride()
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), truth, rtol=2 * eps, atol=2e-6 * float(truth.abs().max()))


def test_dropped_and_masked_values_may_hold_anything():
    inputs = residual_case((3, 50), True, "v", torch.float32, True, True, (3, 50))
    dirty = inputs._replace(predicted=torch.where(inputs.mask, inputs.predicted, torch.nan))
    for got, expected in zip(statistics(dirty), statistics(inputs), strict=True):
        assert torch.equal(got, expected)
    dirty.predicted[1] = torch.inf
    weights = torch.tensor([[0.5, 0.0, 1.0], [0.25, 0.0, 2.0]])
    grad = kernels.residual_grad(*arguments(dirty), *weights)
    assert not grad[1].any() and grad.isfinite().all()


def test_a_slope_that_is_not_there_reads_nothing():
    inputs = residual_case((2, 70), True, "v", torch.float32, True, True, None)
    slope = torch.tensor([0.5, -1.0])
    zero = torch.zeros(2)
    anchorless = inputs._replace(ref=torch.full_like(inputs.ref, torch.nan))
    without, with_zero = (slope, None), (slope, zero)
    expected = kernels.residual_grad(*arguments(inputs), *with_zero)
    assert torch.equal(kernels.residual_grad(*arguments(anchorless), *without), expected)
    targetless = inputs._replace(x0=torch.full_like(inputs.x0, torch.nan))
    expected = kernels.residual_grad(*arguments(inputs), *reversed(with_zero))
    assert torch.equal(kernels.residual_grad(*arguments(targetless), *reversed(without)), expected)


# --- the objective ------------------------------------------------------------------------------------------


def objective_case(batch, *, grouped=True, weighted=False, gathered=0, dirty=False, **settings):
    generator = torch.Generator().manual_seed(batch)
    mse, mae, kl, old_mse, old_mae = (torch.rand(batch, generator=generator) + 0.1 for _ in range(5))
    advantages = 3 * torch.randn(batch, generator=generator, dtype=torch.float64)
    group_ids = 2**53 + torch.randint(0, 4, (batch,), generator=generator) if grouped else None
    weights = kl_weights = member_ids = members = None
    if weighted:
        weights = torch.rand(batch, generator=generator).bfloat16() * (torch.rand(batch, generator=generator) < 0.6)
        kl_weights = torch.rand(batch, generator=generator) * (torch.rand(batch, generator=generator) < 0.6)
    if gathered:
        own = torch.zeros(batch, dtype=torch.int64) if group_ids is None else group_ids
        member_ids = torch.cat((own, 2**53 + torch.randint(0, 5, (gathered,), generator=generator)))
        drawn = torch.rand(3, len(member_ids), generator=generator)
        members = torch.stack((drawn[0], drawn[1] - 0.5, (drawn[2] < 0.8).float()))
    if dirty:
        for vector in (mse, mae, kl, old_mse, old_mae, advantages):
            vector[weights == 0] = torch.nan
    chosen = {
        "beta": 2.0,
        "kl_coef": 0.1,
        "adv_clip": 5.0,
        "adaptive_weight": True,
        "adaptive_kl": True,
        "temperature": math.inf,
        "loss_type": "mse",
        "reduction": "mean",
        **settings,
    }
    return ObjectiveInputs(
        mse, mae, kl, old_mse, old_mae, advantages, group_ids, weights, kl_weights, member_ids, members, **chosen
    )


OBJECTIVES = [
    objective_case(1),
    objective_case(7, grouped=False, loss_type="bce", reduction="sum"),
    objective_case(24, weighted=True, dirty=True, temperature=0.5, reduction="none"),
    objective_case(100, weighted=True, dirty=True, temperature=0.0, adaptive_weight=False),
    objective_case(40, gathered=90, temperature=0.02, loss_type="bce"),
    objective_case(20, grouped=False, gathered=70, weighted=True, kl_coef=0.0),
    objective_case(33, gathered=10, temperature=0.0, adaptive_kl=False, adv_clip=0.5, reduction="none"),
    objective_case(130, adaptive_kl=False),
]


@pytest.mark.parametrize("index", range(len(OBJECTIVES)))
def test_objective_equals_fp64_formulas(index):
    inputs = OBJECTIVES[index]
    doubled = inputs._replace(
        **{n: v.double() for n, v in inputs._asdict().items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    )
    truth = reference_objective.objective(doubled)
    eager = reference_objective.objective(inputs)
    for name, got, exact, rounded in zip(truth._fields, kernels.objective(*inputs), truth, eager, strict=True):
        assert got.dtype == torch.float32 and got.shape == exact.shape
        # no more than twice the error of the same formulas in fp32, and 1e-6 of the size of what is added up
        allowed = 2 * (rounded - exact).abs().max() + 1e-6 * (1 + exact.abs().max())
        assert (got - exact).abs().max() <= allowed, name


# --- DIDR's generator stage ---------------------------------------------------------------------------------


def generator_case(shape, dtypes, *, guided=True, distance=2, transposed=False, dirty=False):
    """GeneratorInputs, and (x0, x_t, shift) of the distance: nothing, of an estimate (1), of a prediction (2)."""
    generator = torch.Generator().manual_seed(2)
    of_latents = iter(dtypes * 6)

    def tensor():
        drawn = torch.randn(shape, generator=generator)
        if dirty:
            bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, shape, generator=generator)]
            drawn = torch.where(torch.rand(shape, generator=generator) < 0.1, bad, drawn)
        if transposed:
            axes = (0, *range(drawn.ndim - 1, 0, -1))
            drawn = drawn.permute(axes).contiguous().permute(axes)
        return drawn.to(next(of_latents))

    slope, level, shift = torch.rand(3, shape[0], generator=generator) + 0.2
    inputs = GeneratorInputs(tensor(), tensor(), tensor() if guided else None, 3.5, tensor(), -slope, level)
    return inputs, (
        tensor() if distance else None,
        tensor() if distance == 2 else None,
        shift if distance == 2 else None,
    )


GENERATORS = [
    generator_case((1, 1), [torch.float32]),
    generator_case((2, 63), [torch.bfloat16], guided=False),
    generator_case((3, 1000), [torch.float16], distance=1),
    generator_case((1, 5000), [torch.float32, torch.bfloat16], distance=0),
    generator_case((2, 3, 4, 5), [torch.bfloat16, torch.float32, torch.float16], transposed=True),
    generator_case((2, 9, 6), [torch.float32], dirty=True, distance=0),
    generator_case((2, 2100), [torch.bfloat16], dirty=True, distance=0, guided=False),
]


def in_double(values):
    return tuple(value.double() if isinstance(value, torch.Tensor) else value for value in values)


@pytest.mark.parametrize("index", range(len(GENERATORS)))
def test_generator_statistics_equal_fp64_formulas(index):
    inputs, of_distance = GENERATORS[index]
    truth = generator_reference.generator_statistics(GeneratorInputs(*in_double(inputs)), *in_double(of_distance))
    got = kernels.generator_statistics(*inputs, *of_distance)
    for name, value, exact in zip(truth._fields[:4], got, truth, strict=False):
        torch.testing.assert_close(value.double(), exact, rtol=5e-6, atol=1e-7, msg=name)
    assert torch.equal(got[4], truth.invalid) and bool(truth.invalid.any()) == (index >= 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(GENERATORS)))
def test_generator_gradient_equals_fp64_formula(index, dtype):
    inputs, _ = GENERATORS[index]
    scale, upstream = torch.tensor([0.7, -1.5, 0.0])[: len(inputs.ta)], (None, torch.tensor(0.25))[index % 2]
    got = kernels.generator_gradient(*inputs, scale, upstream, dtype)
    exact = GeneratorInputs(*in_double(inputs))
    truth = generator_reference.generator_gradient(exact, scale.double(), upstream, torch.float64)
    assert got.dtype == dtype and got.stride() == torch.empty_like(inputs.ta).stride()
    torch.testing.assert_close(
        got.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=2e-6 * float(truth.abs().max()) + 1e-7
    )


def test_dropped_samples_of_the_generator_may_hold_anything():
    inputs, _ = generator_case((3, 50), [torch.float32])
    inputs.ta[1] = torch.inf
    gradient = kernels.generator_gradient(
        *inputs, torch.tensor([1.0, 0.0, 0.0]), torch.tensor(torch.inf), torch.float32
    )
    assert not gradient[1:].any() and gradient[0].isinf().any()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_programs_default_dtype_changes_no_bit(default):
    inputs, objective, (generator, of_distance) = CASES[1], OBJECTIVES[2], GENERATORS[2]

    def run():
        return (
            *statistics(inputs),
            *kernels.objective(*objective),
            *kernels.generator_statistics(*generator, *of_distance),
        )

    expected = run()
    torch.set_default_dtype(default)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# --- launches -----------------------------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Names of PyTorch's operators that would launch something on a GPU: not those that allocate or make views."""

    FREE = {
        "empty",
        "empty_like",
        "new_empty",
        "permute",
        "view",
        "reshape",
        "_unsafe_view",
        "detach",
        "select",
        "unbind",
    }

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.FREE and not self.in_kernel:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class Counted:
    """A kernel that logs its launches."""

    def __init__(self, kernel, name, log, work):
        self.kernel, self.name, self.log, self.work = kernel, name, log, work

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.log.append(self.name)
            self.work.in_kernel = True
            self.kernel[grid](*arguments, **options)
            self.work.in_kernel = False

        return launch


@pytest.mark.parametrize("old_is_a_prediction", [True, False])
@pytest.mark.parametrize("index", [0, 5])
def test_a_loss_is_four_launches_forward_and_one_backward(monkeypatch, old_is_a_prediction, index):
    torch.use_deterministic_algorithms(False)  # whose filling of new tensors is a launch
    launched, work = [], Work()
    for module, names in (
        ("residual", ("partial_sums_kernel", "finalise_kernel", "grad_kernel")),
        ("objective", ("samples_kernel", "totals_kernel")),
    ):
        room = importlib.import_module(f"crd_fast.kernels.{module}")
        for name in names:
            monkeypatch.setattr(room, name, Counted(getattr(room, name), name, launched, work))
    inputs = residual_case((3, 40), index == 5, "v", torch.bfloat16, True, True, None, old=old_is_a_prediction)
    objective = OBJECTIVES[index]
    with monkeypatch.context() as patched:
        patched.setattr(ops, "_triton", lambda: kernels)
        with work:
            mse, _, kl, _, _ = ops._residual_stats_cuda(*inputs)
            ops._objective_cuda(*objective)
            assert launched == ["partial_sums_kernel", "finalise_kernel", "samples_kernel", "totals_kernel"]
            ops._residual_grad_cuda(*inputs, mse, kl, mse.new_empty(()))
    assert launched[4:] == ["grad_kernel"]
    assert work.names == []


def test_the_generator_is_two_launches_forward_and_one_backward(monkeypatch):
    torch.use_deterministic_algorithms(False)
    launched, work = [], Work()
    room = importlib.import_module("crd_fast.kernels.generator")
    for name in ("partial_sums_kernel", "finalise_kernel", "gradient_kernel"):
        monkeypatch.setattr(room, name, Counted(getattr(room, name), name, launched, work))
    inputs, of_distance = generator_case((3, 4, 5), [torch.bfloat16], transposed=True)
    with monkeypatch.context() as patched:
        patched.setattr(generator_ops, "_triton", lambda: kernels)
        with work:
            generator_ops._statistics_cuda(*inputs, *of_distance)
            assert launched == ["partial_sums_kernel", "finalise_kernel"]
            generator_ops._gradient_cuda(*inputs, inputs.level, inputs.level.new_empty(()), torch.float32)
    assert launched[2:] == ["gradient_kernel"]
    assert work.names == []
