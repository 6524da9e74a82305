"""Calls that skip the dispatcher: the same as through it, and not where anyone listens."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import crd_fast
from crd_fast import ops
from crd_fast.errors import TransformError

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
