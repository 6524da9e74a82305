"""An epoch of DIDR as a row of metrics, whatever ranks and micro-batches its samples were cut into."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from crd_fast.didr.networks import GENERATOR, TA
from crd_fast.didr.stages import StageTwoOutput
from crd_fast.ranks import Ranks

Row = dict[str, Any]
THIRDS = ("early", "middle", "late")  # of the training time range
SAMPLE = (
    "share",
    "loss",
    "gap",
    "correction",
    "nonfinite",
    "reward",
    "distance",
)  # what is kept of a sample of Stage II


class EpochLog:
    """What an epoch's row is made of; tensors stay on the device until then.

    ta_losses: of each step of Stage I; before_and_after (2,): the loss of a step's samples before the TA learned them
    and after; samples (B, len(SAMPLE)): of each micro-batch of Stage II; norms: of each step's gradient.
    """

    def __init__(self) -> None:
        self.ta_losses: list[Tensor] = []
        self.before_and_after: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.norms: dict[str, list[float]] = {GENERATOR: [], TA: []}

    def add(self, shares: Tensor, out: StageTwoOutput) -> None:
        """Keep what a row tells of a micro-batch of Stage II. shares (B,): of the training time range."""
        generator = out.generator
        reward = torch.full_like(generator.gap, math.nan) if out.reward is None else out.reward.reward
        values = {
            "share": shares.to(generator.gap.device),
            "loss": out.loss.detach().expand(len(shares)),
            "gap": generator.gap,
            "correction": generator.correction,
            "nonfinite": generator.zeroed,
            "reward": reward,
            "distance": torch.full_like(generator.gap, math.nan) if out.distance is None else out.distance,
        }
        self.samples.append(torch.stack([values[name].to(torch.float64) for name in SAMPLE], dim=1))

    def row(self, ranks: Ranks, reward: str) -> Row:
        """Means over the epoch and all ranks. Without Stage II there is nothing to tell of it."""
        ta = torch.stack([torch.stack(self.ta_losses).mean(), *torch.stack(self.before_and_after).mean(0)])
        loss, before, after = ranks.everyone(ta.double().cpu()).mean(0).tolist()
        row: Row = {"ta_loss": loss, "ta_loss_before": before, "ta_loss_after": after}
        if self.samples:
            row |= self._stage_two(ranks.everyone(torch.cat(self.samples).cpu()).flatten(0, 1), reward)
        finite = {slot: [norm for norm in norms if math.isfinite(norm)] for slot, norms in self.norms.items()}
        row["grad_norm"] = {slot: sum(norms) / len(norms) for slot, norms in finite.items() if norms}
        row["skipped_steps"] = {slot: len(norms) - len(finite[slot]) for slot, norms in self.norms.items()}
        return row

    @staticmethod
    def _stage_two(samples: Tensor, reward: str) -> Row:
        """samples: (N, len(SAMPLE)) of all ranks. What is told of the reward is of the samples that have one."""
        columns = dict(zip(SAMPLE, samples.unbind(1), strict=True))
        third = (columns["share"] * 3).long().clamp(0, 2)
        row: Row = {
            "generator_loss": columns["loss"].mean().item(),
            "gap": _rms(columns["gap"]),
            "nonfinite": int(columns["nonfinite"].sum()),
        }
        if columns["distance"].isfinite().all():
            row["start_distance"] = columns["distance"].mean().item()
        rewarded = columns["reward"].isfinite()
        if rewarded.any():
            columns, third = {name: values[rewarded] for name, values in columns.items()}, third[rewarded]
            row["reward"] = {reward: columns["reward"].mean().item()}
            row["correction"] = _rms(columns["correction"])
            row["correction_ratio"] = {
                name: _rms(columns["correction"][third == i]) / max(_rms(columns["gap"][third == i]), 1e-30)
                for i, name in enumerate(THIRDS)
                if (third == i).any()
            }
        return row


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
