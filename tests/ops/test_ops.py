"""The registered operators: opcheck, gradients, compilation, and which implementation runs."""

from __future__ import annotations

import pytest
import torch

from crd_fast import native, ops, reference
from crd_fast.errors import ConfigError, ExtensionMissingError, TransformError
from crd_fast.reference import ResidualInputs

SHAPE = (3, 4, 5)


def residual_arguments(
    *, dtype=torch.float32, seeded=False, masked=False, ref=True, guided=True, grad=False, layout=None, old=False
):
    predicted = torch.randn(SHAPE).to(dtype)
    if layout is not None:
        predicted = torch.randn(3, 4, 5, 2).to(dtype).to(memory_format=layout)
    shape = predicted.shape
    return ResidualInputs(
        predicted=predicted.requires_grad_(grad),
        target=None if seeded else torch.randn(shape).to(dtype),
        x0=torch.randn(shape).to(dtype) if seeded else None,
        sigma=torch.tensor([0.2, 0.5, 0.9]) if seeded else None,
        sample_ids=torch.arange(3) if seeded else None,
        seed=-(2**62),
        stream=1,
        ref=torch.randn(shape).to(dtype) if ref else None,
        ref_uncond=torch.randn(shape).to(dtype) if ref and guided else None,
        guidance_scale=4.5 if ref and guided else 1.0,
        mask=torch.rand(shape) < 0.7 if masked else None,
        prediction="eps" if seeded else "v",
        old=torch.randn(shape).to(dtype) if old else None,
    )


VARIANTS = [
    {},
    {"seeded": True},
    {"masked": True},
    {"ref": False},
    {"guided": False},
    {"dtype": torch.bfloat16, "seeded": True, "masked": True},
    {"dtype": torch.float64},
    {"layout": torch.channels_last},
    {"old": True, "masked": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_residual_stats(variant, grad):
    torch.library.opcheck(torch.ops.crd_fast.residual_stats.default, residual_arguments(**variant, grad=grad))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck_residual_grad(variant):
    arguments = (*residual_arguments(**variant), torch.randn(3), torch.randn(3), torch.randn(()))
    torch.library.opcheck(torch.ops.crd_fast.residual_grad.default, arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_noise(dtype, grad, backend, monkeypatch):
    monkeypatch.setenv("CRD_FAST_BACKEND", backend)
    x0 = torch.randn(SHAPE).to(dtype).requires_grad_(grad)
    arguments = (x0, torch.rand(3), torch.arange(3), 2**62, 4, torch.float32)
    torch.library.opcheck(torch.ops.crd_fast.noise.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_opcheck_epsilon(dtype):
    torch.library.opcheck(torch.ops.crd_fast.epsilon.default, (torch.arange(3), SHAPE, -5, 4, dtype))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "dtype" not in v], ids=str)
def test_gradcheck_residual_stats(variant):
    inputs = residual_arguments(**variant, dtype=torch.float64)

    def differentiable(predicted):
        mse, _, kl, *_ = ops.residual_stats(*inputs._replace(predicted=predicted))
        return mse, kl

    assert torch.autograd.gradcheck(differentiable, inputs.predicted.detach().requires_grad_())


def test_gradcheck_noise():
    x0 = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    sigma = torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.noise(x, sigma, torch.arange(3), 1, 0, torch.float64), (x0,))


def test_mae_is_not_differentiable():
    mse, mae, kl, *_ = ops.residual_stats(*residual_arguments(grad=True))
    assert mse.requires_grad and kl.requires_grad and not mae.requires_grad


def test_one_statistic_alone_can_be_differentiated():
    inputs = residual_arguments(grad=True)
    ops.residual_stats(*inputs)[2].sum().backward()
    anchor = inputs.ref_uncond + 4.5 * (inputs.ref - inputs.ref_uncond)
    torch.testing.assert_close(inputs.predicted.grad, 2 / 20 * (inputs.predicted.detach() - anchor))


def test_second_derivatives_are_refused():
    inputs = residual_arguments(grad=True)
    (grad,) = torch.autograd.grad(ops.residual_stats(*inputs)[0].sum(), inputs.predicted, create_graph=True)
    with pytest.raises(TransformError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_fullgraph_compilation(variant):
    torch._dynamo.reset()
    inputs = residual_arguments(**variant)

    def step(predicted):
        mse, mae, kl, *_ = ops.residual_stats(*inputs._replace(predicted=predicted))
        return (mse / mae + kl).sum()

    eager, compiled = (inputs.predicted.clone().requires_grad_() for _ in range(2))
    step(eager).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


# --- which implementation runs ----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Names of the implementations that were called, in order."""
    seen = []
    for module in (native, reference):
        for name in ("noise", "epsilon"):
            original = getattr(module, name)

            def spy(*arguments, label=f"{module.__name__}.{name}", original=original):
                seen.append(label)
                return original(*arguments)

            monkeypatch.setattr(module, name, spy)
    return seen


def draw(dtype, out_dtype=torch.float32):
    ops.noise(torch.randn(SHAPE).to(dtype), torch.rand(3), torch.arange(3), 1, 0, out_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_by_default(calls, dtype, monkeypatch):
    monkeypatch.delenv("CRD_FAST_BACKEND", raising=False)
    draw(dtype)
    ops.epsilon(torch.arange(3), SHAPE, 1, 0, dtype)
    assert calls == ["crd_fast.native.noise", "crd_fast.native.epsilon"]


@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_double_runs_the_formulas(calls, dtype, out_dtype):
    draw(dtype, out_dtype)
    assert calls[0] == "crd_fast.reference.noise" and "crd_fast.native.noise" not in calls


def test_reference_on_request(calls, monkeypatch):
    monkeypatch.setenv("CRD_FAST_BACKEND", "reference")
    draw(torch.float32)
    assert calls[0] == "crd_fast.reference.noise" and "crd_fast.native.noise" not in calls


def test_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("CRD_FAST_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="CRD_FAST_BACKEND='cuda': expected one of auto, reference"):
        draw(torch.float32)


def test_missing_extension_is_an_error_not_a_fallback(calls, monkeypatch):
    def missing():
        raise ExtensionMissingError("not built")

    monkeypatch.delenv("CRD_FAST_BACKEND", raising=False)
    monkeypatch.setattr(native, "extension", missing)
    with pytest.raises(ExtensionMissingError, match="not built"):
        draw(torch.float32)
    with pytest.raises(ExtensionMissingError, match="not built"):
        ops.epsilon(torch.arange(3), SHAPE, 1, 0, torch.float32)
    assert not any(call.startswith("crd_fast.reference") for call in calls)


@pytest.mark.parametrize(("seed", "signed"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)])
def test_seeds_keep_their_bits(seed, signed):
    assert ops.signed_seed(seed) == signed
    assert signed % 2**64 == seed


@pytest.mark.parametrize(
    ("missing", "advice"),
    [("triton", r"pip install 'crd-fast\[triton\]'"), ("crd_fast.kernels", "from a checkout that is not installed")],
)
def test_kernels_that_cannot_be_imported_say_what_to_install(
    missing: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(ops.importlib, "import_module", fail)
    with pytest.raises(ExtensionMissingError, match=advice):
        ops._triton()
