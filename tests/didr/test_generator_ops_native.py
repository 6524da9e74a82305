"""The C++ sums and gradient of DIDR's generator stage against fp64 formulas, in every layout, bit by bit equal over
layouts, threads and batches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crd_fast import native as extension_module
from crd_fast.didr import ops, reference
from crd_fast.didr.reference import GeneratorInputs, Statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 16), (2, 63), (7, 1000), (1, 2**16 + 3), (3, 4, 5, 7), (2, 9, 6), (2, 3, 4, 2, 5)]
LAYOUTS = ["contiguous", "reversed", "padded rows", "gaps", "batch last"]
UNIT = 2.0**-24  # of float32


def in_layout(tensor, layout):
    """The same values with other strides."""
    axes = {
        "reversed": (0, *range(tensor.ndim - 1, 0, -1)),
        "batch last": (*range(1, tensor.ndim), 0),
    }.get(layout)
    if axes is not None:
        inverse = sorted(range(tensor.ndim), key=axes.__getitem__)
        return tensor.permute(axes).contiguous().permute(inverse)
    if layout == "padded rows":
        wide = torch.full((len(tensor), tensor[0].numel() + 5), torch.nan, dtype=tensor.dtype)
        wide[:, :-5] = tensor.flatten(1)
        return wide[:, :-5].unflatten(1, tensor.shape[1:])
    if layout == "gaps":
        wide = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype)
        wide[..., 1] = tensor
        return wide[..., 1]
    return tensor.contiguous()


@st.composite
def cases(draw, dirty=False):
    """GeneratorInputs with (x0, x_t, shift) of the distance."""
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor():
        drawn = torch.randn(shape, generator=generator)
        if dirty:
            bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, shape, generator=generator)]
            drawn = torch.where(torch.rand(shape, generator=generator) < 0.1, bad, drawn)
        return in_layout(drawn.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))

    def vector():
        return torch.rand(shape[0], generator=generator) * 3 + 0.01

    inputs = GeneratorInputs(
        ta=tensor(),
        ref=tensor(),
        ref_uncond=tensor() if draw(st.booleans()) else None,
        guidance_scale=draw(st.floats(0, 8, width=32)),
        s_r=tensor(),
        slope=-vector() if draw(st.booleans()) else torch.ones(shape[0]),
        level=vector(),
    )
    distance = draw(st.sampled_from([0, 1, 2]))  # nothing, of an estimate, of a prediction
    of_distance = (
        tensor() if distance else None,
        tensor() if distance == 2 else None,
        vector() if distance == 2 else None,
    )
    return inputs, of_distance


def each(change, values):
    return tuple(change(value) if isinstance(value, torch.Tensor) else value for value in values)


def doubled(values):
    return each(lambda tensor: tensor.double().contiguous(), values)


def dense(values):
    return each(torch.Tensor.contiguous, values)


def cut(values, start, stop):
    return each(lambda tensor: tensor[start:stop], values)


def per_row(vector, like):
    return vector.double().view(-1, *(1,) * (like.ndim - 1))


def largest_terms(inputs):
    """(B, *latent): what is added up in an element of D, in absolute values."""
    ta, ref, uncond, w, s_r, slope, level = doubled(inputs)
    guided = ref.abs()
    if uncond is not None:
        guided = guided + abs(w - 1) * (ref.abs() + uncond.abs())
    return per_row(slope, ta).abs() * (ta.abs() + guided) + per_row(level, ta) * s_r.abs()


@settings(max_examples=200)
@given(cases())
def test_statistics_equal_fp64_formulas(case):
    inputs, of_distance = case
    got = Statistics(*ops.generator_statistics(*inputs, *of_distance))
    truth = reference.generator_statistics(GeneratorInputs(*doubled(inputs)), *doubled(of_distance))
    terms = largest_terms(inputs).flatten(1)
    element = 4 * UNIT * terms  # three roundings in an element; the sums are float64, rounded once
    for name in ("gap", "correction", "difference"):
        value, exact = getattr(got, name), getattr(truth, name)
        slack = 2 * (exact * element.square().sum(1)).sqrt() + element.square().sum(1)  # Cauchy-Schwarz
        assert value.dtype == torch.float32
        assert ((value.double() - exact).abs() <= 16 * UNIT * exact + slack).all(), name
    slack = element.sum(1)
    if of_distance[2] is not None:
        shifted = per_row(of_distance[2], of_distance[1]) * of_distance[1].double()
        slack = slack + 4 * UNIT * shifted.abs().flatten(1).sum(1)
    if of_distance[0] is not None:
        slack = slack + 4 * UNIT * of_distance[0].double().abs().flatten(1).sum(1)
    assert ((got.distance.double() - truth.distance).abs() <= 16 * UNIT * truth.distance + slack).all()
    assert torch.equal(got.invalid, truth.invalid) and not got.invalid.any()


@settings(max_examples=200)
@given(cases(), st.sampled_from(DTYPES), st.integers(0, 2))
def test_gradient_equals_fp64_formula(case, dtype, kind):
    inputs, _ = case
    scale = torch.randn(len(inputs.ta)) + 0.1
    upstream = (None, torch.tensor(-1.5), torch.tensor(2.0**-9))[kind]
    got = ops.generator_gradient(*inputs, scale, upstream, dtype)
    exact_inputs = GeneratorInputs(*doubled(inputs))
    truth = reference.generator_gradient(exact_inputs, scale.double(), upstream, torch.float64)
    assert got.dtype == dtype and got.stride() == torch.empty_like(inputs.ta).stride()
    factor = per_row(scale, truth).abs() * (1.0 if upstream is None else abs(upstream.item()))
    rounding = torch.finfo(dtype).eps / 2 * truth.abs() + torch.finfo(dtype).smallest_normal
    assert ((got.double() - truth).abs() <= 6 * UNIT * factor * largest_terms(inputs) + rounding).all()


@settings(max_examples=60)
@given(cases(dirty=True))
def test_values_that_are_not_finite_are_dropped_and_counted(case):
    inputs, _ = case
    got = Statistics(*ops.generator_statistics(*inputs, None, None, None))
    truth = reference.generator_statistics(GeneratorInputs(*doubled(inputs)))
    assert torch.equal(got.invalid, truth.invalid)
    for name in ("gap", "correction", "difference"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-4, atol=1e-4)
    scale = torch.rand(len(inputs.ta)) + 0.5
    gradient = ops.generator_gradient(*inputs, scale, None, torch.float32)
    assert gradient.isfinite().all()
    ta, ref, uncond, w, s_r, slope, level = inputs
    guided = ref.float() if uncond is None else ref.float() + (w - 1) * (ref.float() - uncond.float())
    difference = slope.view_as(scale).view(-1, *(1,) * (ta.ndim - 1)) * (ta.float() - guided)
    difference = difference - level.view(-1, *(1,) * (ta.ndim - 1)) * s_r.float()
    assert (gradient[~difference.isfinite()] == 0).all()
    assert torch.equal((~difference.isfinite()).flatten(1).sum(1), got.invalid)


@settings(max_examples=100)
@given(cases(dirty=False))
def test_layout_changes_no_bit(case):
    inputs, of_distance = case
    for got, expected in zip(
        ops.generator_statistics(*inputs, *of_distance),
        ops.generator_statistics(*dense(inputs), *dense(of_distance)),
        strict=True,
    ):
        assert torch.equal(got, expected)
    scale = torch.rand(len(inputs.ta))
    got = ops.generator_gradient(*inputs, scale, None, torch.bfloat16)
    assert torch.equal(got, ops.generator_gradient(*dense(inputs), scale, None, torch.bfloat16))


@settings(max_examples=60)
@given(cases(), st.data())
def test_batch_composition_changes_no_bit(case, data):
    inputs, of_distance = case
    batch = len(inputs.ta)
    row = data.draw(st.integers(0, batch - 1))
    whole = ops.generator_statistics(*inputs, *of_distance)
    alone = ops.generator_statistics(*cut(inputs, row, row + 1), *cut(of_distance, row, row + 1))
    for got, expected in zip(alone, whole, strict=True):
        assert torch.equal(got, expected[row : row + 1])
    scale = torch.rand(batch)
    gradient = ops.generator_gradient(*inputs, scale, None, torch.float32)
    one = ops.generator_gradient(*cut(inputs, row, row + 1), scale[row : row + 1], None, torch.float32)
    assert torch.equal(one, gradient[row : row + 1])


def images(batch=3, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)

    def tensor():
        return torch.randn(batch, 16, 33, 31, generator=generator).to(dtype, memory_format=memory_format)

    vector = torch.linspace(0.3, 2.0, batch)
    inputs = GeneratorInputs(tensor(), tensor(), tensor(), 4.5, tensor(), -vector, vector.flip(0))
    return inputs, (tensor(), tensor(), vector)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    inputs, of_distance = images(dtype=dtype)
    scale = torch.rand(3)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            gradient = ops.generator_gradient(*inputs, scale, torch.tensor(0.5), dtype)
            results.append((*ops.generator_statistics(*inputs, *of_distance), gradient))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# Loads the extension by its path, because each run would otherwise spend seconds on importing torch.
DIGEST_PROGRAM = """
import hashlib, importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
dim, digest = 20011, hashlib.sha256()
drawn = np.random.default_rng(0)
vectors = [np.array(pair, np.float32) for pair in ((-0.7, 1.3), (0.4, 2.1), (1.7, 0.2))]
slope, level, shift = (vector.ctypes.data for vector in vectors)

def rows(code, bad):
    floats = drawn.standard_normal(2 * dim, np.float32)
    floats[::97] = bad
    stored = [floats, (floats.view(np.uint32) >> 16).astype(np.uint16), floats.astype(np.float16)][code]
    kept.append(stored)
    return stored.ctypes.data, code, dim, [dim], [1]

for code in range(3):
    for other in range(3):
        kept = []
        shared = (rows(code, np.nan), rows(other, np.inf), rows(code, 0), 3.5, rows(code, -np.inf), slope, level)
        sums, invalid = np.empty((4, 2), np.float32), np.empty(2, np.int64)
        places = (*(row.ctypes.data for row in sums), invalid.ctypes.data)
        extension.generator_statistics(*shared, rows(code, 1), rows(code, 2), shift, 2, dim, *places, 1)
        assert np.isfinite(sums).all() and invalid.min() > 100
        gradient = np.empty(2 * dim, np.float32 if other == 0 else np.uint16)
        out = (gradient.ctypes.data, other, dim, [dim], [1])
        extension.generator_gradient(*shared, level, shift, out, 2, dim, 1)
        for result in (sums, invalid, gradient):
            digest.update(result.tobytes())
print(extension.instruction_set(), digest.hexdigest())
"""


def run_with_instruction_set(name):
    environment = {**os.environ, "CRD_FAST_INSTRUCTION_SET": name}
    command = [sys.executable, "-c", DIGEST_PROGRAM, extension_module.extension().__file__]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_instruction_sets_give_the_same_bits():
    names = ["portable", "avx2", "avx512"]
    widest = run_with_instruction_set("")
    assert widest.returncode == 0, widest.stderr
    native_name, digest = widest.stdout.split()
    for name in names[: names.index(native_name) + 1]:
        assert run_with_instruction_set(name).stdout.split() == [name, digest]


def test_clean_estimates_in_float32_give_the_bits_of_the_formulas():
    """Slope 1, no guidance: every product is rounded before it is subtracted, as plain PyTorch does."""
    inputs, _ = images()
    inputs = inputs._replace(ref_uncond=None, slope=torch.ones(3))
    scale = torch.rand(3)
    expected = reference.generator_gradient(inputs, scale, None, torch.float32)
    assert torch.equal(ops.generator_gradient(*inputs, scale, None, torch.float32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_gradient_keeps_its_layout(dtype):
    inputs, _ = images(dtype=dtype, memory_format=torch.channels_last)
    gradient = ops.generator_gradient(*inputs, torch.rand(3), None, dtype)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_scale_of_zero_is_a_gradient_of_zero_whatever_the_rest_holds():
    inputs, _ = images()
    inputs.ta[1] = torch.nan
    scale = torch.tensor([1.0, 0.0, 0.0])
    gradient = ops.generator_gradient(*inputs, scale, torch.tensor(torch.inf), torch.float32)
    assert not gradient[1:].any() and gradient[0].isinf().any()
    truth = reference.generator_gradient(inputs, scale, torch.tensor(torch.inf), torch.float32)
    assert not truth[1:].any()


@pytest.mark.parametrize("name", ["slope", "level"])
@pytest.mark.parametrize("dim", [5, 16, 1000])
def test_a_factor_that_is_not_finite_counts_every_element_once(name, dim):
    """Rows are filled up with zeros, which are not counted even where they are invalid too."""
    vector = torch.ones(2)
    inputs = GeneratorInputs(torch.ones(2, dim), torch.zeros(2, dim), None, 1.0, torch.ones(2, dim), vector, vector)
    inputs = inputs._replace(**{name: torch.tensor([torch.nan, 1.0])})
    statistics = Statistics(*ops.generator_statistics(*inputs, None, None, None))
    assert statistics.invalid.tolist() == [dim, 0]


def test_long_rows_are_summed_without_drift():
    """A running float32 sum of equal numbers stops growing at 2^24 of them and is off by whole percents before."""
    dim = 2**22 + 1
    ones = torch.ones(1, dim)
    inputs = GeneratorInputs(1.1 * ones, ones, None, 1.0, ones, torch.ones(1), torch.full((1,), 0.3))
    statistics = Statistics(*ops.generator_statistics(*inputs, 1.7 * ones, None, None))
    step, level = float(torch.tensor(1.1)) - 1.0, float(torch.tensor(0.3))
    for got, element in (
        (statistics.distance, float(torch.tensor(1.7)) - 1.0),
        (statistics.gap, step**2),
        (statistics.correction, level**2),
        (statistics.difference, (step - level) ** 2),
    ):
        assert got.item() == pytest.approx(dim * element, rel=1e-6)


ROWS = (8, 0, 4, [4], [1])
SHARED = {
    "ta": ROWS,
    "ref": ROWS,
    "ref_uncond": ROWS,
    "extra_guidance": 1.0,
    "s_r": ROWS,
    "slope": 8,
    "level": 8,
    "batch": 2,
    "dim": 4,
    "threads": 1,
}
STATISTICS = {
    **SHARED,
    **{"x0": ROWS, "x_t": ROWS, "shift": 8, "distance": 8, "gap": 8, "correction": 8, "difference": 8, "invalid": 8},
}
GRADIENT = {**SHARED, "scale": 8, "upstream": 0, "gradient": ROWS}


@pytest.mark.parametrize(
    ("function", "good", "argument", "value", "message"),
    [
        ("generator_statistics", STATISTICS, "ta", (8, 0, 4, [3], [1]), "ta has rows of 3 elements; expected dim = 4"),
        ("generator_statistics", STATISTICS, "s_r", (8, 7, 4, [4], [1]), "s_r has dtype code 7"),
        ("generator_statistics", STATISTICS, "slope", 0, "slope is null"),
        ("generator_statistics", STATISTICS, "shift", 0, "x_t and shift go together"),
        ("generator_statistics", STATISTICS, "x_t", None, "x_t and shift go together"),
        ("generator_statistics", STATISTICS, "invalid", 0, "invalid is null"),
        ("generator_statistics", STATISTICS, "distance", 0, "distance is null"),
        ("generator_statistics", STATISTICS, "threads", 0, "threads is 0; expected at least 1"),
        ("generator_gradient", GRADIENT, "level", 0, "level is null"),
        ("generator_gradient", GRADIENT, "scale", 0, "scale is null"),
        ("generator_gradient", GRADIENT, "gradient", (8, 0, 2, [4], [1]), "gradient has a stride of 2"),
        ("generator_gradient", GRADIENT, "gradient", (8, 3, 4, [4], [1]), "gradient is a mask"),
        ("generator_gradient", GRADIENT, "ref_uncond", (0, 0, 4, [4], [1]), "ref_uncond is null"),
    ],
)
def test_bad_arguments_are_named(function, good, argument, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(extension_module.extension(), function)(**{**good, argument: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref": torch.zeros(2, 5)}, r"ref is \(2, 5\); expected \(2, 4\)"),
        ({"s_r": torch.zeros(2, 4, dtype=torch.float64)}, "s_r is torch.float64; expected float32"),
        ({"slope": torch.ones(3)}, r"slope is \(3,\) .*; expected contiguous \(2,\)"),
        ({"level": torch.ones(2, dtype=torch.float64)}, "level is .*float64.*; expected contiguous"),
    ],
)
def test_bad_tensors_are_named(changes, message):
    from crd_fast.didr import native

    good = GeneratorInputs(*(torch.zeros(2, 4),) * 3, 2.0, torch.zeros(2, 4), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=f"^{message}"):
        native.generator_statistics(good._replace(**changes), None, None, None)
