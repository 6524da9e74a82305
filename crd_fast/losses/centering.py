"""Groups that are spread over data-parallel ranks: three numbers and the id of every sample cross them.

arXiv 2603.14128 centers the implicit and the external reward within each prompt's samples, wherever those are; nothing
of the size of a latent is exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from crd_fast import checks


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
