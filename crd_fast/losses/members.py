"""Groups that are spread over several calls of the loss, as when gradients are accumulated over parts of a group.

A part of a group that is centered on its own regresses onto another target than the whole group (arXiv 2603.14128), and
a part of one sample onto nothing. Centering needs three numbers a sample: they are found first, without gradients, for
all parts, and given to the call of each part.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch import distributed as dist

from crd_fast.forward_process import Noised, ResidualStats
from crd_fast.losses.centering import GroupMembers, gather
from crd_fast.losses.config import CRDConfig
from crd_fast.losses.crd import DEFAULT_CONFIG, loss


def group_members(
    f_theta: Tensor,
    target: Noised | Tensor,
    *,
    old: ResidualStats | Tensor,
    advantages: Tensor,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    config: CRDConfig = DEFAULT_CONFIG,
) -> GroupMembers:
    """What the other parts of a group need to know of these samples, for `loss(..., members=...)`.

    Equivalent to the whole group in one call, at the cost of one more prediction without gradients::

        with torch.no_grad():
            parts = [crd_fast.group_members(model(part), fwd(part), old=..., advantages=..., group_ids=...)
                     for part in group]
        members = crd_fast.GroupMembers.cat(parts)
        for part in group:
            out = crd_fast.loss(model(part), fwd(part), old=..., advantages=..., group_ids=..., members=members)
            (out.loss * len(part) / len(group)).backward()  # a mean over the part, by its share of all that count

    Args:
        f_theta: (B, *latent) prediction of the trained model at the parameters that the parts are trained at; no
            gradient is taken.
        target, old, advantages, group_ids, mask, sample_weights, config: as the loss of this part gets them.
        process_group: ranks that hold further parts: everyone's samples are returned, in rank order. The loss is then
            called without it.

    Raises:
        ValueError: as `loss` does.
        ExtensionMissingError: see `crd_fast.ops`.
    """
    with torch.no_grad():
        anchorless = dataclasses.replace(config, kl_coef=0.0)
        out = loss(
            f_theta,
            target,
            old=old,
            advantages=advantages,
            group_ids=group_ids,
            mask=mask,
            sample_weights=sample_weights,
            config=anchorless,
        )
        active = None if sample_weights is None else sample_weights != 0
        own = GroupMembers(group_ids, advantages.detach(), out.implicit_reward, active)
        return own if process_group is None else _everyones(own, process_group)


def _everyones(own: GroupMembers, process_group: dist.ProcessGroup) -> GroupMembers:
    ids = own.group_ids
    if ids is None:
        ids = torch.zeros(len(own), dtype=torch.int64, device=own.advantages.device)
    dtype = torch.promote_types(own.advantages.dtype, own.implicit_reward.dtype)
    rows = [own.advantages, own.implicit_reward, own.counted()]
    ids, (advantages, implicit, counted) = gather(ids, torch.stack([r.to(dtype) for r in rows]), process_group)
    return GroupMembers(ids if own.group_ids is not None else None, advantages, implicit, counted != 0)
