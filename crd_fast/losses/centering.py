"""Groups that are spread, over data-parallel ranks or over calls: three numbers and the id of every sample cross.

arXiv 2603.14128 centers the implicit and the external reward within each prompt's samples, wherever those are; nothing
of the size of a latent is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from crd_fast import checks


@dataclass(frozen=True, eq=False)
class GroupMembers:
    """Samples that are centered together, N of them: what `loss` takes as `members`.

    group_ids (N,) int64, None for one group; advantages (N,); implicit_reward (N,) = r at the current parameters;
    active (N,) bool: those that count, None for all.
    """

    group_ids: Tensor | None
    advantages: Tensor
    implicit_reward: Tensor
    active: Tensor | None = None

    def __len__(self) -> int:
        return len(self.advantages)

    @staticmethod
    def cat(parts: Sequence[GroupMembers]) -> GroupMembers:
        """Of all parts. Raises ValueError where some have group_ids and others have none."""
        ids = [part.group_ids for part in parts if part.group_ids is not None]
        if len(ids) not in (0, len(parts)):
            raise ValueError(f"members: {len(ids)} of {len(parts)} parts have group_ids: give them to all or to none")
        counted = None
        if any(part.active is not None for part in parts):
            counted = torch.cat([part.counted() for part in parts])
        return GroupMembers(
            torch.cat(ids) if ids else None,
            torch.cat([part.advantages for part in parts]),
            torch.cat([part.implicit_reward for part in parts]),
            counted,
        )

    def counted(self) -> Tensor:
        """(N,) bool."""
        return torch.ones_like(self.advantages, dtype=torch.bool) if self.active is None else self.active


def gather(group_ids: Tensor, members: Tensor, process_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """group_ids (N,) and members (3, N) of every rank of `process_group`, in rank order, through one all-gather.

    group_ids: (B,) int64. members: (3, B): mapped reward, implicit reward, 1 for those that count. Rows are four int64:
    the id and the bits of three float64. Ids therefore never pass through floating point, where those beyond 2^53 would
    merge.

    Raises:
        ValueError: ranks hold different batch sizes (looked at on CPU, elsewhere with CRD_FAST_CHECKS=1).
    """
    bits = members.double().view(torch.int64)  # (3, B)
    packed = torch.cat((group_ids[None, :], bits)).T.contiguous()  # (B, 4)
    ranks = dist.get_world_size(process_group)
    _require_equal_batches(packed, ranks, process_group)
    pieces = [torch.empty_like(packed) for _ in range(ranks)]
    dist.all_gather(pieces, packed, group=process_group)
    everyone = torch.cat(pieces).T.contiguous()  # (4, N)
    return everyone[0], everyone[1:].view(torch.float64).to(members.dtype)


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
