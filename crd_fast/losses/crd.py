"""The CRD loss: the centered implicit reward regressed onto the centered external reward, plus a KL anchor.

Source: "Diffusion Reinforcement Learning via Centered Reward Distillation" (arXiv 2603.14128). The latents
enter through the residual statistics E, M and K of each sample only; the rest, `crd_fast.reference_objective` and its
compiled counterparts, is mathematics on (B,) vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from crd_fast import checks, ops
from crd_fast.forward_process import Noised, ResidualStats, residual_inputs
from crd_fast.losses.centering import GroupMembers, gather
from crd_fast.losses.config import CRDConfig
from crd_fast.reference_objective import METRICS, ObjectiveInputs, mapped_reward, objective_dtype

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
    members: GroupMembers | None = None,
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
            f_theta with as many dimensions. Means run over valid elements. A sample without any has residual 0 and
            still counts in its group: give padding samples weight 0.
        sample_weights: (B,), finite, >= 0; multiply both terms. Samples of weight 0 leave every mean, group
            means and divisors included, as if they were not in the batch, and may hold NaN.
        kl_weights: (B,), finite, >= 0; multiply the KL term only: inverse-probability weights when the anchor
            is evaluated for a random share of the samples. Where 0, the rows of ref are ignored.
        members: all samples of the groups in this batch, its own included, where the rest of them is in other calls, as
            when gradients are accumulated: see `group_members`. None: the groups are whole.
        process_group: data-parallel group whose ranks center together; groups may be spread over it, and
            every rank holds the same B. The reduction below stays local, as data parallelism averages it.
        config: `CRDConfig`. Its centering="batch" makes everything one group whatever group_ids says.

    Returns:
        `CRDOutput`. Reduction "mean" divides by the number of samples of weight > 0; nothing else is scaled.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, the batch is empty, a reference is needed
            and missing, or advantages or weights are not finite (looked at on CPU, elsewhere with CRD_FAST_CHECKS=1).
            Predictions are not looked at: NaN in one is NaN in the loss.
        ExtensionMissingError: see `crd_fast.ops`.
    """
    _check_config(config)
    checks.require_latents("f_theta", f_theta)
    _check_reference(ref, ref_uncond, guidance_scale, config)
    inputs = residual_inputs(
        "f_theta",
        f_theta,
        target,
        mask,
        config.prediction,
        ref=ref,
        ref_uncond=ref_uncond,
        guidance_scale=guidance_scale,
        old=_old_prediction(old, f_theta),
    )
    kept = _old_stats(old, f_theta) if isinstance(old, ResidualStats) else None
    _check_samples(f_theta, advantages, group_ids, sample_weights, kl_weights)
    _check_members(members, advantages, group_ids, sample_weights, process_group)

    def between(statistics: Sequence[Tensor]) -> ObjectiveInputs:
        mse, mae, kl, old_mse, old_mae = statistics
        given = ObjectiveInputs(
            mse=mse,
            mae=mae,
            kl=kl,
            old_mse=old_mse if kept is None else kept.mse,
            old_mae=old_mae if kept is None else kept.mae,
            advantages=_plain(advantages),
            group_ids=None if config.centering == "batch" else group_ids,
            sample_weights=None if sample_weights is None else _plain(sample_weights),
            kl_weights=None if kl_weights is None else _plain(kl_weights),
            member_ids=None,
            members=None,
            beta=float(config.beta),
            kl_coef=float(config.kl_coef),
            adv_clip=float(config.adv_clip),
            adaptive_weight=config.adaptive_weight,
            adaptive_kl=config.adaptive_kl,
            temperature=float(config.temperature),
            loss_type=config.loss_type,
            reduction=config.reduction,
        )
        if members is not None:
            return _with_members(given, members)
        return given if process_group is None else _with_other_ranks(given, process_group)

    with _without_autocast(f_theta.device.type):
        value, parts, samples, _, metrics = ops.objective_of_predictions(inputs, between)
        policy_loss, kl_loss = parts.unbind()
        implicit_reward, kl, _ = samples.unbind()
        return CRDOutput(
            loss=value,
            policy_loss=policy_loss,
            kl_loss=kl_loss,
            implicit_reward=implicit_reward,
            kl=kl,
            metrics=dict(zip(METRICS, metrics.unbind(), strict=True)),
        )


class CRDLoss(nn.Module):
    """`loss` with its configuration bound, for trainers that hold losses as modules; raises the same."""

    def __init__(self, config: CRDConfig = DEFAULT_CONFIG) -> None:
        super().__init__()
        _check_config(config)
        self.config = config

    def forward(self, f_theta: Tensor, target: Noised | Tensor, **inputs: Any) -> CRDOutput:
        """`crd_fast.loss(f_theta, target, **inputs, config=self.config)`."""
        return loss(f_theta, target, **inputs, config=self.config)

    def extra_repr(self) -> str:
        return repr(self.config)


# --- inputs -----------------------------------------------------------------------------------------------


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    # Leaving out what changes nothing: entering a region costs as much as a small operation.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return nullcontext()


def _check_config(config: CRDConfig) -> None:
    if not isinstance(config, CRDConfig):
        raise ValueError(f"config: expected a CRDConfig, such as CRDConfig(beta=...), got {config!r}")


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


def _check_samples(
    f_theta: Tensor,
    advantages: Tensor,
    group_ids: Tensor | None,
    sample_weights: Tensor | None,
    kl_weights: Tensor | None,
) -> None:
    batch, device = f_theta.shape[0], f_theta.device
    checks.require_per_sample("advantages", advantages, batch, device)
    if group_ids is not None:
        checks.require_per_sample("group_ids", group_ids, batch, device, dtypes=(torch.int64,))
    for name, weights in (("sample_weights", sample_weights), ("kl_weights", kl_weights)):
        if weights is not None:
            checks.require_per_sample(name, weights, batch, device)
            checks.require_weights(name, weights)
    checks.require_finite("advantages", advantages, where=None if sample_weights is None else sample_weights != 0)


def _with_members(given: ObjectiveInputs, members: GroupMembers) -> ObjectiveInputs:
    dtype = objective_dtype(given.mse, given.old_mse)
    mapped = mapped_reward(_plain(members.advantages).to(dtype), given.adv_clip)
    rows = torch.stack((mapped, _plain(members.implicit_reward).to(dtype), members.counted().to(dtype)))
    ids = members.group_ids
    if given.group_ids is None or ids is None:
        ids = torch.zeros(len(members), dtype=torch.int64, device=rows.device)
    return given._replace(member_ids=ids, members=rows)


@torch.no_grad()
def _with_other_ranks(given: ObjectiveInputs, process_group: dist.ProcessGroup) -> ObjectiveInputs:
    """With the rewards of every rank's samples, to the bit as the objective will compute them for its own."""
    mse = given.mse
    _, _, (implicit, _, mapped), _, _ = ops.objective(*given)
    active = torch.ones_like(mapped) if given.sample_weights is None else (given.sample_weights != 0).to(mapped.dtype)
    ids = given.group_ids
    if ids is None:
        ids = torch.zeros(mse.shape[0], dtype=torch.int64, device=mse.device)
    member_ids, members = gather(ids, torch.stack((mapped, implicit, active)), process_group)
    return given._replace(member_ids=member_ids, members=members)


def _check_members(
    members: GroupMembers | None,
    advantages: Tensor,
    group_ids: Tensor | None,
    sample_weights: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> None:
    if members is None:
        return
    if not isinstance(members, GroupMembers):
        raise ValueError(f"members: expected GroupMembers, as group_members gives them, got {type(members).__name__}")
    if process_group is not None:
        raise ValueError(
            "process_group: expected None with members; give it to group_members, which gathers every rank's samples"
        )
    if (members.group_ids is None) != (group_ids is None):
        raise ValueError(
            f"members: expected group_ids {'in neither' if group_ids is None else 'in both'}, the members have "
            f"{'none' if members.group_ids is None else 'them'} and the batch has "
            f"{'none' if group_ids is None else 'them'}"
        )
    count, device = len(members), advantages.device
    checks.require_per_sample("members.advantages", members.advantages, count, device)
    checks.require_per_sample("members.implicit_reward", members.implicit_reward, count, device)
    if members.group_ids is not None:
        checks.require_per_sample("members.group_ids", members.group_ids, count, device, dtypes=(torch.int64,))
    if members.active is not None:
        checks.require_per_sample("members.active", members.active, count, device, dtypes=(torch.bool,))
    if checks.values_are_checked(device):
        _require_own(members, group_ids, advantages, sample_weights)


def _require_own(
    members: GroupMembers, group_ids: Tensor | None, advantages: Tensor, sample_weights: Tensor | None
) -> None:
    """A group's mean includes the sample itself."""
    counts = torch.ones_like(advantages, dtype=torch.bool) if sample_weights is None else sample_weights != 0
    if group_ids is None or members.group_ids is None:
        own, theirs = counts.sum(), members.counted().sum()
    else:
        own = ((group_ids[:, None] == group_ids) & counts).sum(1)[counts]
        theirs = ((group_ids[:, None] == members.group_ids) & members.counted()).sum(1)[counts]
    if bool((theirs < own).any()):
        raise ValueError(
            f"members: expected all samples of the groups in this batch, its own {int(counts.sum())} included, got "
            f"{len(members)} that do not hold them; put the group_members of every part together, this one's too"
        )


def _plain(vector: Tensor) -> Tensor:
    """Without a graph, and without the lazy negation that `.imag` of a conjugate has: kernels read memory."""
    return vector.detach().resolve_neg()


def _old_prediction(old: ResidualStats | Tensor, f_theta: Tensor) -> Tensor | None:
    if isinstance(old, ResidualStats):
        return None
    if not isinstance(old, Tensor):
        raise ValueError(
            f"old: expected ResidualStats or a prediction of shape {tuple(f_theta.shape)}, got {type(old).__name__}"
        )
    return old


def _old_stats(old: ResidualStats, f_theta: Tensor) -> ResidualStats:
    """float32 or float64 statistics of the old prediction."""
    batch, device = f_theta.shape[0], f_theta.device
    checks.require_per_sample("old.mse", old.mse, batch, device)
    checks.require_per_sample("old.mae", old.mae, batch, device)
    dtype = torch.float64 if old.mse.dtype == torch.float64 else torch.float32
    return ResidualStats(_plain(old.mse).to(dtype), _plain(old.mae).to(dtype))
