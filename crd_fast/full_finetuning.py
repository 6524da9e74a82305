"""Full fine-tuning: the whole model is trained, and old, sampling and base are copies of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from crd_fast.acceleration.fp8 import FrozenFP8Linear
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.errors import nearest
from crd_fast.ranks import Ranks
from crd_fast.snapshots import BASE, SLOTS, TRAINED, ParameterSets, Rows, check_slots, local_part


class FullCopies(ParameterSets):
    """One copy of the backbone's model a slot, and the frozen one it was loaded as.

    Trained parameters and snapshots are fp32, because steps and decays are smaller than bf16 can add; predictions run
    in the backbone's dtype through autocast, or through FSDP's own casts where the copies are sharded. The base keeps
    the backbone's dtype. A prediction with several slots is one pass a slot.

    empty: the copies take no memory until `fill`, so that each rank makes its shards alone.
    """

    light = False
    folder = "transformer"

    def __init__(
        self,
        backbone: Backbone,
        *,
        empty: bool = False,
        slots: Sequence[str] = SLOTS,
        trained: Sequence[str] = (TRAINED,),
    ) -> None:
        self.slots, self.trained = tuple(slots), tuple(trained)
        base = backbone.transformer.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {slot: _copy(base, empty) for slot in self.slots}
        self.modules[BASE] = base
        for slot in self.trained:
            self.modules[slot].requires_grad_(True)
        self.empty = empty
        self.sharded = False  # see training.sharding

    @torch.no_grad()
    def fill(self) -> None:
        """Give empty copies, sharded as the base is, their memory and the base's values."""
        base = self.modules[BASE]
        for slot in self.slots:
            module = self.modules[slot].to_empty(device=next(base.parameters()).device)
            for own, theirs in zip(_tensors(module), _tensors(base), strict=True):
                if isinstance(own, DTensor) != isinstance(theirs, DTensor):
                    raise RuntimeError("copies are filled from a base that is sharded as they are")
                if isinstance(own, DTensor) and isinstance(theirs, DTensor):
                    own.to_local().copy_(theirs.to_local())
                else:
                    own.copy_(theirs)
        self.empty = False

    def named_tensors(self, slot: str) -> dict[str, nn.Parameter]:
        if slot not in self.slots:
            raise ValueError(f"slot {slot!r} holds no tensors{nearest(slot, self.slots)}")
        return dict(self.modules[slot].named_parameters())

    def predict(self, backbone: Backbone, rows: Rows, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        check_slots(rows, (*self.slots, BASE))
        parts, start = [], 0
        for slot, count in rows:
            piece = slice(start, start + count if len(rows) > 1 else None)
            with self._running(backbone, slot):
                parts.append(backbone.predict(x_t[piece], sigma[piece], conditioning[piece]))
            start += count
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts])

    @contextmanager
    def _running(self, backbone: Backbone, slot: str) -> Iterator[None]:
        before, backbone.transformer = backbone.transformer, self.modules[slot]
        mixed = backbone.dtype != torch.float32 and slot != BASE and not self.sharded
        try:
            with torch.autocast(backbone.device.type, backbone.dtype) if mixed else nullcontext():
                yield
        finally:
            backbone.transformer = before

    @contextmanager
    def rollout(self, backbone: Backbone, slot: str) -> Iterator[None]:
        check_slots([(slot, 0)], (*self.slots, BASE))
        with self._running(backbone, slot), torch.no_grad():
            yield

    @torch.no_grad()
    def towards_base(self, slot: str, share: float) -> None:
        self._check_towards_base(slot, share)
        for own, theirs in zip(self.modules[slot].parameters(), self.modules[BASE].parameters(), strict=True):
            kept = local_part(own)
            kept.lerp_(local_part(theirs).to(kept.dtype), share)

    def before_backward(self, last: bool, slot: str = TRAINED) -> None:
        if self.sharded:
            self.modules[slot].set_requires_gradient_sync(last)  # type: ignore[operator]

    def average_gradients(self, ranks: Ranks, slot: str = TRAINED) -> None:
        if not self.sharded:  # FSDP has averaged them
            super().average_gradients(ranks, slot)

    def save(self, backbone: Backbone, folder: Path, slot: str = TRAINED) -> None:
        """The model as diffusers saves it, in the backbone's dtype: for `from_pretrained(folder)` of its class."""
        module = self.modules[slot]
        state: dict[str, Any] = get_model_state_dict(
            module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if not state:  # full state dicts are gathered on the first rank alone
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.modules[BASE].save_config(folder)  # type: ignore[operator]
        save_torch_state_dict(
            {name: tensor.to(backbone.dtype) for name, tensor in state.items()},
            folder,
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        )


def _copy(base: nn.Module, empty: bool) -> nn.Module:
    """A copy in fp32, or one whose parameters and buffers have shapes alone."""
    if not empty:
        return copy.deepcopy(base).float()
    memo: dict[int, Any] = {}
    for parameter in base.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, dtype=torch.float32, device="meta"), False)
    for buffer in base.buffers():
        dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype  # as `float` does
        memo[id(buffer)] = torch.empty_like(buffer, dtype=dtype, device="meta")
    return copy.deepcopy(base, memo)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers in their order, without the rounded weights that the base alone has beside its own."""
    rounded = {id(b) for part in module.modules() if isinstance(part, FrozenFP8Linear) for b in part.buffers()}
    return [*module.parameters(), *(buffer for buffer in module.buffers() if id(buffer) not in rounded)]
