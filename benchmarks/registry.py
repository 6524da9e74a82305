"""The operations that are measured, each beside the formula it replaces.

The eager side is what a trainer writes today: `randn_like` and `lerp` for noising, and the published loss section in
plain PyTorch with fp32 arithmetic. Bytes are what an operation must move at least: its latent-sized inputs once and its
output once. Every operation has a check, and no number of an operation is shown whose check fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import crd_fast
from crd_fast.didr import generator_loss_of_predictions
from crd_fast.schedules import RectifiedFlow

Shape = tuple[int, ...]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """An operation at one shape and dtype: the two sides on the same inputs, and what is known of them.

    bytes, flops: of one call, at least. check raises AssertionError where the sides disagree. forget drops the gradient
    that a call leaves.
    """

    ours: Run
    eager: Run
    compiled: Callable[[], Run]
    check: Callable[[], None]
    bytes: int
    flops: int
    forget: Callable[[], None] = lambda: None


def _latents(shape: Shape, dtype: torch.dtype, device: torch.device, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))


# --- noise --------------------------------------------------------------------------------------------------


def eager_noise(x0: Tensor, sigma: Tensor) -> Tensor:
    return torch.lerp(x0, torch.randn_like(x0), _per_row(sigma.to(x0.dtype), x0))


def noise(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    (x0,) = _latents(shape, dtype, device, 1)
    sigma = torch.linspace(0.05, 0.95, shape[0], device=device)

    def check() -> None:
        """The same mean and variance, sample by sample: the two draws are different ones."""
        for ours, eager in zip(crd_fast.noise(x0, sigma, seed=0).x_t, eager_noise(x0, sigma), strict=True):
            bound = 6 / ours.numel() ** 0.5 + torch.finfo(dtype).eps
            assert abs(ours.float().mean() - eager.float().mean()) < 2 * bound
            assert abs(ours.float().std() - eager.float().std()) < 2 * bound

    compiled = torch.compile(eager_noise)
    return Workload(
        ours=lambda: crd_fast.noise(x0, sigma, seed=0),
        eager=lambda: eager_noise(x0, sigma),
        compiled=lambda: lambda: compiled(x0, sigma),
        check=check,
        bytes=2 * x0.nbytes,
        flops=40 * x0.numel(),
    )


# --- residual statistics ------------------------------------------------------------------------------------


def eager_statistics(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    error = predicted.float() - target.float()
    axes = tuple(range(1, error.ndim))
    return error.square().mean(axes), error.abs().mean(axes)


def residual_stats(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    predicted, target = _latents(shape, dtype, device, 2)

    def check() -> None:
        got = crd_fast.residual_stats(predicted, target)
        truth = eager_statistics(predicted.double(), target.double())
        for value, expected in zip((got.mse, got.mae), truth, strict=True):
            torch.testing.assert_close(value.double(), expected.double(), rtol=2e-5, atol=0)

    compiled = torch.compile(eager_statistics)
    return Workload(
        ours=lambda: crd_fast.residual_stats(predicted, target),
        eager=lambda: eager_statistics(predicted, target),
        compiled=lambda: lambda: compiled(predicted, target),
        check=check,
        bytes=predicted.nbytes + target.nbytes,
        flops=4 * predicted.numel(),
    )


# --- the loss, forward and backward -------------------------------------------------------------------------


def eager_loss(f: Tensor, y: Tensor, old: Tensor, c: Tensor, u: Tensor, advantages: Tensor) -> Tensor:
    """The loss section of a trainer, one group, defaults of the paper."""
    axes = tuple(range(1, f.ndim))
    f, y, old, c, u = (t.float() for t in (f, y, old, c, u))

    def weighted(prediction: Tensor) -> Tensor:
        error = prediction - y
        return error.square().mean(axes) / error.abs().mean(axes).detach().clamp(min=1e-5)

    reward = weighted(old) - weighted(f)
    mapped = (advantages.clamp(-5, 5) / 10 + 0.5).clamp(0, 1)
    policy = 5 * ((reward - reward.detach().mean()) - (mapped - mapped.mean())).square().mean()
    anchor = u + 4.5 * (c - u)
    kappa = 1e-3 + mapped * (1 - 1e-3)
    return policy + 0.1 * (kappa * (f - anchor).square().mean(axes)).mean()


def our_loss(f: Tensor, y: Tensor, old: Tensor, c: Tensor, u: Tensor, advantages: Tensor) -> Tensor:
    return crd_fast.loss(f, y, old=old, advantages=advantages, ref=c, ref_uncond=u, guidance_scale=4.5).loss


def forward_backward(formula: Callable[..., Tensor], f: Tensor, *others: Tensor) -> Run:
    """A call that leaves the gradient in f.grad and returns the loss."""

    def run() -> Tensor:
        f.grad = None
        value = formula(f, *others)
        value.backward()
        return value

    return run


def loss(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    f, y, old, c, u = _latents(shape, dtype, device, 5)
    advantages = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    f.requires_grad_()

    def stepped(formula: Callable[..., Tensor]) -> Run:
        return forward_backward(formula, f, y, old, c, u, advantages)

    def check() -> None:
        values, gradients = [], []
        for formula in (eager_loss, our_loss):
            values.append(stepped(formula)().detach())
            assert f.grad is not None
            gradients.append(f.grad.double().clone())
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)
        limit = 6e-3 if dtype != torch.float32 else 2e-5
        assert (gradients[0] - gradients[1]).norm() < limit * gradients[0].norm()

    return Workload(
        ours=stepped(our_loss),
        eager=stepped(eager_loss),
        compiled=lambda: stepped(torch.compile(eager_loss)),
        check=check,
        # forward reads f, y, old, c, u; backward reads f, y, c, u and writes the gradient
        bytes=10 * f.nbytes,
        flops=24 * f.numel(),
        forget=lambda: setattr(f, "grad", None),
    )


def seeded_loss(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    """As a trainer of ours uses it: the noise is made again, two floats are kept of the old prediction.

    The eager side is given what it needs, the stored noise, so the comparison leaves out what storing it costs.
    """
    x0, f, old, c, u = _latents(shape, dtype, device, 5)
    sigma = torch.linspace(0.05, 0.95, shape[0], device=device)
    advantages = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(device)
    f.requires_grad_()
    fwd = crd_fast.noise(x0, sigma, seed=0)
    y = (fwd.epsilon().float() - x0.float()).to(dtype)
    kept = crd_fast.residual_stats(old, fwd)

    def seeded(f: Tensor) -> Tensor:
        return crd_fast.loss(
            f, fwd, old=kept, advantages=advantages, ref=c, ref_uncond=u, guidance_scale=4.5
        ).loss  # fmt: skip

    ours = forward_backward(seeded, f)

    def stepped(formula: Callable[..., Tensor]) -> Run:
        return forward_backward(formula, f, y, old, c, u, advantages)

    def check() -> None:
        a = ours().detach()
        assert f.grad is not None
        gradient = f.grad.double().clone()
        b = stepped(eager_loss)().detach()
        # y is rounded to the dtype on the eager side and is not on ours
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=1e-3 + 4 * eps, atol=1e-5)
        assert (gradient - f.grad.double()).norm() < (2e-5 + 2 * eps) * gradient.norm()

    return Workload(
        ours=ours,
        eager=stepped(eager_loss),
        compiled=lambda: stepped(torch.compile(eager_loss)),
        check=check,
        # forward reads f, x0, c, u; backward reads them once more and writes the gradient
        bytes=9 * f.nbytes,
        flops=100 * f.numel(),
        forget=lambda: setattr(f, "grad", None),
    )


# --- DIDR's generator loss, forward and backward ------------------------------------------------------------


def eager_generator(x0: Tensor, x_t: Tensor, ta: Tensor, c: Tensor, u: Tensor, s_r: Tensor, t: Tensor) -> Tensor:
    """Stage II as DMD2's trainer writes its loss: clean estimates, normaliser, a regression onto x0 - g."""
    x0, x_t, ta, c, u, s_r = (latents.float() for latents in (x0, x_t, ta, c, u, s_r))
    t = _per_row(t, x0)
    x0_ta = x_t - t * ta
    x0_ref = x_t - t * (u + 4.5 * (c - u))
    normaliser = (x0 - x0_ref).abs().mean(tuple(range(1, x0.ndim)), keepdim=True)
    g = (x0_ta - x0_ref - t.square() / (1 - t) * s_r) * ((1 - t) / t).square().clamp(max=1) / normaliser
    return 0.5 * torch.nn.functional.mse_loss(x0, (x0 - torch.nan_to_num(g)).detach())


def generator(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    x0, *others = _latents(shape, dtype, device, 6)
    t = torch.linspace(0.05, 0.95, shape[0], device=device)
    x0.requires_grad_()

    def ours(x0: Tensor, x_t: Tensor, ta: Tensor, c: Tensor, u: Tensor, s_r: Tensor) -> Tensor:
        return generator_loss_of_predictions(
            x0, x_t, t, ta, c, s_r, unconditional=u, guidance_scale=4.5, schedule=RectifiedFlow(), weighting="bounded"
        ).loss

    def stepped(formula: Callable[..., Tensor]) -> Run:
        return forward_backward(formula, x0, *others)

    def eager(*latents: Tensor) -> Tensor:
        return eager_generator(*latents, t)

    def check() -> None:
        values, gradients = [], []
        for formula in (eager, ours):
            values.append(stepped(formula)().detach())
            assert x0.grad is not None
            gradients.append(x0.grad.double().clone())
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)
        limit = 6e-3 if dtype != torch.float32 else 2e-5
        assert (gradients[0] - gradients[1]).norm() < limit * gradients[0].norm()

    return Workload(
        ours=stepped(ours),
        eager=stepped(eager),
        compiled=lambda: stepped(torch.compile(eager)),
        check=check,
        # forward reads all six; backward reads the predictions and s_r and writes the gradient
        bytes=11 * x0.nbytes,
        flops=34 * x0.numel(),
        forget=lambda: setattr(x0, "grad", None),
    )


WORKLOADS: dict[str, Callable[[Shape, torch.dtype, torch.device], Workload]] = {
    "noise": noise,
    "residual_stats": residual_stats,
    "loss forward+backward": loss,
    "loss forward+backward, seeded": seeded_loss,
    "generator forward+backward": generator,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
