"""Full fine-tuning: the whole model is trained, and old, sampling and base are copies of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.errors import nearest
from crd_fast.ranks import Ranks
from crd_fast.snapshots import BASE, SLOTS, TRAINED, ParameterSets, Rows, check_slots


class FullCopies(ParameterSets):
    """One copy of the backbone's model a slot, and the frozen one it was loaded as.

    Trained parameters and snapshots are fp32, because steps and decays are smaller than bf16 can add; predictions run
    in the backbone's dtype through autocast, or through FSDP's own casts where the copies are sharded. The base keeps
    the backbone's dtype. A prediction with several slots is one pass a slot.
    """

    light = False
    folder = "transformer"

    def __init__(self, backbone: Backbone) -> None:
        base = backbone.transformer.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {slot: copy.deepcopy(base).float() for slot in SLOTS}
        self.modules[BASE] = base
        self.modules[TRAINED].requires_grad_(True)
        self.sharded = False  # see training.sharding

    def named_tensors(self, slot: str) -> dict[str, nn.Parameter]:
        if slot not in SLOTS:
            raise ValueError(f"slot {slot!r} holds no tensors{nearest(slot, SLOTS)}")
        return dict(self.modules[slot].named_parameters())

    def predict(self, backbone: Backbone, rows: Rows, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        check_slots(rows)
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
        check_slots([(slot, 0)])
        with self._running(backbone, slot), torch.no_grad():
            yield

    def before_backward(self, last: bool) -> None:
        if self.sharded:
            self.modules[TRAINED].set_requires_gradient_sync(last)  # type: ignore[operator]

    def average_gradients(self, ranks: Ranks) -> None:
        if not self.sharded:  # FSDP has averaged them
            super().average_gradients(ranks)

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
