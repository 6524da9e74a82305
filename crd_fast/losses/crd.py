"""The CRD loss: the centered implicit reward regressed onto the centered external reward, plus a KL anchor.

Source: "Diffusion Reinforcement Learning via Centered Reward Distillation" (arXiv 2603.14128). The latents
enter through the residual statistics E, M and K of each sample only; everything in this file is mathematics
on (B,) vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from crd_fast import checks, ops
from crd_fast.forward_process import Noised, ResidualStats, residual_inputs, residual_stats
from crd_fast.losses import centering
from crd_fast.losses.config import CRDConfig
from crd_fast.reference import ResidualInputs

MAE_FLOOR = 1e-5
"""The adaptive weight divides by at least this mean absolute error."""

KL_FLOOR = 1e-4
"""Adaptive KL weighs a sample by kappa = m + a (1 - m), m = KL_FLOOR / lambda: at a = 0, lambda m is left."""

DEFAULT_CONFIG = CRDConfig()


@dataclass(frozen=True)
class CRDOutput:
    """What `loss` returns.

    loss = policy_loss + kl_loss: scalars, or (B,) for reduction "none"; only `loss` carries the graph.
    implicit_reward (B,) = r and kl (B,) = K, detached; both 0 for samples that are left out, and K also where
    kl_weights is 0 or there is no reference.
    metrics: name -> detached scalar on the device, made without synchronisation; means run over the samples
    that count, whatever the reduction.
    """

    loss: Tensor
    policy_loss: Tensor
    kl_loss: Tensor
    implicit_reward: Tensor
    kl: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class _Samples:
    """Checked (B,) vectors in the dtype of the mathematics, with left-out samples made harmless.

    A left-out sample may hold anything, NaN included, and NaN times zero is NaN in the backward pass; so its
    values are replaced *before* they are used, not masked after.
    """

    active: Tensor  # bool, sample_weights != 0
    anchored: Tensor  # bool, active and kl_weights != 0
    weight: Tensor  # sample_weights
    kl_weight: Tensor
    advantage: Tensor
    theta_mse: Tensor  # E of f_theta, with graph
    theta_mae: Tensor
    kl: Tensor  # K, with graph
    old_mse: Tensor
    old_mae: Tensor
    group_ids: Tensor  # int64

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the samples that count; 0 when none does."""
        return torch.where(self.active, values, 0.0).sum() / self.active.sum().clamp(min=1)


def loss(
    f_theta: Tensor,
    target: Noised | Tensor,
    *,
    old: ResidualStats | Tensor,
    advantages: Tensor,
    group_ids: Tensor | None = None,
    ref: Tensor | None = None,
    ref_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    config: CRDConfig = DEFAULT_CONFIG,
) -> CRDOutput:
    """The CRD loss of a batch of predictions, a pure function of them (arXiv 2603.14128).

    With kl_coef=0 and one group the defaults equal::

        rho = lambda f: (f - y).square().mean(dims) / (f - y).abs().mean(dims).detach().clamp(min=1e-5)
        r, a = rho(f_old) - rho(f_theta), advantages.clamp(-5, 5) / 10 + 0.5
        loss = 5 * (r - r.detach().mean() - (a - a.mean())).square().mean()

    Args:
        f_theta: (B, *latent) prediction of the trained model, any float dtype and layout. Gradients flow to
            it alone.
        target: the `Noised` the prediction was made from, or the velocity y = eps - x0 like f_theta.
        old: `ResidualStats` of the old snapshot's prediction (same target and mask), or that prediction.
        advantages: (B,) group advantages, any float dtype.
        group_ids: (B,) int64, any values; samples that are centered together share one. None is one group.
            When timesteps share a batch, each (prompt, timestep) has its own id: the size of a residual
            depends on the timestep.
        ref, ref_uncond, guidance_scale: (B, *latent) conditional c and unconditional u prediction of the
            frozen reference; the anchor is u + guidance_scale (c - u). Without ref_uncond it is ref, and
            guidance_scale must be 1.
        mask: bool, True where valid: (B, tokens) for (B, tokens, channels) latents, else broadcastable to
            f_theta with as many dimensions. Means run over valid elements.
        sample_weights: (B,), finite, >= 0; multiply both terms. Samples of weight 0 leave every mean, group
            means and divisors included, as if they were not in the batch, and may hold NaN.
        kl_weights: (B,), finite, >= 0; multiply the KL term only: inverse-probability weights when the anchor
            is evaluated for a random share of the samples. Where 0, the rows of ref are ignored.
        process_group: data-parallel group whose ranks center together; groups may be spread over it, and
            every rank holds the same B. The reduction below stays local, as data parallelism averages it.
        config: `CRDConfig`. Its centering="batch" makes everything one group whatever group_ids says.

    Returns:
        `CRDOutput`. Reduction "mean" divides by the number of samples of weight > 0; nothing else is scaled.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, the batch is empty, a reference is needed
            and missing, or values are not finite (looked at on CPU, elsewhere with CRD_FAST_CHECKS=1).
        ExtensionMissingError: see `crd_fast.ops`.
    """
    checks.require_latents("f_theta", f_theta)
    _check_reference(ref, ref_uncond, guidance_scale, config)
    with torch.autocast(device_type=f_theta.device.type, enabled=False):
        inputs = residual_inputs(
            "f_theta",
            f_theta,
            target,
            mask,
            config.prediction,
            ref=ref,
            ref_uncond=ref_uncond,
            guidance_scale=guidance_scale,
        )
        old = _old_stats(old, f_theta, target, mask, config)
        samples = _samples(inputs, old, advantages, group_ids, sample_weights, kl_weights, config)
        mapped = _mapped_reward(samples.advantage, config.adv_clip)  # a, (B,)
        implicit = _implicit_reward(samples, config)  # r, (B,)
        members = centering.Members(samples.group_ids, mapped, implicit.detach(), samples.active)
        if process_group is not None:
            members = centering.gather(members, process_group)
        same = centering.same_group(samples.group_ids, members)  # (B, N)
        means = centering.group_means(same, members, config.temperature)
        policy = samples.weight * _policy_loss(implicit, mapped, means, config)  # (B,)
        kl = samples.weight * _kl_loss(samples, mapped, config)  # (B,)
        policy_loss, kl_loss = (_reduce(samples, term, config.reduction) for term in (policy, kl))
        return CRDOutput(
            loss=policy_loss + kl_loss,
            policy_loss=policy_loss.detach(),
            kl_loss=kl_loss.detach(),
            implicit_reward=implicit.detach(),
            kl=samples.kl.detach(),
            metrics=_metrics(samples, mapped, implicit, policy, kl, same, means, config),
        )


class CRDLoss(nn.Module):
    """`loss` with its configuration bound, for trainers that hold losses as modules; raises the same."""

    def __init__(self, config: CRDConfig = DEFAULT_CONFIG) -> None:
        super().__init__()
        self.config = config

    def forward(self, f_theta: Tensor, target: Noised | Tensor, **inputs: Any) -> CRDOutput:
        """`crd_fast.loss(f_theta, target, **inputs, config=self.config)`."""
        return loss(f_theta, target, **inputs, config=self.config)

    def extra_repr(self) -> str:
        return repr(self.config)


# --- inputs -----------------------------------------------------------------------------------------------


def _check_reference(ref: Tensor | None, ref_uncond: Tensor | None, guidance_scale: float, config: CRDConfig) -> None:
    checks.require_finite_number("guidance_scale", guidance_scale)
    if ref is None and config.kl_coef > 0:
        raise ValueError(
            f"ref: expected the reference model's prediction because kl_coef={config.kl_coef}, got None; "
            "pass ref, or CRDConfig(kl_coef=0) to train without the anchor"
        )
    if ref is None and ref_uncond is not None:
        raise ValueError("ref_uncond: expected None without ref; pass the conditional prediction as ref")
    if ref_uncond is None and guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale: expected 1.0 without ref_uncond, got {guidance_scale}; pass ref_uncond, or "
            "leave the scale at 1.0 when ref already is the guided prediction"
        )


def _samples(
    inputs: ResidualInputs,
    old: ResidualStats,
    advantages: Tensor,
    group_ids: Tensor | None,
    sample_weights: Tensor | None,
    kl_weights: Tensor | None,
    config: CRDConfig,
) -> _Samples:
    batch, device = inputs.predicted.shape[0], inputs.predicted.device
    checks.require_per_sample("advantages", advantages, batch, device)
    if group_ids is None:
        group_ids = torch.zeros(batch, dtype=torch.int64, device=device)
    checks.require_per_sample("group_ids", group_ids, batch, device, dtypes=(torch.int64,))
    if config.centering == "batch":
        group_ids = torch.zeros_like(group_ids)
    weight = _weights("sample_weights", sample_weights, batch, device)
    kl_weight = _weights("kl_weights", kl_weights, batch, device)
    active = weight != 0
    checks.require_finite("advantages", advantages, where=active)

    mse, mae, kl = ops.residual_stats(*inputs)
    dtype = torch.promote_types(mse.dtype, old.mse.dtype)
    anchored = active & (kl_weight != 0)

    def harmless(values: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, values.to(dtype), 0.0)

    return _Samples(
        active=active,
        anchored=anchored,
        weight=weight.to(dtype),
        kl_weight=kl_weight.to(dtype),
        advantage=harmless(advantages.detach(), active),
        theta_mse=harmless(mse, active),
        theta_mae=harmless(mae, active),
        kl=harmless(kl, anchored),
        old_mse=harmless(old.mse.detach(), active),
        old_mae=harmless(old.mae.detach(), active),
        group_ids=group_ids,
    )


def _old_stats(
    old: ResidualStats | Tensor,
    f_theta: Tensor,
    target: Noised | Tensor,
    mask: Tensor | None,
    config: CRDConfig,
) -> ResidualStats:
    """float32 or float64 statistics of the old prediction."""
    batch, device = f_theta.shape[0], f_theta.device
    if isinstance(old, ResidualStats):
        checks.require_per_sample("old.mse", old.mse, batch, device)
        checks.require_per_sample("old.mae", old.mae, batch, device)
        dtype = torch.float64 if old.mse.dtype == torch.float64 else torch.float32
        return ResidualStats(old.mse.to(dtype), old.mae.to(dtype))
    if not isinstance(old, Tensor):
        raise ValueError(
            f"old: expected ResidualStats or a prediction of shape {tuple(f_theta.shape)}, got {type(old).__name__}"
        )
    checks.require_like("old", old, "f_theta", f_theta)
    return residual_stats(old.detach(), target, mask=mask, prediction=config.prediction)


def _weights(name: str, weights: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if weights is None:
        return torch.ones(batch, device=device)
    checks.require_per_sample(name, weights, batch, device)
    checks.require_weights(name, weights)
    return weights.detach()


# --- the objective ----------------------------------------------------------------------------------------


def _mapped_reward(advantages: Tensor, clip: float) -> Tensor:
    """a in [0, 1]; an advantage of 0 maps to 1/2."""
    return (advantages.clamp(-clip, clip) / (2.0 * clip) + 0.5).clamp(0.0, 1.0)


def _implicit_reward(samples: _Samples, config: CRDConfig) -> Tensor:
    """r = -(rho_theta - rho_old): how much better than the old snapshot the model predicts the velocity."""
    if not config.adaptive_weight:
        return samples.old_mse - samples.theta_mse
    theta = samples.theta_mse / samples.theta_mae.detach().clamp(min=MAE_FLOOR)
    return samples.old_mse / samples.old_mae.clamp(min=MAE_FLOOR) - theta


def _policy_loss(implicit: Tensor, mapped: Tensor, means: list[centering.GroupMeans], config: CRDConfig) -> Tensor:
    """(B,) loss, averaged over the directions of centering, times adv_clip / beta."""
    total = torch.zeros_like(implicit)
    for mean in means:
        estimate, wanted = config.beta * (implicit - mean.implicit), mapped - mean.reward
        if config.loss_type == "mse":
            total = total + (estimate - wanted).square()
        else:
            total = total + F.binary_cross_entropy_with_logits(estimate, wanted.sigmoid(), reduction="none")
    return total * (config.adv_clip / (config.beta * len(means)))


def _kl_loss(samples: _Samples, mapped: Tensor, config: CRDConfig) -> Tensor:
    """(B,) lambda kappa K; exactly zero, without a graph, when lambda is 0."""
    if config.kl_coef == 0:
        return torch.zeros_like(mapped)
    weighted = config.kl_coef * samples.kl_weight * samples.kl
    if not config.adaptive_kl:
        return weighted
    floor = KL_FLOOR / config.kl_coef
    return weighted * (floor + mapped * (1.0 - floor))


def _reduce(samples: _Samples, values: Tensor, reduction: str) -> Tensor:
    """`values` (B,) carry the sample weight already; left-out samples contribute zero."""
    if reduction == "mean":
        return samples.mean(values)
    kept = torch.where(samples.active, values, 0.0)
    return kept.sum() if reduction == "sum" else kept


@torch.no_grad()
def _metrics(
    samples: _Samples,
    mapped: Tensor,
    implicit: Tensor,
    policy: Tensor,
    kl: Tensor,
    same: Tensor,
    means: list[centering.GroupMeans],
    config: CRDConfig,
) -> dict[str, Tensor]:
    def std(values: Tensor) -> Tensor:
        return samples.mean((values - samples.mean(values)).square()).sqrt()

    policy_loss, kl_loss = samples.mean(policy), samples.mean(kl)
    alone = samples.active & (same.sum(1) == 1)
    return {
        "loss": policy_loss + kl_loss,
        "policy_loss": policy_loss,
        "kl_loss": kl_loss,
        "kl": samples.mean(samples.kl_weight * samples.kl),
        "implicit_reward_mean": samples.mean(implicit),
        "implicit_reward_std": std(implicit),
        "implicit_reward_centered_std": std(implicit - means[0].implicit),
        "reward_mapped_mean": samples.mean(mapped),
        "reward_mapped_std": std(mapped),
        "advantage_clip_fraction": samples.mean((samples.advantage.abs() > config.adv_clip).to(mapped.dtype)),
        "singleton_groups": alone.sum(),
        "samples": samples.active.sum(),
        "theta_mse": samples.mean(samples.theta_mse),
        "theta_mae": samples.mean(samples.theta_mae),
        "old_mse": samples.mean(samples.old_mse),
        "old_mae": samples.mean(samples.old_mae),
    }
