"""The CRD objective between statistics and loss, in two launches: per-sample losses and slopes, then their totals.

The formulas are those of `crd_fast/reference_objective.py`, in fp32. Every sum runs in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .configs import ROUNDING

MAE_FLOOR = tl.constexpr(1e-5)
KL_FLOOR = tl.constexpr(1e-4)
NONE, SUM, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
UNIFORM, SOFTMAX, HARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
METRICS = 16
ROWS, BLOCK = 16, 64  # samples of a program, members it looks at together


@triton.jit
def _mapped(advantage, clip):
    """a in [0, 1]; NaN stays NaN."""
    clipped = tl.where(advantage > clip, clip, tl.where(advantage < -clip, -clip, advantage))
    return clipped / (2.0 * clip) + 0.5


@triton.jit
def _divisor(mae, ADAPTIVE: tl.constexpr):
    divisor = tl.full(mae.shape, 1.0, tl.float32)
    if ADAPTIVE:
        divisor = tl.where(mae < MAE_FLOOR, MAE_FLOOR, mae)
    return divisor


@triton.jit
def _vector(pointer, i, m, GIVEN: tl.constexpr):
    """(n,) fp32: weights, 1 where none are given."""
    values = tl.full(i.shape, 1.0, tl.float32)
    if GIVEN:
        values = tl.load(pointer + i, mask=m, other=0.0).to(tl.float32)
    return values


@triton.jit
def _reward(
    p_mse, p_mae, p_old_mse, p_old_mae, p_advantages, p_weights, i, m, clip,
    WEIGHTED: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """Whether samples i count, their mapped and implicit reward and its slope in E. What is left out is not read."""
    weight = _vector(p_weights, i, m, WEIGHTED)
    active = m & (weight != 0.0)
    mse = tl.load(p_mse + i, mask=active, other=0.0)
    divisor = _divisor(tl.load(p_mae + i, mask=active, other=0.0), ADAPTIVE)
    old_mse = tl.load(p_old_mse + i, mask=active, other=0.0)
    old_divisor = _divisor(tl.load(p_old_mae + i, mask=active, other=0.0), ADAPTIVE)
    reward = _mapped(tl.load(p_advantages + i, mask=active, other=0.0).to(tl.float32), clip)
    return active, reward, old_mse / old_divisor - mse / divisor, -1.0 / divisor


@triton.jit
def _member(
    p_mse, p_mae, p_old_mse, p_old_mae, p_advantages, p_weights, p_group_ids, p_member_ids, p_members, j, members, clip,
    GROUPED: tl.constexpr, GATHERED: tl.constexpr, WEIGHTED: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """Whether members j count, their group, mapped and implicit reward."""
    m = j < members
    ids = tl.zeros(j.shape, tl.int64)
    if GATHERED:
        ids = tl.load(p_member_ids + j, mask=m, other=0)
        active = tl.load(p_members + 2 * members + j, mask=m, other=0.0) != 0.0
        reward = tl.load(p_members + j, mask=active, other=0.0)
        implicit = tl.load(p_members + members + j, mask=active, other=0.0)
    else:
        if GROUPED:
            ids = tl.load(p_group_ids + j, mask=m, other=0)
        active, reward, implicit, _ = _reward(
            p_mse, p_mae, p_old_mse, p_old_mae, p_advantages, p_weights, j, m, clip, WEIGHTED, ADAPTIVE
        )
    return active, ids, reward, implicit


@triton.jit
def _direction_loss(implicit, reward, mean_implicit, mean_reward, beta, BCE: tl.constexpr):
    """(n,) loss of one direction of centering, and its slope in the implicit reward."""
    estimate = beta * (implicit - mean_implicit)
    wanted = reward - mean_reward
    if BCE:
        target = 1.0 / (1.0 + tl.exp(-wanted))
        magnitude = tl.abs(estimate)
        loss = tl.where(estimate < 0.0, 0.0, estimate) - estimate * target + tl.log(1.0 + tl.exp(-magnitude))
        slope = beta * (1.0 / (1.0 + tl.exp(-estimate)) - target)
    else:
        loss = (estimate - wanted) * (estimate - wanted)
        slope = 2.0 * beta * (estimate - wanted)
    return loss, slope


@triton.jit
def samples_kernel(
    p_mse,  # (B,) float32, as mae, kl, old_mse, old_mae
    p_mae,
    p_kl,
    p_old_mse,
    p_old_mae,
    p_advantages,  # (B,) any float dtype, as both weights
    p_group_ids,  # (B,) int64; unused without GROUPED
    p_weights,  # unused without WEIGHTED
    p_kl_weights,  # unused without KL_WEIGHTED
    p_member_ids,  # (N,) int64; unused without GATHERED
    p_members,  # (3, N) float32; unused without GATHERED
    p_loss,  # (B,), written for NONE alone
    p_parts,  # (2, B), written for NONE alone
    p_samples,  # (3, B): implicit reward, K, mapped reward
    p_slopes,  # (2, B)
    p_terms,  # (4, B): policy loss, KL loss, centered implicit reward, 1 for a group of one
    batch,
    members,
    beta,
    kl_coef,
    clip,
    inverse_temperature,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    GATHERED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ADAPTIVE_KL: tl.constexpr,
    ANCHORED: tl.constexpr,
    CENTERING: tl.constexpr,
    BCE: tl.constexpr,
    REDUCTION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = i < batch
    active, reward, implicit, implicit_slope = _reward(
        p_mse, p_mae, p_old_mse, p_old_mae, p_advantages, p_weights, i, m, clip, WEIGHTED, ADAPTIVE
    )
    weight = _vector(p_weights, i, m, WEIGHTED)
    ids = tl.zeros([ROWS], tl.int64)
    if GROUPED:
        ids = tl.load(p_group_ids + i, mask=m, other=0)

    # Sums over a group: everyone, and its two sides for hard centering.
    size = tl.zeros([ROWS], tl.float32)
    sum_reward = tl.zeros([ROWS], tl.float32)
    sum_implicit = tl.zeros([ROWS], tl.float32)
    size_above = tl.zeros([ROWS], tl.float32)
    reward_above = tl.zeros([ROWS], tl.float32)
    implicit_above = tl.zeros([ROWS], tl.float32)
    size_below = tl.zeros([ROWS], tl.float32)
    reward_below = tl.zeros([ROWS], tl.float32)
    implicit_below = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    lowest = tl.full([ROWS], float("inf"), tl.float32)
    for start in range(0, members, BLOCK):
        j = start + tl.arange(0, BLOCK)
        active_j, ids_j, reward_j, implicit_j = _member(
            p_mse, p_mae, p_old_mse, p_old_mae, p_advantages, p_weights, p_group_ids, p_member_ids, p_members, j,
            members, clip, GROUPED, GATHERED, WEIGHTED, ADAPTIVE,
        )  # fmt: skip
        same = (ids[:, None] == ids_j[None, :]) & active_j[None, :]
        rewards = tl.where(same, reward_j[None, :], 0.0)
        implicits = tl.where(same, implicit_j[None, :], 0.0)
        size += tl.sum(same.to(tl.float32), axis=1)
        sum_reward += tl.sum(rewards, axis=1)
        sum_implicit += tl.sum(implicits, axis=1)
        if CENTERING == HARD:
            above = same & (reward_j[None, :] > 0.5)
            below = same & (reward_j[None, :] < 0.5)
            size_above += tl.sum(above.to(tl.float32), axis=1)
            reward_above += tl.sum(tl.where(above, rewards, 0.0), axis=1)
            implicit_above += tl.sum(tl.where(above, implicits, 0.0), axis=1)
            size_below += tl.sum(below.to(tl.float32), axis=1)
            reward_below += tl.sum(tl.where(below, rewards, 0.0), axis=1)
            implicit_below += tl.sum(tl.where(below, implicits, 0.0), axis=1)
        if CENTERING == SOFTMAX:
            highest = tl.maximum(highest, tl.max(tl.where(same, reward_j[None, :], -float("inf")), axis=1))
            lowest = tl.minimum(lowest, tl.min(tl.where(same, reward_j[None, :], float("inf")), axis=1))
    if CENTERING == SOFTMAX:
        for start in range(0, members, BLOCK):
            j = start + tl.arange(0, BLOCK)
            active_j, ids_j, reward_j, implicit_j = _member(
                p_mse, p_mae, p_old_mse, p_old_mae, p_advantages, p_weights, p_group_ids, p_member_ids, p_members, j,
                members, clip, GROUPED, GATHERED, WEIGHTED, ADAPTIVE,
            )  # fmt: skip
            same = (ids[:, None] == ids_j[None, :]) & active_j[None, :]
            rewards = tl.where(same, reward_j[None, :], 0.0)
            implicits = tl.where(same, implicit_j[None, :], 0.0)
            up = tl.where(same, tl.exp((rewards - highest[:, None]) * inverse_temperature), 0.0)
            down = tl.where(same, tl.exp((lowest[:, None] - rewards) * inverse_temperature), 0.0)
            size_above += tl.sum(up, axis=1)
            reward_above += tl.sum(up * rewards, axis=1)
            implicit_above += tl.sum(up * implicits, axis=1)
            size_below += tl.sum(down, axis=1)
            reward_below += tl.sum(down * rewards, axis=1)
            implicit_below += tl.sum(down * implicits, axis=1)

    everyone = tl.where(size == 0.0, 1.0, size)
    mean_reward = sum_reward / everyone
    mean_implicit = sum_implicit / everyone
    if CENTERING == UNIFORM:
        loss, slope = _direction_loss(implicit, reward, mean_implicit, mean_reward, beta, BCE)
        first_mean = mean_implicit
        directions = 1.0
    else:
        # a side without members falls back to the whole group
        above_size = tl.where(size_above == 0.0, 1.0, size_above)
        below_size = tl.where(size_below == 0.0, 1.0, size_below)
        first_mean = tl.where(size_above == 0.0, mean_implicit, implicit_above / above_size)
        first_reward = tl.where(size_above == 0.0, mean_reward, reward_above / above_size)
        second_mean = tl.where(size_below == 0.0, mean_implicit, implicit_below / below_size)
        second_reward = tl.where(size_below == 0.0, mean_reward, reward_below / below_size)
        loss, slope = _direction_loss(implicit, reward, first_mean, first_reward, beta, BCE)
        second_loss, second_slope = _direction_loss(implicit, reward, second_mean, second_reward, beta, BCE)
        loss += second_loss
        slope += second_slope
        directions = 2.0
    scale = weight * clip / (beta * directions)
    policy = tl.where(active, scale * loss, 0.0)
    mse_slope = tl.where(active, scale * slope * implicit_slope, 0.0)

    kl_weight = _vector(p_kl_weights, i, m, KL_WEIGHTED)
    kept = active & (kl_weight != 0.0)
    kl = tl.load(p_kl + i, mask=kept, other=0.0)
    kl_slope = tl.zeros([ROWS], tl.float32)
    anchor = tl.zeros([ROWS], tl.float32)
    if ANCHORED:
        kappa = tl.full([ROWS], 1.0, tl.float32)
        if ADAPTIVE_KL:
            floor = KL_FLOOR / kl_coef
            kappa = floor + reward * (1.0 - floor)
        kl_slope = tl.where(kept, weight * kl_weight * kl_coef * kappa, 0.0)
        anchor = kl_slope * kl

    tl.store(p_samples + i, implicit, mask=m)
    tl.store(p_samples + batch + i, kl, mask=m)
    tl.store(p_samples + 2 * batch + i, reward, mask=m)
    tl.store(p_terms + i, policy, mask=m)
    tl.store(p_terms + batch + i, anchor, mask=m)
    tl.store(p_terms + 2 * batch + i, implicit - first_mean, mask=m)
    tl.store(p_terms + 3 * batch + i, tl.where(active & (size == 1.0), 1.0, 0.0), mask=m)
    if REDUCTION == NONE:
        tl.store(p_loss + i, policy + anchor, mask=m)
        tl.store(p_parts + i, policy, mask=m)
        tl.store(p_parts + batch + i, anchor, mask=m)
    divisor = tl.full([], 1.0, tl.float32)
    if REDUCTION == MEAN:
        counted = tl.zeros([BLOCK], tl.float32)
        for start in range(0, batch, BLOCK):
            k = start + tl.arange(0, BLOCK)
            m_k = k < batch
            counted += tl.where(m_k & (_vector(p_weights, k, m_k, WEIGHTED) != 0.0), 1.0, 0.0)
        count = tl.sum(counted)
        divisor = tl.where(count == 0.0, 1.0, count)
    tl.store(p_slopes + i, mse_slope / divisor, mask=m)
    tl.store(p_slopes + batch + i, kl_slope / divisor, mask=m)


@triton.jit
def _deviation(mean_square, divisor):
    return tl.sqrt(tl.sum(mean_square) / divisor)


@triton.jit
def totals_kernel(
    p_mse,
    p_mae,
    p_old_mse,
    p_old_mae,
    p_advantages,
    p_weights,
    p_kl_weights,
    p_samples,  # (3, B)
    p_terms,  # (4, B)
    p_loss,  # (); not written for NONE
    p_parts,  # (2,); not written for NONE
    p_metrics,  # (16,) in the order of reference_objective.METRICS
    batch,
    clip,
    WEIGHTED: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = tl.zeros([BLOCK], tl.float32)
    alone = tl.zeros([BLOCK], tl.float32)
    policy = tl.zeros([BLOCK], tl.float32)
    anchor = tl.zeros([BLOCK], tl.float32)
    kl = tl.zeros([BLOCK], tl.float32)
    implicit = tl.zeros([BLOCK], tl.float32)
    centered = tl.zeros([BLOCK], tl.float32)
    reward = tl.zeros([BLOCK], tl.float32)
    clipped = tl.zeros([BLOCK], tl.float32)
    mse = tl.zeros([BLOCK], tl.float32)
    mae = tl.zeros([BLOCK], tl.float32)
    old_mse = tl.zeros([BLOCK], tl.float32)
    old_mae = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = i < batch
        active = m & (_vector(p_weights, i, m, WEIGHTED) != 0.0)
        advantage = tl.load(p_advantages + i, mask=active, other=0.0).to(tl.float32)
        count += tl.where(active, 1.0, 0.0)
        alone += tl.load(p_terms + 3 * batch + i, mask=m, other=0.0)
        policy += tl.load(p_terms + i, mask=active, other=0.0)
        anchor += tl.load(p_terms + batch + i, mask=active, other=0.0)
        kl += _vector(p_kl_weights, i, m, KL_WEIGHTED) * tl.load(p_samples + batch + i, mask=active, other=0.0)
        implicit += tl.load(p_samples + i, mask=active, other=0.0)
        centered += tl.load(p_terms + 2 * batch + i, mask=active, other=0.0)
        reward += tl.where(active, _mapped(advantage, clip), 0.0)
        clipped += tl.where(active & (tl.abs(advantage) > clip), 1.0, 0.0)
        mse += tl.load(p_mse + i, mask=active, other=0.0)
        mae += tl.load(p_mae + i, mask=active, other=0.0)
        old_mse += tl.load(p_old_mse + i, mask=active, other=0.0)
        old_mae += tl.load(p_old_mae + i, mask=active, other=0.0)
    counted = tl.sum(count)
    divisor = tl.where(counted == 0.0, 1.0, counted)
    implicit_mean = tl.sum(implicit) / divisor
    centered_mean = tl.sum(centered) / divisor
    reward_mean = tl.sum(reward) / divisor
    implicit_square = tl.zeros([BLOCK], tl.float32)
    centered_square = tl.zeros([BLOCK], tl.float32)
    reward_square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = i < batch
        active = m & (_vector(p_weights, i, m, WEIGHTED) != 0.0)
        advantage = tl.load(p_advantages + i, mask=active, other=0.0).to(tl.float32)
        implicit_apart = tl.load(p_samples + i, mask=active, other=0.0) - implicit_mean
        centered_apart = tl.load(p_terms + 2 * batch + i, mask=active, other=0.0) - centered_mean
        reward_apart = _mapped(advantage, clip) - reward_mean
        implicit_square += tl.where(active, implicit_apart * implicit_apart, 0.0)
        centered_square += tl.where(active, centered_apart * centered_apart, 0.0)
        reward_square += tl.where(active, reward_apart * reward_apart, 0.0)
    policy_total = tl.sum(policy)
    anchor_total = tl.sum(anchor)
    tl.store(p_metrics + 0, policy_total / divisor + anchor_total / divisor)
    tl.store(p_metrics + 1, policy_total / divisor)
    tl.store(p_metrics + 2, anchor_total / divisor)
    tl.store(p_metrics + 3, tl.sum(kl) / divisor)
    tl.store(p_metrics + 4, implicit_mean)
    tl.store(p_metrics + 5, _deviation(implicit_square, divisor))
    tl.store(p_metrics + 6, _deviation(centered_square, divisor))
    tl.store(p_metrics + 7, reward_mean)
    tl.store(p_metrics + 8, _deviation(reward_square, divisor))
    tl.store(p_metrics + 9, tl.sum(clipped) / divisor)
    tl.store(p_metrics + 10, tl.sum(alone))
    tl.store(p_metrics + 11, counted)
    tl.store(p_metrics + 12, tl.sum(mse) / divisor)
    tl.store(p_metrics + 13, tl.sum(mae) / divisor)
    tl.store(p_metrics + 14, tl.sum(old_mse) / divisor)
    tl.store(p_metrics + 15, tl.sum(old_mae) / divisor)
    if REDUCTION != NONE:
        share = divisor
        if REDUCTION == SUM:
            share = tl.full([], 1.0, tl.float32)
        tl.store(p_loss, policy_total / share + anchor_total / share)
        tl.store(p_parts, policy_total / share)
        tl.store(p_parts + 1, anchor_total / share)


def objective(
    mse: torch.Tensor,
    mae: torch.Tensor,
    kl: torch.Tensor,
    old_mse: torch.Tensor,
    old_mae: torch.Tensor,
    advantages: torch.Tensor,
    group_ids: torch.Tensor | None,
    sample_weights: torch.Tensor | None,
    kl_weights: torch.Tensor | None,
    member_ids: torch.Tensor | None,
    members: torch.Tensor | None,
    beta: float,
    kl_coef: float,
    adv_clip: float,
    adaptive_weight: bool,
    adaptive_kl: bool,
    temperature: float,
    loss_type: str,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, parts, samples, slopes and metrics in float32; arguments and results as in `ObjectiveInputs`.

    Statistics and members float32; advantages and weights any float dtype; ids int64.
    """
    batch = mse.shape[0]
    shape = (batch,) if reduction == "none" else ()

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=mse.device)

    def dense(tensor: torch.Tensor | None) -> torch.Tensor:
        return mse if tensor is None else tensor.contiguous()

    loss, parts, metrics = empty(*shape), empty(2, *shape), empty(METRICS)
    samples, slopes, terms = empty(3, batch), empty(2, batch), empty(4, batch)
    mse, mae, old_mse, old_mae, advantages = (dense(t) for t in (mse, mae, old_mse, old_mae, advantages))
    weights, kl_weighting = dense(sample_weights), dense(kl_weights)
    centering = 0 if math.isinf(temperature) else 2 if temperature == 0 else 1
    flags = {
        "WEIGHTED": sample_weights is not None,
        "KL_WEIGHTED": kl_weights is not None,
        "REDUCTION": REDUCTIONS[reduction],
    }
    samples_kernel[(triton.cdiv(batch, ROWS),)](
        mse,
        mae,
        dense(kl),
        old_mse,
        old_mae,
        advantages,
        dense(group_ids),
        weights,
        kl_weighting,
        dense(member_ids),
        dense(members),
        loss,
        parts,
        samples,
        slopes,
        terms,
        batch,
        batch if member_ids is None else member_ids.shape[0],
        beta,
        kl_coef,
        adv_clip,
        1.0 / temperature if centering == 1 else 1.0,
        GROUPED=group_ids is not None,
        GATHERED=member_ids is not None,
        ADAPTIVE=adaptive_weight,
        ADAPTIVE_KL=adaptive_kl,
        ANCHORED=kl_coef != 0.0,
        CENTERING=centering,
        BCE=loss_type == "bce",
        **flags,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
        **ROUNDING,
    )
    totals_kernel[(1,)](
        mse,
        mae,
        old_mse,
        old_mae,
        advantages,
        weights,
        kl_weighting,
        samples,
        terms,
        loss,
        parts,
        metrics,
        batch,
        adv_clip,
        **flags,
        BLOCK=min(1024, max(16, triton.next_power_of_2(batch))),
        num_warps=4,
        **ROUNDING,
    )
    return loss, parts, samples, slopes, metrics
