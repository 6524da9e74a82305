"""Calls that skip the dispatcher: the same as through it, and not where anyone listens."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import crd_fast
from crd_fast import ops
from crd_fast.errors import TransformError
from crd_fast.operation import on_its_device

SHAPE = (4, 3, 5)


class Listener(TorchDispatchMode):
    """Keeps the names of the operators that pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x0, f, old, ref = (torch.randn(SHAPE, generator=generator) for _ in range(4))
    return x0, f, old, ref, torch.rand(4, generator=generator), torch.randn(4, generator=generator)


def step(x0, f, old, ref, sigma, advantages):
    """(loss, gradients of f and x0): every operator, both directions."""
    x0, f = x0.clone().requires_grad_(), f.clone().requires_grad_()
    fwd = crd_fast.noise(x0, sigma, seed=3)
    kept = crd_fast.residual_stats(old, fwd)
    out = crd_fast.loss(f * fwd.x_t, fwd, old=kept, advantages=advantages, ref=ref + 0 * fwd.epsilon())
    out.loss.backward()
    return out.loss.detach(), f.grad, x0.grad


def test_both_ways_give_the_same_bits(inputs):
    straight = step(*inputs)
    with Listener() as listener:
        dispatched = step(*inputs)
    for a, b in zip(straight, dispatched, strict=True):
        assert torch.equal(a, b)
    names = {name for name in listener.seen if name.startswith("crd_fast.")}
    expected = ("noise", "epsilon", "residual_stats", "residual_grad", "objective")
    assert names == {f"crd_fast.{name}.default" for name in expected}


def test_a_subclass_goes_through_the_dispatcher(inputs):
    _, f, old, *_ = inputs
    mode = FakeTensorMode()
    mse = crd_fast.residual_stats(mode.from_tensor(f), mode.from_tensor(old)).mse
    assert isinstance(mse, FakeTensor) and mse.shape == (4,)


def test_meta_tensors_give_shapes(inputs):
    _, f, old, *_ = inputs
    assert crd_fast.residual_stats(f.to("meta"), old.to("meta")).mse.shape == (4,)


TRANSFORMS = {
    "grad": lambda run, f: torch.func.grad(run)(f),
    "vjp": lambda run, f: torch.func.vjp(run, f),
    "jvp": lambda run, f: torch.func.jvp(run, (f,), (f,)),
    "vmap": lambda run, f: torch.func.vmap(run)(f[None]),
    "hessian": lambda run, f: torch.func.hessian(run)(f),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_refused(inputs, name):
    _, f, old, ref, _, advantages = inputs

    def run(f):
        return crd_fast.loss(f, ref, old=old, advantages=advantages, ref=ref).loss

    with pytest.raises(TransformError, match="no rules for torch.func transforms"):
        TRANSFORMS[name](run, f)


def test_forward_mode_is_refused(inputs):
    _, f, old, *_ = inputs
    with forward_ad.dual_level():
        crd_fast.residual_stats(f, old)  # nothing is differentiated here
        with pytest.raises(TransformError, match="forward-mode"):
            crd_fast.residual_stats(forward_ad.make_dual(f, f), old)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_keeps_the_operator(inputs):
    _, f, old, *_ = inputs
    rest = (old, None, None, None, 0, 0, None, None, 1.0, None, "v", None)
    traced = torch.jit.trace(lambda f: ops.residual_stats(f, *rest)[0], f)
    torch.testing.assert_close(traced(2 * f), crd_fast.residual_stats(2 * f, old).mse)


def test_a_lazy_negation_counts(inputs):
    """`.imag` of a conjugate points at memory with the other sign."""
    x0, f, old, ref, sigma, advantages = inputs

    def lazy(tensor):
        negated = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        assert negated.is_neg() and torch.equal(negated, tensor)
        return negated

    for a, b in zip(step(*map(lazy, inputs)), step(*inputs), strict=True):
        assert torch.equal(a, b)
    kept = crd_fast.residual_stats(old, ref)
    weights = torch.rand(4)
    rest = {"advantages": advantages, "sample_weights": weights, "kl_weights": weights}
    expected = crd_fast.loss(f, ref, old=kept, ref=ref, **rest).loss
    kept = crd_fast.ResidualStats(lazy(kept.mse), lazy(kept.mae))
    got = crd_fast.loss(f, ref, old=kept, ref=ref, **{name: lazy(value) for name, value in rest.items()}).loss
    assert torch.equal(got, expected)


@pytest.mark.parametrize("over", ["f", "sigma", "advantages", "sample_weights"])
def test_vmap_is_refused_before_values_are_looked_at(inputs, over):
    x0, f, old, _, sigma, advantages = inputs
    given = {"f": f, "sigma": sigma, "advantages": advantages, "sample_weights": torch.rand(4)}

    def run(value):
        now = given | {over: value}
        fwd = crd_fast.noise(x0, now["sigma"], seed=0)
        rest = {"advantages": now["advantages"], "sample_weights": now["sample_weights"]}
        return crd_fast.loss(now["f"], fwd, old=old, **rest, config=crd_fast.CRDConfig(kl_coef=0)).loss

    with pytest.raises(TransformError, match="vmap"):
        torch.func.vmap(run)(torch.stack([given[over]] * 2))


@pytest.mark.parametrize("dispatched", [False, True])
def test_a_second_derivative_is_refused_in_words(inputs, dispatched):
    _, f, old, ref, _, advantages = inputs
    f.requires_grad_()
    with Listener() if dispatched else nullcontext():
        loss = crd_fast.loss(f, ref, old=old, advantages=advantages, ref=ref).loss
        (gradient,) = torch.autograd.grad(loss, f, create_graph=True)
        with pytest.raises(TransformError, match="first derivatives only"):
            gradient.square().sum().backward()


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current GPU."""
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    seen = on_its_device(lambda tensor: (tensor.device.index, current[0]))
    for index in (0, 1):
        assert seen(SimpleNamespace(device=torch.device("cuda", index))) == (index, index)
    assert current == [0]
