"""AdamW on one trained slot: gradients averaged over ranks, clipped, and a step skipped where they are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from crd_fast.ranks import Ranks
from crd_fast.snapshots import TRAINED, ParameterSets

_MOMENTS = ("exp_avg", "exp_avg_sq")


class GuardedAdamW:
    """steps: taken; skipped_in_a_row: since the last one that was taken; lr: of the last one."""

    def __init__(
        self,
        sets: ParameterSets,
        slot: str = TRAINED,
        *,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        betas: Sequence[float] = (0.9, 0.999),
    ) -> None:
        self.sets, self.slot, self.max_grad_norm = sets, slot, max_grad_norm
        first, second = betas
        tensors = sets.tensors(slot)
        # on the CPU, torch's choice elsewhere is a dozen small operations for every tensor
        fused = True if all(tensor.device.type == "cpu" for tensor in tensors) else None
        self._adam = torch.optim.AdamW(tensors, lr=lr, weight_decay=weight_decay, betas=(first, second), fused=fused)
        self.steps = 0
        self.skipped_in_a_row = 0

    @property
    def lr(self) -> float:
        return self._adam.param_groups[0]["lr"]

    def step(self, ranks: Ranks, lr: float) -> float:
        """One step, or none when the gradient is not finite. Returns the gradient's norm before it was clipped.

        Gradients are forgotten either way. Reading the norm waits for the device.
        """
        self.sets.average_gradients(ranks, self.slot)
        total = torch.nn.utils.clip_grad_norm_(self.sets.tensors(self.slot), self.max_grad_norm)
        norm = _read(total.full_tensor() if isinstance(total, DTensor) else total)
        if math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            self.steps += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        self._adam.zero_grad(set_to_none=True)
        return norm

    def skip(self) -> None:
        """Forget the gradients and count a step that was not taken."""
        self._adam.zero_grad(set_to_none=True)
        self.skipped_in_a_row += 1

    def tensors(self) -> dict[str, Tensor]:
        """Both moments of every parameter, `<name>.exp_avg` and `<name>.exp_avg_sq`. Not copies."""
        state = {}
        for name, parameter in self.sets.named_tensors(self.slot).items():
            moments = self._adam.state[parameter]
            if not moments:  # AdamW makes them in its first step
                moments["step"] = torch.tensor(float(self.steps))
                for moment in _MOMENTS:
                    moments[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            for moment in _MOMENTS:
                state[f"{name}.{moment}"] = moments[moment]
        return state

    def set_counts(self, steps: int, skipped_in_a_row: int) -> None:
        """Continue from these counts; the tensors have been filled in place."""
        self.steps, self.skipped_in_a_row = steps, skipped_in_a_row
        for parameter in self.sets.tensors(self.slot):
            self._adam.state[parameter]["step"].fill_(steps)


def _read(value: Tensor) -> float:
    """A number from the device, which the host waits for."""
    return value.item()
