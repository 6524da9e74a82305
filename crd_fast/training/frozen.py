"""What the loss needs of models that are not trained: the old snapshot's statistics, and the reference's anchor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import crd_fast
from crd_fast.acceleration.precision import Precisions
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.snapshots import BASE, OLD, ParameterSets
from crd_fast.training.step_inputs import StepInputs


class FrozenPredictions:
    """Predictions without gradients of one run's models.

    guidance_scale: of the anchor. unconditional: embeddings of one empty prompt. keep: they are made once for every
    micro-step of a pass over an epoch's samples, because later passes have the same noise; see `forget`.
    """

    def __init__(
        self,
        backbone: Backbone,
        sets: ParameterSets,
        precisions: Precisions,
        unconditional: Conditioning,
        guidance_scale: float,
        keep: bool,
    ) -> None:
        self.backbone, self.sets, self.precisions = backbone, sets, precisions
        self.unconditional, self.guidance_scale, self.keep = unconditional, guidance_scale, keep
        self.predicted = 0  # samples that went through a model, since whoever asks set it to 0
        self._kept: dict[int, tuple[crd_fast.ResidualStats, dict[str, Any]]] = {}

    def release(self) -> None:
        """Drop what was kept for the parts of a group, unless later passes want it too."""
        if not self.keep:
            self._kept.clear()

    def forget(self) -> None:
        """Drop what was kept: the epoch is over, or its samples are others."""
        self._kept.clear()

    def predict(
        self, fwd: crd_fast.Noised, prompts: Conditioning, step: StepInputs, *, again: bool = False
    ) -> tuple[crd_fast.ResidualStats, dict[str, Any]]:
        """The old prediction's statistics, and the loss's arguments about the reference.

        The anchor has the rows of `step.anchored`; its other rows are zero and have no KL weight. again: the same will
        be asked for once more before `release`.
        """
        if step.plan.index in self._kept:
            return self._kept[step.plan.index]
        found = self._predict(fwd, prompts, step)
        if self.keep or again:
            self._kept[step.plan.index] = found
        return found

    @torch.no_grad()
    def _predict(
        self, fwd: crd_fast.Noised, prompts: Conditioning, step: StepInputs
    ) -> tuple[crd_fast.ResidualStats, dict[str, Any]]:
        """One pass over [old | reference conditional | reference unconditional] rows."""
        count, scale = len(fwd.x_t), self.guidance_scale
        anchored = step.anchored
        guided = len(anchored) > 0 and self.backbone.is_guided(scale)
        copies = 1 + guided if len(anchored) else 0
        x = torch.cat([fwd.x_t] + [fwd.x_t[anchored]] * copies)
        sigma = torch.cat([fwd.sigma] + [fwd.sigma[anchored]] * copies)
        parts = [prompts]
        if copies:
            parts.append(prompts[anchored])
        if copies and guided:
            parts.append(self.unconditional.expand(len(anchored)))
        plan = [(OLD, count)] + ([(BASE, copies * len(anchored))] if copies else [])
        predictions = self._predict_rows(plan, x, sigma, Conditioning.cat(parts))
        old = crd_fast.residual_stats(predictions[:count], fwd)
        if not copies:
            return old, {}

        def spread(rows: Tensor) -> Tensor:
            return torch.zeros_like(fwd.x_t, dtype=rows.dtype).index_copy_(0, anchored, rows)

        references = predictions[count:].split(len(anchored))
        if guided and self.backbone.guidance == "linear":
            return old, {
                "ref": spread(references[0]),
                "ref_uncond": spread(references[1]),
                "guidance_scale": self.backbone.linear_scale(scale),
                "kl_weights": step.kl_weights,
            }
        ref = self.backbone.guide(references[0], references[1], scale) if guided else references[0]
        return old, {"ref": spread(ref), "kl_weights": step.kl_weights}

    def _predict_rows(
        self, plan: list[tuple[str, int]], x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Old and reference rows, in one pass unless their precisions differ."""
        self.predicted += len(x)
        if len(plan) == 1 or self.precisions.equal("old", "ref"):
            with self.precisions.use("old"):
                return self.sets.predict(self.backbone, plan, x, sigma, conditioning)
        cut = plan[0][1]
        pieces = ((slice(cut), "old", plan[:1]), (slice(cut, None), "ref", plan[1:]))
        parts = []
        for rows, role, own in pieces:
            with self.precisions.use(role):
                parts.append(self.sets.predict(self.backbone, own, x[rows], sigma[rows], conditioning[rows]))
        return torch.cat(parts)
