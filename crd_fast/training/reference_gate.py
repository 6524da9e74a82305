"""FP8 predictions of the reference are let in after a measurement, on the run's own model and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import crd_fast
from crd_fast.acceleration.noise_ratio import check_reference_noise, reference_noise_ratio
from crd_fast.acceleration.precision import FP8, release_exact
from crd_fast.snapshots import BASE, TRAINED

if TYPE_CHECKING:
    from torch import Tensor

    from crd_fast.rollout import RolloutBatch
    from crd_fast.training.trainer import Trainer

SAMPLES = 64


def gate_reference(trainer: Trainer, batch: RolloutBatch) -> None:
    """Measure the reference in FP8, where there is an anchor that asks for it, and let its exact weights go where no
    role needs them.

    Raises ConfigError as `_measure` does.
    """
    if trainer.loss_config.kl_coef > 0:
        _measure(trainer, batch)
    precisions = trainer.prepared.precisions
    if all(precision == FP8 for precision in precisions.roles.values()):
        release_exact(trainer.backbone.transformer)


def _measure(trainer: Trainer, batch: RolloutBatch) -> None:
    """Measure how far FP8 moves the guided reference, at noise levels over all of [0, 1].

    Raises ConfigError when that is more than `acceleration.noise_ratio.NOISE_LIMIT` of its distance from the trained
    model, saying what to set.
    """
    backbone, sets, precisions = trainer.backbone, trainer.sets, trainer.prepared.precisions
    scale = trainer.recipe.algorithm.guidance_scale
    count = min(SAMPLES, len(batch.latents))
    size = min(trainer.recipe.train.micro_batch, count)
    levels = ((torch.arange(count) + 0.5) / count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]

    def reference(rows: Tensor, role: str | None) -> Tensor:
        fwd = noised(rows)
        own = trainer.conditioning[batch.prompt_ids[rows].to(backbone.device)]
        with precisions.use(role):
            c = sets.predict(backbone, [(BASE, len(rows))], fwd.x_t, fwd.sigma, own)
            if not backbone.is_guided(scale):
                return c
            unconditional = trainer.unconditional.expand(len(rows))
            u = sets.predict(backbone, [(BASE, len(rows))], fwd.x_t, fwd.sigma, unconditional)
        return backbone.guide(c, u, scale)

    def trained(rows: Tensor) -> Tensor:
        fwd = noised(rows)
        own = trainer.conditioning[batch.prompt_ids[rows].to(backbone.device)]
        with precisions.use("train"):
            return sets.predict(backbone, [(TRAINED, len(rows))], fwd.x_t, fwd.sigma, own)

    def noised(rows: Tensor) -> crd_fast.Noised:
        return crd_fast.noise(
            batch.latents[rows.to(batch.latents.device)],
            levels[rows].to(backbone.device),
            seed=trainer.recipe.run.seed,
            sample_ids=batch.sample_ids[rows].to(backbone.device),
        )

    ratio = reference_noise_ratio(
        lambda rows: reference(rows, None),
        lambda rows: reference(rows, "ref"),
        trained,
        torch.arange(count).split(size),
        samples=SAMPLES,
    )
    check_reference_noise(ratio)
