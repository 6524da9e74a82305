"""The C++ residual sums and gradient against fp64 formulas, in every layout, and their independence of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crd_fast import native, ops, reference
from crd_fast.reference import ResidualInputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (2, 63), (7, 1000), (1, 2**20 + 3), (3, 4, 5, 7), (2, 9, 6), (2, 3, 4, 2, 5)]


def in_layout(tensor, layout):
    """The same values with other strides: memory order reversed, gaps between rows, gaps between elements."""
    if layout == "reversed":
        axes = (0, *range(tensor.ndim - 1, 0, -1))
        inverse = (0, *range(tensor.ndim - 1, 0, -1))
        return tensor.permute(axes).contiguous().permute(inverse)
    if layout == "padded rows":
        wide = torch.full((len(tensor), tensor[0].numel() + 5), torch.nan, dtype=tensor.dtype)
        wide[:, :-5] = tensor.flatten(1)
        return wide[:, :-5].unflatten(1, tensor.shape[1:]) if tensor.ndim > 1 else wide
    if layout == "gaps":
        wide = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype)
        wide[..., 1] = tensor
        return wide[..., 1]
    return tensor.contiguous()


LAYOUTS = ["contiguous", "reversed", "padded rows", "gaps"]


@st.composite
def cases(draw):
    shape = draw(st.sampled_from(SHAPES))
    seeded = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor():
        dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
        return in_layout(torch.randn(shape, generator=generator).to(dtype), layout)

    mask = None
    if draw(st.booleans()):
        axes = [n if draw(st.booleans()) else 1 for n in shape]
        mask = torch.rand(axes, generator=generator) < 0.6
    ref = tensor() if draw(st.booleans()) else None
    return ResidualInputs(
        predicted=tensor(),
        target=None if seeded else tensor(),
        x0=tensor() if seeded else None,
        sigma=torch.rand(shape[0], generator=generator) if seeded else None,
        sample_ids=torch.randint(-(2**62), 2**62, (shape[0],), generator=generator) if seeded else None,
        seed=draw(st.integers(-(2**63), 2**63 - 1)) if seeded else 0,
        stream=draw(st.integers(0, 2**31 - 1)) if seeded else 0,
        ref=ref,
        ref_uncond=tensor() if ref is not None and draw(st.booleans()) else None,
        guidance_scale=draw(st.floats(0, 8, width=32)),
        mask=mask,
        prediction=draw(st.sampled_from(["v", "x0", "eps"])) if seeded else "v",
        old=tensor() if draw(st.booleans()) else None,
    )


def doubled(inputs):
    names = ("predicted", "target", "x0", "sigma", "ref", "ref_uncond", "old")
    return inputs._replace(
        **{n: getattr(inputs, n).double().contiguous() for n in names if getattr(inputs, n) is not None}
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_statistics_equal_fp64_formulas(inputs):
    got, truth = ops.residual_stats(*inputs), reference.residual_stats(doubled(inputs))
    # Regenerated noise is 4 fp32 ulp from the formula's, which counts where a prediction comes close to it.
    slack = torch.zeros(())
    if inputs.target is None:
        largest = reference._target(doubled(inputs), torch.float64).abs().flatten(1).amax(1)
        slack = 4 * 2.0**-23 * largest * reference.factor_and_count(inputs, torch.float64)[0]
    mse, mae, _, old_mse, old_mae = truth
    of_old = 2 * old_mae * slack + slack**2 if len(old_mae) else old_mae
    allowed = (2 * mae * slack + slack**2, slack, 0 * mae, of_old, slack)
    for value, exact, extra in zip(got, truth, allowed, strict=True):
        # the rest is fp32 arithmetic on fp64 sums
        if len(value):
            assert ((value.double() - exact).abs() <= 2e-6 * exact + 1e-12 + extra).all()
    assert len(old_mse) == (0 if inputs.old is None else len(mse))


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_gradient_equals_fp64_formula(inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    batch = len(inputs.predicted)
    weights = torch.randn(2, batch, generator=generator) * (torch.rand(2, batch, generator=generator) < 0.8)
    upstream = (None, torch.tensor(1.5), torch.randn(batch, generator=generator))[seed % 3]
    got = ops.residual_grad(*inputs, *weights, upstream)
    truth = reference.residual_grad(doubled(inputs), *weights.double(), upstream)
    assert got.dtype == inputs.predicted.dtype and got.stride() == torch.empty_like(inputs.predicted).stride()
    # an element is the sum of terms of either sign, each exact to a few ulp of the terms, and is rounded once
    scale = truth.abs().flatten(1).amax(1).view(-1, *(1,) * (truth.ndim - 1)) * 2e-6
    rounding = torch.finfo(got.dtype).eps * truth.abs() + torch.finfo(got.dtype).smallest_normal
    assert ((got.double() - truth).abs() <= scale * (1 + inputs.guidance_scale) + rounding).all()


@settings(max_examples=40, deadline=None)
@given(cases())
def test_layout_changes_no_bit_with_seeded_noise(inputs):
    if inputs.target is not None:
        inputs = inputs._replace(target=inputs.target.contiguous(), predicted=inputs.predicted.contiguous())
    same = inputs._replace(
        **{
            n: getattr(inputs, n).contiguous()
            for n in ("predicted", "x0", "ref", "old")
            if getattr(inputs, n) is not None
        }
    )
    for got, expected in zip(ops.residual_stats(*inputs), ops.residual_stats(*same), strict=True):
        assert torch.equal(got, expected)
    weights = torch.rand(2, len(inputs.predicted))
    assert torch.equal(ops.residual_grad(*inputs, *weights, None), ops.residual_grad(*same, *weights, None))


def image_inputs(batch=3, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)

    def tensor():
        return torch.randn(batch, 16, 33, 31, generator=generator).to(dtype, memory_format=memory_format)

    ids = torch.arange(batch)
    return ResidualInputs(
        tensor(), None, tensor(), torch.full((batch,), 0.5), ids, 3, 1, tensor(), tensor(), 4.5, None, "v"
    )


def test_threads_change_no_bit():
    inputs, weights = image_inputs(), torch.rand(2, 3)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((*ops.residual_stats(*inputs), ops.residual_grad(*inputs, *weights, None)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_batch_composition_changes_no_bit():
    inputs = image_inputs(batch=5)
    inputs = inputs._replace(old=inputs.ref)
    whole = torch.stack(ops.residual_stats(*inputs))
    rows = torch.cat([torch.stack(ops.residual_stats(*inputs.rows(i, i + 1))) for i in range(5)], dim=1)
    assert torch.equal(whole, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_gradient_keeps_its_layout(dtype):
    inputs = image_inputs(dtype=dtype, memory_format=torch.channels_last)
    grad = ops.residual_grad(*inputs, *torch.rand(2, 3), None)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_padding_and_dropped_samples_may_hold_anything():
    inputs = image_inputs()
    mask = torch.ones(3, 1, 33, 31, dtype=torch.bool)
    mask[:, :, 20:] = False
    clean = inputs._replace(mask=mask)
    dirty_predicted, dirty_ref = inputs.predicted.clone(), inputs.ref.clone()
    dirty_predicted[:, :, 20:], dirty_ref[:, :, 20:] = torch.nan, torch.inf
    dirty = clean._replace(predicted=dirty_predicted, ref=dirty_ref)
    for got, expected in zip(ops.residual_stats(*dirty), ops.residual_stats(*clean), strict=True):
        assert torch.equal(got, expected)
    weights = torch.rand(2, 3)
    assert torch.equal(ops.residual_grad(*dirty, *weights, None), ops.residual_grad(*clean, *weights, None))
    dirty_predicted[1] = torch.nan
    weights[:, 1] = 0
    assert not ops.residual_grad(*dirty, *weights, None)[1].any()


def test_long_rows_are_summed_without_drift():
    # 2^23 equal residuals: a running fp32 sum stops growing at 2^24 of them and is off by whole percents before
    predicted = torch.full((1, 2**23 + 1), 1.1)
    inputs = ResidualInputs(predicted, torch.ones_like(predicted), None, None, None, 0, 0, None, None, 1.0, None, "v")
    mse, mae, *_ = ops.residual_stats(*inputs)
    error = float(torch.tensor(1.1)) - 1.0
    torch.testing.assert_close(mae.double(), torch.tensor([error]), rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(mse.double(), torch.tensor([error**2]), rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("target_kind", 4, "target_kind is 4"),
        ("target", None, "target is looked at unless"),
        ("ref", None, "ref_uncond without ref"),
        ("mask", (8, 0, 4, [4], [1]), "mask: expected dtype code 3"),
        ("mae", 0, "mae is null"),
        ("old_mae", 0, "old_mae is null"),
        ("sample_ids", 0, "sample_ids is null"),
        ("predicted", (8, 0, 4, [3], [1]), "predicted has rows of 3"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    rows = (8, 0, 4, [4], [1])
    good = {
        "predicted": rows,
        "old": rows,
        "target_kind": 1,
        "target": rows,
        "sample_ids": 8,
        "seed": 0,
        "stream": 0,
        "ref": rows,
        "ref_uncond": rows,
        "guidance_scale": 1.0,
        "mask": None,
        "batch": 2,
        "dim": 4,
        "factor": 0,
        "count": 0,
        "mse": 8,
        "mae": 8,
        "kl": 8,
        "old_mse": 8,
        "old_mae": 8,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        native.extension().residual_stats(**{**good, argument: value})


def statistics_of_a_large_batch():
    inputs = image_inputs(batch=8)
    return torch.stack(ops.residual_stats(*inputs)[:3])


def test_calls_from_several_threads_at_once():
    expected = statistics_of_a_large_batch()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: statistics_of_a_large_batch(), range(16)):
            assert torch.equal(got, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("used_before", [True, False])
def test_a_forked_child_does_not_wait_for_the_parents_threads(used_before):
    """In a process of its own: PyTorch itself may hang in a child of a process that has used its threads."""
    program = f"""
import os, signal, torch
from crd_fast import native
torch.set_num_threads(2)
ids, out = torch.arange(64), torch.empty(64, 4096)
torch.rand(2000, 2000).sum()
if {used_before}:
    native.epsilon(ids, 1, 0, out)
child = os.fork()
if child == 0:
    signal.alarm(20)
    made = torch.empty(64, 4096)
    native.epsilon(ids, 1, 0, made)
    os.write(1, str(hash(made.numpy().tobytes())).encode())
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
native.epsilon(ids, 1, 0, out)
print("", hash(out.numpy().tobytes()))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    child, parent = result.stdout.split()
    assert child == parent


def test_an_overflowing_loss_scale_leaves_dropped_samples_at_zero():
    inputs, slopes = image_inputs(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    grad = ops.residual_grad(*inputs, *slopes, torch.tensor(torch.inf))
    assert not grad[1].any() and grad[0].isinf().any() and grad[2].isinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [(1, 0, 2, 3), (3, 1, 2, 0), (2, 0, 3, 1)])
def test_the_batch_may_be_any_axis_in_memory(dtype, axes):
    """As einsum leaves it; the gradient has the layout of the prediction."""
    shape = (4, 3, 5, 6)
    inverse = sorted(range(4), key=axes.__getitem__)

    def tensor():
        return torch.randn([shape[axis] for axis in axes]).permute(inverse).to(dtype)

    predicted, target, ref = tensor(), tensor(), tensor()
    assert not predicted.is_contiguous()
    inputs = ResidualInputs(predicted, target, None, None, None, 0, 0, ref, None, 1.0, None, "v")
    dense = inputs._replace(predicted=predicted.contiguous())
    slopes = torch.rand(2, 4)
    got = ops.residual_grad(*inputs, *slopes, None)
    assert got.stride() == predicted.stride()
    torch.testing.assert_close(got, ops.residual_grad(*dense, *slopes, None), rtol=0, atol=0)
