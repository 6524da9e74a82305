"""The registered operators of DIDR's generator stage, and the loss that takes predictions."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crd_fast import native as extension_module
from crd_fast.didr import generator_loss, generator_loss_of_predictions, native, ops, reference, reference_x0
from crd_fast.didr.reference import WEIGHTINGS, GeneratorInputs
from crd_fast.errors import ExtensionMissingError
from crd_fast.schedules import KINDS, VP, RectifiedFlow

from .closed_forms import sdxl_alphas_cumprod

FLOW, SDXL = RectifiedFlow(), VP(sdxl_alphas_cumprod())
SCHEDULES = [FLOW, SDXL]
LOW = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "packed", "sliced rows"]


def in_layout(tensor, layout):
    if layout == "channels last":
        return tensor.to(memory_format=torch.channels_last)
    if layout == "packed":  # (B, tokens, channels) seen as (B, channels, height, width)
        return tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "sliced rows":
        wide = torch.full((len(tensor), tensor[0].numel() + 3), torch.nan, dtype=tensor.dtype)
        wide[:, 2:-1] = tensor.flatten(1)
        return wide[:, 2:-1].unflatten(1, tensor.shape[1:])
    return tensor


def predictions(shape=(3, 4, 5, 6), *, schedule=FLOW, dtype=torch.float64, seed=0, layout="contiguous"):
    generator = torch.Generator().manual_seed(seed)
    names = ("x0", "x_t", "ta", "conditional", "s_r", "unconditional")
    tensors = {}
    for name in names:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = in_layout(drawn.to(dtype), layout)
    share = 0.02 + 0.96 * torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return tensors | {"t": share * schedule.horizon, "schedule": schedule}


def of_estimates(case, *, guidance_scale, kind, weighting, function=generator_loss):
    """The same from clean estimates."""
    schedule, t, x_t = case["schedule"], case["t"], case["x_t"]
    x0_ta = schedule.to_x0(case["ta"], x_t, t, kind)
    x0_ref = reference_x0(
        case["conditional"], x_t, t, schedule=schedule, unconditional=case["unconditional"],
        guidance_scale=guidance_scale, kind=kind,
    )  # fmt: skip
    return function(case["x0"], x_t, t, x0_ta, x0_ref, case["s_r"], schedule=schedule, weighting=weighting)


def with_gradient(case, run):
    """The output of `run`, and the gradient in every latent, None where nothing arrived."""
    names = [name for name in case if name not in ("t", "schedule")]
    leaves = {name: case[name].detach().requires_grad_() for name in names}
    out = run(case | leaves)
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5, 0.0])
def test_predictions_give_what_their_estimates_give(schedule, kind, weighting, guidance_scale):
    case = predictions(schedule=schedule)
    settings = {"guidance_scale": guidance_scale, "kind": kind, "weighting": weighting}
    got, grads = with_gradient(case, lambda c: generator_loss_of_predictions(**c, **settings))
    want, expected = with_gradient(case, lambda c: of_estimates(c, **settings))
    torch.testing.assert_close(grads.pop("x0"), expected["x0"], rtol=1e-9, atol=1e-12)
    assert all(grad is None for grad in grads.values())
    for name in ("loss", "gap", "correction", "normaliser", "zeroed"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-12, msg=name)
    for name, metric in want.metrics.items():
        torch.testing.assert_close(got.metrics[name], metric, rtol=1e-9, atol=1e-12, msg=name)


def truth_in_float64(case, **settings):
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.ndim > 1 else v for k, v in case.items()}
    out, grads = with_gradient(exact, lambda c: of_estimates(c, **settings))
    return out, grads["x0"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_less_exact_than_the_plain_formulas(schedule, weighting, dtype, layout, monkeypatch):
    """Against float64: the error is at most that of PyTorch in float32 from estimates, and an ulp of the result.

    An ulp of the gradient's largest term, where its terms cancel.
    """
    case = predictions((2, 8, 16, 16), schedule=schedule, dtype=dtype, layout=layout)
    settings = {"guidance_scale": 4.5, "kind": None, "weighting": weighting}
    truth, exact = truth_in_float64(case, **settings)
    got, grads = with_gradient(case, lambda c: generator_loss_of_predictions(**c, **settings))
    monkeypatch.setenv("CRD_FAST_BACKEND", "reference")
    eager, eager_grads = with_gradient(case, lambda c: of_estimates(c, **settings))
    assert grads["x0"].dtype == dtype
    for name in ("loss", "gap", "correction", "normaliser"):
        ours, theirs, right = (getattr(out, name).detach().double() for out in (got, eager, truth))
        allowed = (theirs - right).abs() + 2.0**-22 * right.abs()
        assert ((ours - right).abs() <= allowed).all(), name
    ours, theirs = ((grad["x0"].double() - exact).abs() for grad in (grads, eager_grads))
    largest = exact.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    step = torch.finfo(dtype).eps * exact.abs() + 2.0**-20 * largest + torch.finfo(dtype).smallest_normal
    assert (ours <= theirs + step).all()
    assert ours.mean() <= 1.05 * theirs.mean() + 2.0**-22 * largest.mean()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_layouts_change_no_bit(weighting, layout, dtype):
    def run(case):
        return with_gradient(
            case, lambda c: generator_loss_of_predictions(**c, guidance_scale=3.0, weighting=weighting)
        )

    (plain, want), (other, got) = run(predictions(dtype=dtype)), run(predictions(dtype=dtype, layout=layout))
    assert torch.equal(got["x0"], want["x0"]) and torch.equal(plain.loss, other.loss)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_mixed_dtypes(weighting):
    case = predictions(dtype=torch.float32)
    case |= {"x0": case["x0"].bfloat16(), "ta": case["ta"].half(), "unconditional": case["unconditional"].bfloat16()}
    settings = {"guidance_scale": 2.0, "kind": None, "weighting": weighting}
    got, grads = with_gradient(case, lambda c: generator_loss_of_predictions(**c, **settings))
    truth, exact = truth_in_float64(case, **settings)
    assert got.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    torch.testing.assert_close(grads["x0"].double(), exact, rtol=2.0**-8, atol=1e-5 * float(exact.abs().max()))


def test_x_t_is_read_for_the_normaliser_alone():
    case = predictions(dtype=torch.bfloat16)
    case["x_t"] = torch.full_like(case["x_t"], torch.nan)
    out, grads = with_gradient(case, lambda c: generator_loss_of_predictions(**c))
    assert out.loss.isfinite() and grads["x0"].abs().min() > 0 and not out.zeroed.any()
    out, grads = with_gradient(case, lambda c: generator_loss_of_predictions(**c, weighting="dmd2"))
    assert out.zeroed.tolist() == [120, 120, 120] and not grads["x0"].any() and out.loss == 0
    out, grads = with_gradient(case, lambda c: generator_loss_of_predictions(**c, weighting="dmd2", kind="x0"))
    assert out.loss.isfinite() and grads["x0"].abs().min() > 0 and not out.zeroed.any()


def test_close_bfloat16_predictions_do_not_cancel_under_a_large_x_t():
    """Estimates of size |x_t| / alpha would lose a gap that is a thousandth of a float32 ulp of theirs."""
    shape = (1, 4)
    case = {"x0": torch.zeros(shape), "x_t": torch.full(shape, 2.0**20), "s_r": torch.zeros(shape)}
    ta, ref = torch.full(shape, 1.0 + 2.0**-7).bfloat16(), torch.ones(shape).bfloat16()
    settings = {"t": torch.tensor([0.5]), "schedule": FLOW, "ta": ta, "conditional": ref}
    _, grads = with_gradient(
        case | {"t": None, "schedule": None}, lambda c: generator_loss_of_predictions(**c | settings)
    )
    assert grads["x0"].tolist() == [[-(2.0**-8) / 4] * 4]


# --- the operators ---


def arguments(*, dtype=torch.float32, guided=True, distance=2, layout=None):
    def tensor():
        drawn = torch.randn(3, 4, 5, 2).to(dtype)
        return drawn if layout is None else drawn.to(memory_format=layout)

    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    slope, level, shift = torch.rand(3, 3, dtype=accumulated) + 0.5
    inputs = GeneratorInputs(tensor(), tensor(), tensor() if guided else None, 3.5, tensor(), -slope, level)
    of_distance = (
        tensor() if distance else None,
        tensor() if distance == 2 else None,
        shift if distance == 2 else None,
    )
    return inputs, of_distance


VARIANTS = [
    {},
    {"guided": False},
    {"distance": 0},
    {"distance": 1},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
    {"layout": torch.channels_last},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck_statistics(variant):
    inputs, of_distance = arguments(**variant)
    torch.library.opcheck(torch.ops.crd_fast.generator_statistics.default, (*inputs, *of_distance))


@pytest.mark.parametrize("upstream", [None, torch.tensor(0.5)], ids=["plain", "scaled"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck_gradient(variant, upstream):
    inputs, _ = arguments(**variant)
    scale = torch.rand_like(inputs.level)
    torch.library.opcheck(
        torch.ops.crd_fast.generator_gradient.default, (*inputs, scale, upstream, variant.get("dtype", torch.bfloat16))
    )


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck_value(variant, differentiated):
    inputs, _ = arguments(**variant)
    x0 = torch.randn(3, 4, 5, 2).to(inputs.ta.dtype).requires_grad_(differentiated)
    value, scale = torch.rand((), dtype=inputs.level.dtype), torch.rand_like(inputs.level)
    torch.library.opcheck(torch.ops.crd_fast.generator_value.default, (x0, value, *inputs, scale))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fullgraph_compilation(weighting, dtype):
    torch._dynamo.reset()
    case = predictions(dtype=dtype)

    def step(x0, ta, conditional, unconditional, s_r, x_t):
        return generator_loss_of_predictions(
            x0, x_t, case["t"], ta, conditional, s_r, unconditional=unconditional, guidance_scale=2.0,
            schedule=FLOW, weighting=weighting,
        ).loss  # fmt: skip

    rest = [case[name] for name in ("ta", "conditional", "unconditional", "s_r", "x_t")]
    x0 = case["x0"].requires_grad_()
    (eager,) = torch.autograd.grad(step(x0, *rest), x0)
    (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x0, *rest), x0)
    assert torch.equal(compiled, eager)


def test_second_derivatives_are_refused():
    inputs, _ = arguments()
    x0 = torch.randn(3, 4, 5, 2, requires_grad=True)
    value = torch.ones((), requires_grad=True)
    loss = ops.generator_value(x0, value.detach(), *inputs, torch.rand(3)) * value
    (grad,) = torch.autograd.grad(loss, x0, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


class Latents(TorchDispatchMode):
    """Names of operators that make a tensor as large as a latent, other than views of their first argument."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.numel:
            shared = isinstance(args[0], torch.Tensor) and out.data_ptr() == args[0].data_ptr()
            if not shared:
                self.names.append(function.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("layout", [None, torch.channels_last])
def test_no_latent_is_copied(layout, monkeypatch):
    """Only the gradient is made, and nothing in the dtype of the arithmetic."""
    torch.use_deterministic_algorithms(False)  # which fills new tensors
    try:
        inputs, of_distance = arguments(dtype=torch.bfloat16, layout=layout)
        with Latents(inputs.ta.numel()) as made:
            ops._statistics_cpu(*inputs, *of_distance)
            assert made.names == []
            ops._gradient_cpu(*inputs, torch.rand(3), None, torch.float32)
        assert made.names == ["empty_like"]
    finally:
        torch.use_deterministic_algorithms(True)


# --- which implementation runs ---


@pytest.fixture
def calls(monkeypatch):
    """Names of the implementations that were called, in order."""
    seen = []
    for module in (native, reference):
        for name in ("generator_statistics", "generator_gradient"):
            original, where = getattr(module, name), module.__name__.rpartition(".")[2]

            def spy(*arguments, label=f"{where}.{name}", original=original):
                seen.append(label)
                return original(*arguments)

            monkeypatch.setattr(module, name, spy)
    return seen


def both(dtype, out_dtype=torch.float32):
    inputs, of_distance = arguments(dtype=dtype)
    ops.generator_statistics(*inputs, *of_distance)
    ops.generator_gradient(*inputs, torch.rand_like(inputs.level), None, out_dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_compiled_by_default(calls, dtype, monkeypatch):
    monkeypatch.delenv("CRD_FAST_BACKEND", raising=False)
    both(dtype)
    assert calls == ["native.generator_statistics", "native.generator_gradient"]


def test_double_runs_the_formulas(calls):
    both(torch.float64)
    assert calls == ["reference.generator_statistics", "reference.generator_gradient"]
    calls.clear()
    both(torch.float32, torch.float64)
    assert calls == ["native.generator_statistics", "reference.generator_gradient"]


def test_reference_on_request(calls, monkeypatch):
    monkeypatch.setenv("CRD_FAST_BACKEND", "reference")
    both(torch.float32)
    assert calls == ["reference.generator_statistics", "reference.generator_gradient"]


def test_missing_extension_is_an_error_not_a_fallback(calls, monkeypatch):
    def missing():
        raise ExtensionMissingError("not built")

    monkeypatch.delenv("CRD_FAST_BACKEND", raising=False)
    monkeypatch.setattr(native, "extension", missing)
    monkeypatch.setattr(extension_module, "extension", missing)
    with pytest.raises(ExtensionMissingError, match="not built"):
        both(torch.float32)
    assert calls == ["native.generator_statistics"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.randn(3)}, "x0: expected a .* tensor"),
        ({"ta": torch.randn(2, 4)}, r"ta: expected shape \(2, 3\) on cpu like x0, got shape \(2, 4\)"),
        ({"conditional": torch.zeros(2, 3, dtype=torch.int64)}, "conditional: expected a .* tensor"),
        ({"x_t": torch.randn(1, 3)}, r"x_t: expected shape \(2, 3\)"),
        ({"s_r": None}, "s_r: expected .* got NoneType"),
        ({"unconditional": None}, "unconditional: expected a prediction because guidance_scale is 2.0, got None"),
        ({"unconditional": torch.randn(3, 3)}, r"unconditional: expected shape \(2, 3\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
        ({"kind": "velocity"}, "kind: expected one of"),
        ({"weighting": "bound"}, "weighting: expected one of .*did you mean 'bounded'"),
        ({"t": torch.tensor([0.5])}, r"t: expected shape \(2,\)"),
        ({"t": torch.tensor([0.5, 0.0])}, "t: expected times at which alpha and sigma are positive"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        generator_loss_of_predictions(**predictions((2, 3)) | {"guidance_scale": 2.0} | changes)
