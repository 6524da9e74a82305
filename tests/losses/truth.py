"""The CRD loss once more in float64, one sample and one group at a time, sharing no code with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    """One call of the loss. Tensors are as the package receives them; y is what it should regress onto."""

    f: torch.Tensor
    y: torch.Tensor
    f_old: torch.Tensor
    advantages: torch.Tensor
    groups: list[int]
    ref: torch.Tensor | None = None
    ref_uncond: torch.Tensor | None = None
    w: float = 1.0
    mask: torch.Tensor | None = None
    sample_weights: list[float] | None = None
    kl_weights: list[float] | None = None
    factors: list[float] | None = None  # velocity error = factor x prediction error
    settings: dict = field(default_factory=dict)


@dataclass
class Truth:
    loss: torch.Tensor
    policy: torch.Tensor
    kl: torch.Tensor
    grad: torch.Tensor
    implicit: list[float]
    velocity_kl: list[float]


def truth(case: Case) -> Truth:
    s = {
        "beta": 1.0, "kl_coef": 0.1, "adv_clip": 5.0, "adaptive_weight": True, "adaptive_kl": True,
        "temperature": math.inf, "loss_type": "mse", "centering": "prompt", "reduction": "mean",
    } | case.settings  # fmt: skip
    n = case.f.shape[0]
    weights = case.sample_weights or [1.0] * n
    kl_weights = case.kl_weights or [1.0] * n
    factors = case.factors or [1.0] * n
    kept = [i for i in range(n) if weights[i] != 0]
    f = case.f.detach().double().contiguous().requires_grad_()

    def picked(x, i):  # the valid elements of sample i, as a vector
        row = x[i].double()
        if case.mask is None:
            return row.reshape(-1)
        m = case.mask
        if m.ndim == 2 and case.f.ndim == 3:
            m = m[:, :, None]
        return row[m.expand(case.f.shape)[i]]

    reward, rho, rho_old, velocity_kl = {}, {}, {}, {}
    for i in kept:
        c = s["adv_clip"]
        reward[i] = min(max(min(max(float(case.advantages[i]), -c), c) / (2 * c) + 0.5, 0.0), 1.0)
        for store, source in ((rho, f), (rho_old, case.f_old)):
            e = factors[i] * (picked(source, i) - picked(case.y, i))
            if e.numel() == 0:
                store[i] = torch.zeros((), dtype=torch.float64)
                continue
            store[i] = (e * e).mean()
            if s["adaptive_weight"]:
                store[i] = store[i] / max(float(e.detach().abs().mean()), 1e-5)
        velocity_kl[i] = torch.zeros((), dtype=torch.float64)
        if case.ref is not None and kl_weights[i] != 0:
            anchor = picked(case.ref, i)
            if anchor.numel() == 0:
                continue
            if case.ref_uncond is not None:
                anchor = case.w * anchor + (1 - case.w) * picked(case.ref_uncond, i)
            velocity_kl[i] = (factors[i] * (picked(f, i) - anchor)).pow(2).mean()
    implicit = {i: rho_old[i].detach() - rho[i] for i in kept}

    fixed_implicit = {i: float(implicit[i].detach()) for i in kept}  # what centers carries no gradient

    def center(values, members, direction):  # weighted mean of numbers over the members of a group
        if math.isinf(s["temperature"]):
            p = {j: 1.0 for j in members}
        elif s["temperature"] == 0:
            side = [j for j in members if direction * (reward[j] - 0.5) > 0] or members
            p = {j: 1.0 for j in side}
        else:
            p = {j: math.exp(direction * (reward[j] - 0.5) / s["temperature"]) for j in members}
        return sum(p[j] * values[j] for j in p) / sum(p.values())

    policy, anchor_loss = (
        [torch.zeros((), dtype=torch.float64)] * n,
        [torch.zeros((), dtype=torch.float64)] * n,
    )
    for i in kept:
        same = s["centering"] == "batch"
        members = [j for j in kept if same or case.groups[j] == case.groups[i]]
        directions = (1,) if math.isinf(s["temperature"]) else (1, -1)
        for d in directions:
            x = s["beta"] * (implicit[i] - center(fixed_implicit, members, d))
            t = reward[i] - center(reward, members, d)
            if s["loss_type"] == "mse":
                term = (x - t) ** 2
            else:
                p = 1 / (1 + math.exp(-t))
                term = -(p * torch.log(torch.sigmoid(x)) + (1 - p) * torch.log(torch.sigmoid(-x)))
            policy[i] = policy[i] + weights[i] * term * s["adv_clip"] / s["beta"] / len(directions)
        if s["kl_coef"] > 0:
            m = 1e-4 / s["kl_coef"]
            kappa = m + reward[i] * (1 - m) if s["adaptive_kl"] else 1.0
            anchor_loss[i] = weights[i] * kl_weights[i] * s["kl_coef"] * kappa * velocity_kl[i]

    def reduce(terms):
        if s["reduction"] == "none":
            return torch.stack(terms)
        total = sum(terms)
        return total / max(len(kept), 1) if s["reduction"] == "mean" else total

    loss = reduce(policy) + reduce(anchor_loss)
    (grad,) = torch.autograd.grad(loss.sum(), f) if kept else (torch.zeros_like(f),)
    zeros = [0.0] * n
    return Truth(
        loss=loss.detach(),
        policy=reduce(policy).detach(),
        kl=reduce(anchor_loss).detach(),
        grad=grad,
        implicit=[fixed_implicit.get(i, z) for i, z in enumerate(zeros)],
        velocity_kl=[float(velocity_kl[i].detach()) if i in kept else z for i, z in enumerate(zeros)],
    )


def random_case(shape, *, dtype=torch.float32, groups=None, guided=True, seed=0, **settings) -> Case:
    """Predictions of a model that has moved a little from the old one, in the range a real run has."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(shape, generator=g, dtype=torch.float64)

    def near(scale):
        return (y + scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    n = shape[0]
    return Case(
        f=near(0.6),
        y=y.to(dtype),
        f_old=near(0.7),
        advantages=3.0 * torch.randn(n, generator=g, dtype=torch.float64),
        groups=groups or [i % 3 for i in range(n)],
        ref=near(0.5),
        ref_uncond=near(0.9) if guided else None,
        w=4.5 if guided else 1.0,
        settings=settings,
    )
