"""An epoch's plan on the device, moved there once, so that no step waits for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.training.config import TrainSettings
from crd_fast.training.experience import Experience
from crd_fast.training.plan import DRAW_SHIFT, MicroStep


@dataclass(frozen=True)
class StepInputs:
    """What one micro-step of B samples takes from the epoch; all tensors are on the model's device.

    rows (B,) of the epoch's latents; prompt_ids (B,) of its embeddings; noise_ids (B,) number the noise; group_ids (B,)
    of a prompt at a timestep; sigma (B,); advantages (B,); weights (B,) 1 where the sample counts, None for all;
    anchored (A,) positions in the batch at which the anchor is evaluated, and kl_weights (B,) that undo their choice.
    plan: the micro-step itself, on the host.
    """

    rows: Tensor
    prompt_ids: Tensor
    noise_ids: Tensor
    group_ids: Tensor
    sigma: Tensor
    advantages: Tensor
    weights: Tensor | None
    anchored: Tensor
    kl_weights: Tensor
    plan: MicroStep


def step_inputs(
    plan: Sequence[MicroStep], experience: Experience, settings: TrainSettings, device: torch.device
) -> list[StepInputs]:
    """The inputs of every micro-step, in order; one copy to the device for each kind."""
    batch, valid = experience.batch, experience.valid
    rows = torch.cat([micro.rows for micro in plan])
    sizes = [len(micro.rows) for micro in plan]

    def moved(values: Tensor) -> list[Tensor]:
        return list(values.to(device).split(sizes))

    noise_ids = batch.sample_ids[rows]
    if settings.shared_noise:
        noise_ids = noise_ids - rows % settings.group_size  # that of the group's first sample
    noise_ids = noise_ids + (torch.cat([micro.draw for micro in plan]) << DRAW_SHIFT)
    group_ids = batch.group_ids[rows] * settings.timesteps + torch.cat([micro.timesteps for micro in plan])
    anchored = [micro.anchored.nonzero().flatten() for micro in plan]
    kl_weights = torch.cat(
        [micro.anchored.float() * len(micro.rows) / max(len(a), 1) for micro, a in zip(plan, anchored, strict=True)]
    )
    columns = zip(
        moved(rows),
        moved(batch.prompt_ids[rows]),
        moved(noise_ids),
        moved(group_ids),
        moved(torch.cat([micro.sigma for micro in plan])),
        moved(experience.advantages[rows]),
        [None] * len(plan) if valid is None else moved(valid[rows].float()),
        torch.cat(anchored).to(device).split([len(a) for a in anchored]),
        moved(kl_weights),
        plan,
        strict=True,
    )
    return [StepInputs(*column) for column in columns]
