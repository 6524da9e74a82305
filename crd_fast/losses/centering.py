"""Centering within groups: the weighted group means that make the intractable normaliser of a prompt cancel.

arXiv 2603.14128: log Z(c) is one number per prompt, so it drops out of the regression once the implicit and
the external reward are both centered within the prompt's samples. Groups may be spread over data-parallel
ranks; then three numbers and the id of every sample cross ranks, nothing of the size of a latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from crd_fast import checks


@dataclass(frozen=True)
class Members:
    """The samples that group means run over, all without gradient: one rank's, or everyone's after `gather`.

    group_ids (N,) int64; reward (N,) mapped reward a in [0, 1]; implicit (N,) implicit reward r; active (N,)
    bool, False for samples that are out of every mean.
    """

    group_ids: Tensor
    reward: Tensor
    implicit: Tensor
    active: Tensor


@dataclass(frozen=True)
class GroupMeans:
    """Means of each local sample's group in one direction of centering: reward (B,), implicit (B,)."""

    reward: Tensor
    implicit: Tensor


def gather(members: Members, process_group: dist.ProcessGroup) -> Members:
    """The members of every rank of `process_group`, in rank order, through one all-gather.

    Rows are four int64: the id and the bits of three float64. Ids therefore never pass through floating
    point, where those beyond 2^53 would merge.

    Raises:
        ValueError: ranks hold different batch sizes (looked at on CPU, elsewhere with CRD_FAST_CHECKS=1).
    """
    columns = (members.reward, members.implicit, members.active)
    bits = [column.detach().double().view(torch.int64) for column in columns]
    packed = torch.stack([members.group_ids, *bits], dim=1)  # (B, 4)
    ranks = dist.get_world_size(process_group)
    _require_equal_batches(packed, ranks, process_group)
    pieces = [torch.empty_like(packed) for _ in range(ranks)]
    dist.all_gather(pieces, packed, group=process_group)
    ids, reward, implicit, active = torch.cat(pieces).unbind(1)  # each (N,)
    dtype = members.reward.dtype
    return Members(
        ids,
        reward.contiguous().view(torch.float64).to(dtype),
        implicit.contiguous().view(torch.float64).to(dtype),
        active.contiguous().view(torch.float64) != 0,
    )


def _require_equal_batches(packed: Tensor, ranks: int, process_group: dist.ProcessGroup) -> None:
    if not checks.values_are_checked(packed.device):
        return
    own = torch.tensor([packed.shape[0]], device=packed.device)
    sizes = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(sizes, own, group=process_group)
    batches = [int(size) for size in sizes]
    if len(set(batches)) > 1:
        raise ValueError(
            f"process_group: expected one batch size on every rank, got {batches}; fill the shorter batches "
            "up with samples of sample_weights 0, which no mean counts"
        )


def same_group(group_ids: Tensor, members: Members) -> Tensor:
    """(B, N) bool: which active members belong to the group of each local sample."""
    return (group_ids[:, None] == members.group_ids[None, :]) & members.active[None, :]


def group_means(same: Tensor, members: Members, temperature: float) -> list[GroupMeans]:
    """Means under the centering weights p: one direction for temperature inf, else two.

    inf: p = 1/|G|. Finite: p = softmax(a / temperature) and softmax(-a / temperature). 0: uniform over the
    group's members with a > 1/2, and over those with a < 1/2; a side without members falls back to the whole
    group. The group includes the sample itself.
    """
    reward = members.reward[None, :].expand(same.shape)  # (B, N)
    implicit = torch.where(same, members.implicit, 0.0)  # (B, N); a NaN of one group stays in that group
    if math.isinf(temperature):
        weights = [_uniform(same, reward.dtype)]
    elif temperature == 0:
        weights = [_uniform_or(same & side, same, reward.dtype) for side in (reward > 0.5, reward < 0.5)]
    else:
        weights = [_softmax(sign * reward / temperature, same) for sign in (1.0, -1.0)]
    return [GroupMeans((p * reward).sum(1), (p * implicit).sum(1)) for p in weights]


def _uniform(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N) weights 1/n over the n chosen of each row; zeros where nothing is chosen."""
    return chosen.to(dtype) / chosen.sum(1, keepdim=True).clamp(min=1)


def _uniform_or(chosen: Tensor, everyone: Tensor, dtype: torch.dtype) -> Tensor:
    return _uniform(torch.where(chosen.any(1, keepdim=True), chosen, everyone), dtype)


def _softmax(logits: Tensor, same: Tensor) -> Tensor:
    lowest = torch.finfo(logits.dtype).min  # not -inf: a row without members would become NaN
    return torch.where(same, torch.where(same, logits, lowest).softmax(1), 0.0)
