"""What an epoch learns from: samples of its prompts, scored while the next ones are made, and their advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import GroupSampler, PromptSet
from crd_fast.ranks import Ranks
from crd_fast.rewards.aggregate import AdvantageResult, advantages
from crd_fast.rewards.base import unknown_scores
from crd_fast.rewards.scorer import Scored, Scorer
from crd_fast.rollout import RolloutBatch, generate, initial_noise
from crd_fast.snapshots import SAMPLING, ParameterSets
from crd_fast.training.config import Recipe
from crd_fast.training.phases import Phases
from crd_fast.training.prepare import Prepared
from crd_fast.training.stop import StopRequest

Row = dict[str, Any]


@dataclass(frozen=True)
class Experience:
    """An epoch's samples, the same on every rank.

    advantages (N,) float32; valid (N,) bool says which samples count, None for all; row: metrics of the rewards.
    """

    batch: RolloutBatch
    advantages: Tensor
    valid: Tensor | None
    row: Row


class Explorer:
    """Makes and scores an epoch's samples with the sampling snapshot; the ranks share the work."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        sets: ParameterSets,
        prepared: Prepared,
        prompts: PromptSet,
        conditioning: Conditioning,
        unconditional: Conditioning,
        scorer: Scorer,
        stop: StopRequest,
        ranks: Ranks,
        phases: Phases,
    ) -> None:
        self.recipe, self.backbone, self.sets, self.prepared = recipe, backbone, sets, prepared
        self.prompts, self.conditioning, self.unconditional = prompts, conditioning, unconditional
        self.scorer, self.stop, self.ranks, self.phases = scorer, stop, ranks, phases
        train = recipe.train
        self.sampler = GroupSampler(len(prompts), train.groups, train.group_size, recipe.run.seed)

    def explore(self, epoch: int) -> Experience:
        """The samples of an epoch and their advantages.

        Raises, on every rank, RewardError where a reward failed and its `on_error` is "raise", and Interrupted.
        """
        prompt_ids, group_ids = self.sampler.samples(epoch), self.sampler.group_ids()
        count = len(prompt_ids)
        mine = self.ranks.share(count)
        latents, scored = self._roll_out(epoch * count + mine, prompt_ids[mine])
        with self.phases.timed("exchange"):
            latents = self.ranks.gather(latents, count)
            scores, diagnostics = (self._gather(part, count) for part in (scored.scores, scored.diagnostics))
        algorithm = self.recipe.algorithm
        outcome = advantages(
            scores,
            {name: settings.spec for name, settings in self.recipe.rewards.items()},
            group_ids,
            mode=algorithm.advantage_mode,
            scope=algorithm.advantage_scope,
            min_group=algorithm.min_group,
        )
        row = _reward_row(outcome, diagnostics)
        row["reward_hidden_share"] = round(scored.hidden_share, 4)
        batch = RolloutBatch(latents, prompt_ids, group_ids, epoch * count + torch.arange(count))
        return Experience(batch, outcome.advantages, outcome.valid, row)

    def _roll_out(self, sample_ids: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Scored]:
        """Clean latents and scores of this rank's samples. Ranks whose scoring fails leave together."""
        pieces = []
        with self.prepared.precisions.use("rollout"), self.sets.rollout(self.backbone, SAMPLING):
            for rows in torch.arange(len(sample_ids)).split(self.recipe.rollout.batch):
                pieces.append(self._generate(sample_ids[rows], prompt_ids[rows]))
                self.stop.check(self.ranks)
                with self.ranks.together("scoring the rollout"):
                    self._submit(pieces[-1], prompt_ids[rows].tolist())
        with self.phases.timed("reward"), self.ranks.together("scoring the rollout"):
            scored = self.scorer.collect()
        self.stop.check(self.ranks)
        return torch.cat(pieces), scored

    def _generate(self, sample_ids: Tensor, prompt_ids: Tensor) -> Tensor:
        rollout = self.recipe.rollout
        with self.phases.timed("rollout"):
            return generate(
                self.backbone,
                self.conditioning[prompt_ids.to(self.backbone.device)],
                initial_noise(self.backbone, sample_ids, self.recipe.run.seed),
                steps=rollout.steps,
                guidance_scale=rollout.guidance_scale,
                solver=rollout.solver,
                unconditional=self.unconditional,
            )

    def _submit(self, latents: Tensor, prompt_ids: list[int]) -> None:
        """Decode a batch and hand it to the rewards, both in the precision that their weights have."""
        with torch.autocast(self.backbone.device.type, enabled=False):
            with self.phases.timed("decode"):
                images = torch.cat([self._decode(piece) for piece in latents.split(self.recipe.rollout.decode_batch)])
            with self.phases.timed("reward"):
                self.scorer.submit(
                    images,
                    [self.prompts.prompts[i] for i in prompt_ids],
                    [self.prompts.metadata[i] for i in prompt_ids],
                )

    def _decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), or the frames (B, F, 3, H, W) of videos that rewards see, on the host."""
        pictures = self.backbone.decode(latents)
        if pictures.ndim == 5:
            count = min(self.recipe.rollout.scored_frames, pictures.shape[1])
            pictures = pictures[:, torch.linspace(0, pictures.shape[1] - 1, count).round().long()]
        return pictures.cpu()

    def _gather(self, columns: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Every rank's columns (n,) as (count,); one that another rank alone has, as a reward failed here, is NaN."""
        own = len(self.ranks.share(count))
        names = self.ranks.union(columns)
        return {name: self.ranks.gather(columns.get(name, unknown_scores(own)), count) for name in names}


def _reward_row(outcome: AdvantageResult, diagnostics: dict[str, Tensor]) -> Row:
    stats = outcome.stats
    failed = {name: entry.failed for name, entry in stats.items() if entry.failed}
    row: Row = {
        "reward": {name: entry.mean for name, entry in stats.items()},
        "reward_std": {name: entry.group_std for name, entry in stats.items()},
        "reward_zero_std_share": {name: entry.zero_std_share for name, entry in stats.items()},
        "reward_diagnostics": {name: value.nanmean().item() for name, value in diagnostics.items()},
    }
    if failed:
        row["reward_failed"] = failed
    if outcome.valid is not None:
        row["masked_samples"] = int((~outcome.valid).sum())
    return row
