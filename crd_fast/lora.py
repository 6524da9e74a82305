"""A bank of LoRA adapters on one frozen backbone.

Every adapted linear layer holds one pair (down, up) per slot. Of CRD's, `trained` has gradients, and `old` and
`sampling` are snapshots; other algorithms have slots of their own; `base` is no adapter at all. The rows of one batch
may use different slots, so a pass over [old | base | base] rows is one forward. Nothing is ever swapped: a slot is
chosen by naming it.

Source of the snapshots: arXiv 2603.14128, decoupled sampler and moving reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.errors import CheckpointError, ConfigError, nearest
from crd_fast.snapshots import BASE, SLOTS, TRAINED, ParameterSets, Rows, check_slots


class BankLinear(nn.Module):
    """A frozen linear layer plus the bank's low-rank updates: y = W x + b + scale * up(down(x)), rows by slot."""

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, plan: _Plan, slots: Sequence[str], trained: Sequence[str]
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self._plan = plan
        self._merged: Tensor | None = None
        device = base.weight.device
        for slot in slots:
            grad = slot in trained
            down = torch.zeros(rank, base.in_features, device=device)
            up = torch.zeros(base.out_features, rank, device=device)
            setattr(self, f"down_{slot}", nn.Parameter(down, requires_grad=grad))
            setattr(self, f"up_{slot}", nn.Parameter(up, requires_grad=grad))

    def pair(self, slot: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The slot's (down (rank, in), up (out, rank)) in fp32."""
        return getattr(self, f"down_{slot}"), getattr(self, f"up_{slot}")

    def forward(self, x: Tensor) -> Tensor:  # (B, ..., in) -> (B, ..., out)
        if self._merged is not None:
            return F.linear(x, self._merged, self.base.bias)
        y = self.base(x)
        rows = self._plan.rows
        if rows is None:
            raise RuntimeError("no adapter chosen: call the backbone inside LoRABank.use(...)")
        if len(rows) == 1:
            slot = rows[0][0]
            return y if slot == BASE else y + self._delta(x, slot)
        total = sum(count for _, count in rows)
        if x.shape[0] != total:
            raise ValueError(f"the batch has {x.shape[0]} rows: LoRABank.use was told of {total} ({list(rows)})")
        start = 0
        parts = []
        for slot, count in rows:
            part = y[start : start + count]
            if slot != BASE:
                delta = self._delta(x[start : start + count], slot)
                part = part + delta if torch.is_grad_enabled() else part.add_(delta)
            parts.append(part)
            start += count
        return torch.cat(parts) if torch.is_grad_enabled() else y

    def _delta(self, x: Tensor, slot: str) -> Tensor:
        down, up = self.pair(slot)
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype) * self.scale)

    def merge(self, slot: str) -> None:
        down, up = self.pair(slot)
        weight = self.base.weight
        self._merged = torch.addmm(weight.float(), up, down, alpha=self.scale).to(weight.dtype)

    def unmerge(self) -> None:
        self._merged = None


class _Plan:
    """Which rows of the batch use which slot; shared by all layers of a bank."""

    rows: Rows | None = None


class LoRABank(ParameterSets):
    """Adapters for every linear layer of `model` whose name ends with one of `targets`.

    The layers are replaced in place and the rest of the model is frozen. All slots start equal: `down` uniform as in
    peft (Kaiming, a = sqrt 5), `up` zero, so every slot starts as the base.

    rank, alpha: the update is scaled by alpha / rank.
    seed: of the initial `down`. slots, trained: see `ParameterSets`.

    Raises ConfigError when no layer matches, naming layers that exist.
    """

    light = True
    folder = "lora"

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str],
        *,
        rank: int,
        alpha: float,
        seed: int,
        slots: Sequence[str] = SLOTS,
        trained: Sequence[str] = (TRAINED,),
    ) -> None:
        if rank < 1 or alpha <= 0:
            raise ConfigError(f"LoRA rank {rank} and alpha {alpha}: expected rank >= 1 and alpha > 0")
        self.slots, self.trained = tuple(slots), tuple(trained)
        self._plan = _Plan()
        self._layers: dict[str, BankLinear] = {}
        self.rank, self.alpha = rank, alpha
        self.merges = True  # rollouts add the adapter to the weights, which takes a copy of those
        model.requires_grad_(False)
        pattern = re.compile(rf"(?:^|\.)(?:{'|'.join(re.escape(t) for t in targets)})$")
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        chosen = {name: module for name, module in linears.items() if pattern.search(name)}
        if not chosen:
            raise ConfigError(f"no linear layer ends with {list(targets)}{nearest(targets[0], linears)}")
        generator = torch.Generator().manual_seed(seed)
        for name, linear in chosen.items():
            layer = BankLinear(linear, rank, alpha / rank, self._plan, self.slots, self.trained)
            bound = 1 / math.sqrt(linear.in_features)
            initial = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                for slot in self.slots:
                    layer.pair(slot)[0].copy_(initial)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            self._layers[name] = layer

    @classmethod
    def like(cls, model: nn.Module, adapter: Mapping[str, Tensor] | None, targets: Sequence[str]) -> LoRABank:
        """A bank with the layers and the rank of an adapter in `export`'s format, or of rank 1 on `targets` for None.

        What the adapter holds is not loaded.
        """
        if adapter is None:
            return cls(model, targets, rank=1, alpha=1.0, seed=0)
        downs = {
            name.removesuffix(".lora_A.weight"): t for name, t in adapter.items() if name.endswith(".lora_A.weight")
        }
        rank = next(iter(downs.values())).shape[0]
        return cls(model, list(downs), rank=rank, alpha=float(rank), seed=0)

    @property
    def layers(self) -> dict[str, BankLinear]:
        """Adapted layers by their name in the model."""
        return self._layers

    def named_tensors(self, slot: str) -> dict[str, nn.Parameter]:
        if slot not in self.slots:
            raise ValueError(f"slot {slot!r} holds no tensors{nearest(slot, self.slots)}")
        return {
            f"{name}.{side}": tensor
            for name, layer in self._layers.items()
            for side, tensor in zip(("down", "up"), layer.pair(slot), strict=True)
        }

    def predict(self, backbone: Backbone, rows: Rows, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self.use(rows[0][0] if len(rows) == 1 else rows):
            return backbone.predict(x_t, sigma, conditioning)

    @contextmanager
    def use(self, rows: str | Rows) -> Iterator[None]:
        """Inside, the backbone runs the named slot, or the slots of consecutive rows: [("old", 8), ("base", 16)]."""
        chosen: Rows = [(rows, 0)] if isinstance(rows, str) else list(rows)
        check_slots(chosen, (*self.slots, BASE))
        before = self._plan.rows
        self._plan.rows = chosen
        try:
            yield
        finally:
            self._plan.rows = before

    @contextmanager
    def merged(self, slot: str) -> Iterator[None]:
        """Like `use(slot)` without gradients, with one plain matrix a layer: for many passes of one slot."""
        with self.use(slot), torch.no_grad():
            if slot != BASE:
                for layer in self._layers.values():
                    layer.merge(slot)
            try:
                yield
            finally:
                for layer in self._layers.values():
                    layer.unmerge()

    def rollout(self, backbone: Backbone, slot: str) -> AbstractContextManager[None]:
        return self.merged(slot) if self.merges else self._unmerged(slot)

    @contextmanager
    def _unmerged(self, slot: str) -> Iterator[None]:
        with self.use(slot), torch.no_grad():
            yield

    @torch.no_grad()
    def towards_base(self, slot: str, share: float) -> None:
        self._check_towards_base(slot, share)
        for layer in self._layers.values():
            layer.pair(slot)[1].mul_(1 - share)

    def save(self, backbone: Backbone, folder: Path, slot: str = TRAINED) -> None:
        """`pytorch_lora_weights.safetensors`, for the pipeline's `load_lora_weights`."""
        backbone.save_lora(str(folder), self.export(slot))

    def export(self, slot: str = TRAINED) -> dict[str, Tensor]:
        """The slot in peft's names, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, with the scale folded into B.

        A loader that assumes alpha = rank, as diffusers does without metadata, reproduces the bank exactly.
        """
        state = {}
        for name, layer in self._layers.items():
            down, up = layer.pair(slot)
            state[f"{name}.lora_A.weight"] = down.detach().cpu().clone()
            state[f"{name}.lora_B.weight"] = (up.detach() * layer.scale).cpu()
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], slots: Sequence[str] | None = None) -> None:
        """Fill the slots, by default all, from `export`'s format, which `lora_file.read_adapter` reads from a file.

        Raises CheckpointError naming the first layer that is missing, unknown or of another rank.
        """
        expected = {f"{name}.lora_{side}.weight" for name in self._layers for side in "AB"}
        for name in sorted(expected ^ set(state)):
            what = "missing from the file" if name in expected else "in the file but not adapted here"
            raise CheckpointError(f"LoRA layer {name} is {what}: the adapter was made with other LoRA targets")
        for name, layer in self._layers.items():
            down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
            if (down.shape, up.shape) != tuple(tensor.shape for tensor in layer.pair(self.slots[0])):
                raise CheckpointError(
                    f"LoRA layer {name} in the file has rank {down.shape[0]} and shape {tuple(up.shape[:1])} x "
                    f"{tuple(down.shape[1:])}: expected rank {self.rank} and {layer.base.out_features} x "
                    f"{layer.base.in_features}; set lora.rank to the adapter's"
                )
            for slot in slots or self.slots:
                bank_down, bank_up = layer.pair(slot)
                bank_down.copy_(down)
                bank_up.copy_(up / layer.scale)
