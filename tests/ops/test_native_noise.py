"""The C++ noise and epsilon kernels against fp64 truth, and their independence of all else."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import scipy.stats
import torch

from crd_fast import native
from crd_fast.errors import ExtensionMissingError

from .philox_truth import epsilon_truth, ulps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [1, 63, 1000, 65536 + 3]
# Ids, seeds and streams whose high halves and signs matter.
SEEDS_AND_STREAMS = [(0, 0), (2**64 - 1, 2**31 - 1), (-3, -(2**31)), (2**33 + 1, -1)]
WIDE_IDS = [0, 1, 2**31, 2**32 + 5, 2**62 + 2**33 + 1, -1]
# An exhaustive sweep bounds the product of radius and sine or cosine by 3.84 ulp; random draws stay below 3.
MAX_ULP = 3.0


def draw_epsilon(sample_ids, dim, seed=7, stream=0, dtype=torch.float32):
    ids = torch.as_tensor(sample_ids, dtype=torch.int64)
    out = torch.empty(len(ids), dim, dtype=dtype)
    native.epsilon(ids, seed, stream, out)
    return out


def draw_noise(x0, sigma, sample_ids=None, seed=7, stream=0, dtype=None):
    ids = torch.arange(x0.shape[0]) if sample_ids is None else torch.as_tensor(sample_ids)
    out = torch.empty(x0.shape, dtype=dtype or x0.dtype)
    native.noise(x0, sigma, ids, seed, stream, out)
    return out


@pytest.fixture
def threads():
    """Sets the thread count of torch, which the kernels follow, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_epsilon_within_ulps_of_fp64_truth():
    truth = epsilon_truth([0, 3, 2**40], 2**20, seed=1234567890123, stream=2)
    value = draw_epsilon([0, 3, 2**40], 2**20, seed=1234567890123, stream=2).numpy()
    assert ulps(value, truth).max() <= MAX_ULP


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("seed", "stream"), SEEDS_AND_STREAMS)
def test_epsilon_follows_counter_layout(dim, seed, stream):
    truth = epsilon_truth(WIDE_IDS, dim, seed, stream)
    assert ulps(draw_epsilon(WIDE_IDS, dim, seed, stream).numpy(), truth).max() <= MAX_ULP


def test_epsilon_is_standard_normal():
    z = draw_epsilon(range(8), 2**18).double().numpy().reshape(-1)
    n = z.size
    # Five standard errors of each sample moment of a standard normal.
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * np.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    for lag in (1, 2, 3, 4, 2**18):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / np.sqrt(n - lag)


def test_streams_seeds_and_ids_are_independent():
    base = draw_epsilon([0], 2**18)
    for other in (
        draw_epsilon([0], 2**18, stream=1),
        draw_epsilon([0], 2**18, seed=8),
        draw_epsilon([0], 2**18, seed=7 + 2**32),
        draw_epsilon([1], 2**18),
        draw_epsilon([2**32], 2**18),
    ):
        assert abs((base * other).mean()) < 5 / 2**9


@pytest.mark.parametrize(("x0_dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("dim", DIMS)
def test_noise_no_worse_than_eager_formula(x0_dtype, out_dtype, dim):
    x0 = torch.randn(3, dim).to(x0_dtype)
    sigma = torch.tensor([0.0, 0.37, 1.0])
    epsilon = torch.from_numpy(epsilon_truth([0, 1, 2], dim, seed=7, stream=0))
    weight = sigma.unsqueeze(1)
    truth = (1 - weight.double()) * x0.double() + weight.double() * epsilon
    eager = (1 - weight.to(out_dtype)) * x0.to(out_dtype) + weight.to(out_dtype) * epsilon.to(out_dtype)
    value = draw_noise(x0, sigma, dtype=out_dtype)
    # The fp32 normals may be MAX_ULP from the truth; the largest lie in [4, 8), where an ulp is 2^-21.
    slack = MAX_ULP * 2.0**-21
    assert (value.double() - truth).abs().max() <= (eager.double() - truth).abs().max() + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_rounded_once(dtype):
    x0 = torch.randn(2, 4099).to(dtype)
    sigma = torch.tensor([0.3, 0.8])
    wide = draw_noise(x0.float(), sigma)
    assert torch.equal(draw_noise(x0, sigma), wide.to(dtype))
    assert torch.equal(draw_noise(x0, sigma, dtype=torch.float32), wide)
    assert torch.equal(draw_epsilon([4], 4099, dtype=dtype), draw_epsilon([4], 4099).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_is_read_exactly(dtype):
    x0 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(0)
    value = draw_noise(x0, torch.zeros(1), dtype=torch.float32)
    torch.testing.assert_close(value, x0.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_nearest_even(dtype):
    high = np.arange(2**16, dtype=np.uint32) << 16
    ties = np.array([0x1000, 0x3000, 0x8000, 0xF000], dtype=np.uint32)
    low = np.concatenate([ties - 1, ties, ties + 1, np.array([0, 1, 0xFFFF], dtype=np.uint32)])
    bits = (high[:, None] | low).reshape(1, -1)
    x0 = torch.from_numpy(bits.view(np.float32).copy())
    value = draw_noise(x0, torch.zeros(1), dtype=dtype)
    torch.testing.assert_close(value, x0.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dim", DIMS)
def test_rows_do_not_depend_on_the_batch(dim):
    x0, sigma, ids = torch.randn(5, dim), torch.rand(5), torch.tensor([9, 4, 2**35, 0, -7])
    whole = draw_noise(x0, sigma, ids)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(draw_noise(x0[order], sigma[order], ids[order]), whole[order])
    for i in range(5):
        assert torch.equal(draw_noise(x0[i : i + 1], sigma[i : i + 1], ids[i : i + 1])[0], whole[i])


@pytest.mark.parametrize(("batch", "dim"), [(1, 65536 * 3 + 5), (7, 63), (384, 1000), (2, 16387)])
def test_threads_do_not_change_bits(threads, batch, dim):
    x0, sigma = torch.randn(batch, dim), torch.rand(batch)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(draw_noise(x0, sigma))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dim", DIMS)
def test_row_strides_and_nothing_written_between_rows(dim):
    pad, sentinel = 5, -77.0
    wide_x0 = torch.randn(4, dim + pad)
    wide_out = torch.full((4, dim + 2 * pad), sentinel)
    x0, out = wide_x0[:, :dim], wide_out[:, :dim]
    sigma, ids = torch.rand(4), torch.arange(4)
    native.noise(x0, sigma, ids, 7, 0, out)
    assert torch.equal(out, draw_noise(x0.contiguous(), sigma))
    assert (wide_out[:, dim:] == sentinel).all()
    native.epsilon(ids, 7, 0, out)
    assert torch.equal(out, draw_epsilon(ids, dim))
    assert (wide_out[:, dim:] == sentinel).all()


def test_one_clean_sample_expanded_to_a_batch():
    x0, sigma = torch.randn(1, 999), torch.rand(6)
    assert torch.equal(draw_noise(x0.expand(6, 999), sigma), draw_noise(x0.repeat(6, 1), sigma))


def test_image_shape_equals_flat_rows():
    x0, sigma = torch.randn(3, 4, 5, 7), torch.rand(3)
    assert torch.equal(draw_noise(x0, sigma).flatten(1), draw_noise(x0.flatten(1), sigma))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty_tensors_are_fine(shape):
    assert draw_noise(torch.randn(shape), torch.rand(shape[0])).shape == shape


# Loads the extension by its path, because each run would otherwise spend seconds on importing torch.
DIGEST_PROGRAM = """
import hashlib, importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
dim, digest = 30011, hashlib.sha256()
sigma, ids = np.array([0.25, 0.9], np.float32), np.array([3, 2**40])
floats = np.linspace(-3, 3, 2 * dim, dtype=np.float32)
sources = [floats, (floats.view(np.uint32) >> 16).astype(np.uint16), floats.astype(np.float16)]
for x0_code, x0 in enumerate(sources):
    for out_code, out_type in enumerate([np.float32, np.uint16, np.uint16]):
        out = np.empty(2 * dim, out_type)
        noised = (out.ctypes.data, out_code, dim, [dim], [1])
        clean = (x0.ctypes.data, x0_code, dim, [dim], [1])
        extension.noise(clean, noised, sigma.ctypes.data, ids.ctypes.data, 2, dim, 11, 4, 1)
        digest.update(out.tobytes())
        shared = (1, clean, ids.ctypes.data, 11, 5, clean, noised, 2.5, None, 0, 0, 2, dim)
        stats, grad = np.empty((5, 2), np.float32), np.empty_like(out)
        extension.residual_stats(noised, clean, *shared, *(row.ctypes.data for row in stats), 1)
        digest.update(stats.tobytes())
        gradient = (grad.ctypes.data, out_code, dim, [dim], [1])
        extension.residual_grad(noised, *shared, sigma.ctypes.data, sigma.ctypes.data, 0, False, gradient, 1)
        digest.update(grad.tobytes())
print(extension.instruction_set(), digest.hexdigest())
"""


def run_with_instruction_set(name):
    environment = {**os.environ, "CRD_FAST_INSTRUCTION_SET": name}
    command = [sys.executable, "-c", DIGEST_PROGRAM, native.extension().__file__]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_instruction_sets_give_the_same_bits():
    names = ["portable", "avx2", "avx512"]
    widest = run_with_instruction_set("")
    assert widest.returncode == 0, widest.stderr
    native_name, digest = widest.stdout.split()
    assert len(digest) == len(hashlib.sha256().hexdigest())
    for name in names[: names.index(native_name) + 1]:
        assert run_with_instruction_set(name).stdout.split() == [name, digest]


def test_unknown_instruction_set_is_refused():
    result = run_with_instruction_set("mmx")
    assert result.returncode != 0
    assert "CRD_FAST_INSTRUCTION_SET is 'mmx'" in result.stderr


def test_interpreter_lock_is_released():
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1

    out, ids = torch.empty(8, 2**20), torch.arange(8)
    worker = threading.Thread(target=tick)
    # A switch would otherwise be possible between the reading of the counter and the call.
    before_interval = sys.getswitchinterval()
    sys.setswitchinterval(0.5)
    try:
        worker.start()
        before = ticks[0]
        native.epsilon(ids, 7, 0, out)
        after = ticks[0]
    finally:
        stop.set()
        sys.setswitchinterval(before_interval)
        worker.join()
    assert after - before > 100


GOOD_ROWS = (8, 0, 4, [4], [1])
GOOD_NOISE = {
    "x0": GOOD_ROWS,
    "out": GOOD_ROWS,
    "sigma": 8,
    "sample_ids": 8,
    "batch": 2,
    "dim": 4,
    "seed": 0,
    "stream": 0,
    "threads": 1,
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch", -1),
        ("dim", -1),
        ("threads", 0),
        ("x0", (8, 4, 4, [4], [1])),
        ("out", (8, -1, 4, [4], [1])),
        ("out", (8, 3, 4, [4], [1])),
        ("x0", (8, 0, -4, [4], [1])),
        ("out", (8, 0, 3, [4], [1])),
        ("out", (8, 0, 4, [4], [0])),
        ("x0", (8, 0, 4, [5], [1])),
        ("x0", (8, 0, 4, [], [])),
        ("x0", (8, 0, 4, [4], [])),
        ("x0", (8, 0, 4, [1] * 9, [1] * 9)),
        ("x0", (0, 0, 4, [4], [1])),
        ("out", (0, 0, 4, [4], [1])),
        ("sigma", 0),
        ("sample_ids", 0),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} (is|has)"):
        native.extension().noise(**{**GOOD_NOISE, argument: value})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^x0 is .*expected .2, 4.", {"x0": torch.zeros(2, 5)}),
        ("^x0 is torch.float64", {"x0": torch.zeros(2, 4, dtype=torch.float64)}),
        ("^out has .*overlap", {"out": torch.zeros(2, 1).expand(2, 4)}),
        ("^out is on meta", {"out": torch.zeros(2, 4, device="meta")}),
        ("^sigma is", {"sigma": torch.zeros(3)}),
        ("^sigma is", {"sigma": torch.zeros(2, dtype=torch.float64)}),
        ("^sample_ids is", {"sample_ids": torch.zeros(2, dtype=torch.int32)}),
        ("^sample_ids is", {"sample_ids": torch.zeros(4, dtype=torch.int64)[::2]}),
        ("^stream is", {"stream": 2**31}),
    ],
)
def test_bad_tensors_are_named(message, change):
    arguments = {
        "x0": torch.zeros(2, 4),
        "sigma": torch.zeros(2),
        "sample_ids": torch.arange(2),
        "seed": 0,
        "stream": 0,
        "out": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=message):
        native.noise(**{**arguments, **change})


def test_missing_extension_names_the_build_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "crd_fast._C", None)
    native.extension.cache_clear()
    try:
        with pytest.raises(ExtensionMissingError) as caught:
            native.epsilon(torch.arange(1), 0, 0, torch.empty(1, 4))
    finally:
        native.extension.cache_clear()
    assert native.BUILD_COMMAND in str(caught.value)
    assert "CRD_FAST_BACKEND=reference" in str(caught.value)
