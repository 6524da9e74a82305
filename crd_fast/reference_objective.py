"""The CRD objective in plain PyTorch: from residual statistics to loss, slopes and metrics, on (B,) vectors.

Source: "Diffusion Reinforcement Learning via Centered Reward Distillation" (arXiv 2603.14128). The oracle of the
compiled implementations, and what runs where there are none; exact in float64. log Z(c) is one number per prompt, so
it drops out of the regression once the implicit and the external reward are both centered within the prompt's samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAE_FLOOR = 1e-5
"""The adaptive weight divides by at least this mean absolute error."""

KL_FLOOR = 1e-4
"""Adaptive KL weighs a sample by kappa = m + a (1 - m), m = KL_FLOOR / lambda: at a = 0, lambda m is left."""

METRICS = (
    "loss",
    "policy_loss",
    "kl_loss",
    "kl",
    "implicit_reward_mean",
    "implicit_reward_std",
    "implicit_reward_centered_std",
    "reward_mapped_mean",
    "reward_mapped_std",
    "advantage_clip_fraction",
    "singleton_groups",
    "samples",
    "theta_mse",
    "theta_mae",
    "old_mse",
    "old_mae",
)


class ObjectiveInputs(NamedTuple):
    """What the objective takes, in the order of its registered schema. Everything is (B,) unless it says otherwise.

    mse, mae, kl: E, M, K of the trained model; old_mse, old_mae of the old snapshot. group_ids int64, or None for one
    group. sample_weights, kl_weights: None for 1; samples of weight 0 leave every mean, and nothing of them is looked
    at. member_ids (N,) int64 and members (3, N), the mapped reward, the implicit reward and 1 for those that count: the
    samples of every rank, or None when group means run over this batch alone. The rest is of `CRDConfig`.
    """

    mse: Tensor
    mae: Tensor
    kl: Tensor
    old_mse: Tensor
    old_mae: Tensor
    advantages: Tensor
    group_ids: Tensor | None
    sample_weights: Tensor | None
    kl_weights: Tensor | None
    member_ids: Tensor | None
    members: Tensor | None
    beta: float
    kl_coef: float
    adv_clip: float
    adaptive_weight: bool
    adaptive_kl: bool
    temperature: float
    loss_type: str
    reduction: str


class Objective(NamedTuple):
    """loss () or, for reduction "none", (B,); parts (2,) or (2, B): policy and KL loss; samples (3, B): implicit
    reward and K, 0 where left out, and mapped reward; slopes (2, B): dL/dE and dL/dK; metrics (16,): `METRICS`."""

    loss: Tensor
    parts: Tensor
    samples: Tensor
    slopes: Tensor
    metrics: Tensor


class _Samples(NamedTuple):
    """(B,) vectors in one dtype, with left-out samples made harmless.

    A left-out sample may hold anything, NaN included, and NaN times zero is NaN; so its values are replaced before
    they are used, not masked after.
    """

    active: Tensor  # bool, sample_weights != 0
    anchored: Tensor  # bool, active and kl_weights != 0
    weight: Tensor
    kl_weight: Tensor
    advantage: Tensor
    mse: Tensor
    mae: Tensor
    kl: Tensor
    old_mse: Tensor
    old_mae: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the samples that count; 0 when none does."""
        return self.sum(values) / self.active.sum().clamp(min=1)

    def sum(self, values: Tensor) -> Tensor:
        return torch.where(self.active, values, 0.0).sum()

    def std(self, values: Tensor) -> Tensor:
        return self.mean((values - self.mean(values)).square()).sqrt()


class _GroupMeans(NamedTuple):
    """Means of each sample's group in one direction of centering, (B,) each."""

    reward: Tensor
    implicit: Tensor


def objective_dtype(mse: Tensor, old_mse: Tensor) -> torch.dtype:
    """float64 if the statistics of either model are, else float32."""
    return torch.promote_types(mse.dtype, old_mse.dtype)


def objective(inputs: ObjectiveInputs) -> Objective:
    """The loss with its slopes, written out: no autograd is involved."""
    samples = _samples(inputs)
    mapped = mapped_reward(samples.advantage, inputs.adv_clip)  # a, (B,)
    implicit, implicit_slope = _implicit_reward(samples, inputs)  # r and dr/dE, (B,)
    members = inputs.members
    if members is None:
        members = torch.stack((mapped, implicit, samples.active.to(mapped.dtype)))
    same = _same_group(inputs, members[2] != 0)  # (B, N)
    means = _group_means(same, members[0], members[1], inputs.temperature)
    policy, policy_slope = _policy_loss(implicit, mapped, means, inputs)
    policy = samples.weight * policy
    mse_slope = samples.weight * policy_slope * implicit_slope
    kl_slope = samples.weight * samples.kl_weight * _kappa(mapped, inputs)
    kl = torch.zeros_like(mapped) if inputs.kl_coef == 0 else kl_slope * samples.kl
    slopes = torch.stack(
        (torch.where(samples.active, mse_slope, 0.0), torch.where(samples.anchored, kl_slope, 0.0))
    )  # (2, B)
    if inputs.reduction == "none":
        parts = torch.where(samples.active, torch.stack((policy, kl)), 0.0)
    else:
        parts = torch.stack((samples.sum(policy), samples.sum(kl)))
    if inputs.reduction == "mean":
        count = samples.active.sum().clamp(min=1)
        parts, slopes = parts / count, slopes / count
    return Objective(
        loss=parts[0] + parts[1],
        parts=parts,
        samples=torch.stack((implicit, samples.kl, mapped)),
        slopes=slopes,
        metrics=_metrics(samples, mapped, implicit, policy, kl, same, means[0], inputs),
    )


def _samples(inputs: ObjectiveInputs) -> _Samples:
    dtype = objective_dtype(inputs.mse, inputs.old_mse)
    ones = torch.ones_like(inputs.mse, dtype=dtype)
    weight = ones if inputs.sample_weights is None else inputs.sample_weights.to(dtype)
    kl_weight = ones if inputs.kl_weights is None else inputs.kl_weights.to(dtype)
    active = weight != 0
    anchored = active & (kl_weight != 0)

    def harmless(values: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, values.to(dtype), 0.0)

    return _Samples(
        active=active,
        anchored=anchored,
        weight=weight,
        kl_weight=kl_weight,
        advantage=harmless(inputs.advantages, active),
        mse=harmless(inputs.mse, active),
        mae=harmless(inputs.mae, active),
        kl=harmless(inputs.kl, anchored),
        old_mse=harmless(inputs.old_mse, active),
        old_mae=harmless(inputs.old_mae, active),
    )


def mapped_reward(advantages: Tensor, clip: float) -> Tensor:
    """a in [0, 1]; an advantage of 0 maps to 1/2."""
    return (advantages.clamp(-clip, clip) / (2.0 * clip) + 0.5).clamp(0.0, 1.0)


def _implicit_reward(samples: _Samples, inputs: ObjectiveInputs) -> tuple[Tensor, Tensor]:
    """r = -(rho_theta - rho_old), how much better than the old snapshot the model predicts the velocity; dr/dE."""
    if not inputs.adaptive_weight:
        return samples.old_mse - samples.mse, -torch.ones_like(samples.mse)
    divisor = samples.mae.clamp(min=MAE_FLOOR)
    return samples.old_mse / samples.old_mae.clamp(min=MAE_FLOOR) - samples.mse / divisor, -1.0 / divisor


def _policy_loss(
    implicit: Tensor, mapped: Tensor, means: list[_GroupMeans], inputs: ObjectiveInputs
) -> tuple[Tensor, Tensor]:
    """(B,) loss, averaged over the directions of centering, times adv_clip / beta; and its slope in r."""
    total, slope = torch.zeros_like(implicit), torch.zeros_like(implicit)
    for mean in means:
        estimate, wanted = inputs.beta * (implicit - mean.implicit), mapped - mean.reward
        if inputs.loss_type == "mse":
            total = total + (estimate - wanted).square()
            slope = slope + 2.0 * inputs.beta * (estimate - wanted)
        else:
            target = wanted.sigmoid()
            total = total + F.binary_cross_entropy_with_logits(estimate, target, reduction="none")
            slope = slope + inputs.beta * (estimate.sigmoid() - target)
    scale = inputs.adv_clip / (inputs.beta * len(means))
    return scale * total, scale * slope


def _kappa(mapped: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """(B,) lambda kappa; exactly zero when lambda is 0."""
    if inputs.kl_coef == 0:
        return torch.zeros_like(mapped)
    if not inputs.adaptive_kl:
        return torch.full_like(mapped, inputs.kl_coef)
    floor = KL_FLOOR / inputs.kl_coef
    return inputs.kl_coef * (floor + mapped * (1.0 - floor))


def _same_group(inputs: ObjectiveInputs, active: Tensor) -> Tensor:
    """(B, N) bool: which active members belong to the group of each sample."""
    batch, own = inputs.mse.shape[0], inputs.group_ids
    theirs = own if inputs.member_ids is None else inputs.member_ids
    if theirs is None:
        return active[None, :].expand(batch, -1)
    if own is None:
        own = torch.zeros(batch, dtype=torch.int64, device=theirs.device)
    return (own[:, None] == theirs[None, :]) & active[None, :]


def _group_means(same: Tensor, reward: Tensor, implicit: Tensor, temperature: float) -> list[_GroupMeans]:
    """Means under the centering weights p: one direction for temperature inf, else two.

    inf: p = 1/|G|. Finite: p = softmax(a / temperature) and softmax(-a / temperature). 0: uniform over the
    group's members with a > 1/2, and over those with a < 1/2; a side without members falls back to the whole
    group. The group includes the sample itself.
    """
    reward = torch.where(same, reward, 0.0)  # (B, N); a NaN of one group stays in that group
    implicit = torch.where(same, implicit, 0.0)
    if math.isinf(temperature):
        weights = [_uniform(same, reward.dtype)]
    elif temperature == 0:
        weights = [_uniform_or(same & side, same, reward.dtype) for side in (reward > 0.5, reward < 0.5)]
    else:
        weights = [_softmax(sign * reward / temperature, same) for sign in (1.0, -1.0)]
    return [_GroupMeans((p * reward).sum(1), (p * implicit).sum(1)) for p in weights]


def _uniform(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N) weights 1/n over the n chosen of each row; zeros where nothing is chosen."""
    return chosen.to(dtype) / chosen.sum(1, keepdim=True).clamp(min=1)


def _uniform_or(chosen: Tensor, everyone: Tensor, dtype: torch.dtype) -> Tensor:
    return _uniform(torch.where(chosen.any(1, keepdim=True), chosen, everyone), dtype)


def _softmax(logits: Tensor, same: Tensor) -> Tensor:
    lowest = torch.finfo(logits.dtype).min  # not -inf: a row without members would become NaN
    return torch.where(same, torch.where(same, logits, lowest).softmax(1), 0.0)


def _metrics(
    samples: _Samples,
    mapped: Tensor,
    implicit: Tensor,
    policy: Tensor,
    kl: Tensor,
    same: Tensor,
    first: _GroupMeans,
    inputs: ObjectiveInputs,
) -> Tensor:
    """(16,), means over the samples that count, whatever the reduction."""
    policy_loss, kl_loss = samples.mean(policy), samples.mean(kl)
    alone = samples.active & (same.sum(1) == 1)
    values = {
        "loss": policy_loss + kl_loss,
        "policy_loss": policy_loss,
        "kl_loss": kl_loss,
        "kl": samples.mean(samples.kl_weight * samples.kl),
        "implicit_reward_mean": samples.mean(implicit),
        "implicit_reward_std": samples.std(implicit),
        "implicit_reward_centered_std": samples.std(implicit - first.implicit),
        "reward_mapped_mean": samples.mean(mapped),
        "reward_mapped_std": samples.std(mapped),
        "advantage_clip_fraction": samples.mean((samples.advantage.abs() > inputs.adv_clip).to(mapped.dtype)),
        "singleton_groups": alone.sum(),
        "samples": samples.active.sum(),
        "theta_mse": samples.mean(samples.mse),
        "theta_mae": samples.mean(samples.mae),
        "old_mse": samples.mean(samples.old_mse),
        "old_mae": samples.mean(samples.old_mae),
    }
    return torch.stack([values[name].to(mapped.dtype) for name in METRICS])
