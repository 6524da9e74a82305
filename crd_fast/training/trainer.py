"""The CRD trainer: roll out, score, regress the centered implicit reward, move the snapshots.

One epoch, as in arXiv 2603.14128: samples of `groups` prompts from the *sampling* snapshot; rewards and advantages;
for each micro-step fresh seeded noise, one pass without gradients over [old | reference conditional | reference
unconditional] rows, one pass with gradients, the loss, and an optimiser step every few micro-steps; then both
snapshots move.

Where it departs from the paper: noise levels are stratified over the epoch and shared within a group, and so may be
the noise (`shared_noise`); the anchor may be evaluated for a random share of the samples (`kl_fraction`, unbiased);
an epoch may pass over its samples several times (`inner_epochs`), with the same noise (`fixed_noise`).
Where it departs from the authors' public code: groups are centered per (prompt, timestep) by default; of the old
prediction two floats a sample are kept and noise is made again from its seed; adapters are rows of a bank and are never
swapped; what an optimiser step sees does not depend on the number of ranks; the reference is not run when kl_coef is 0;
resuming restores snapshots and counters.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import crd_fast
from crd_fast.acceleration.precision import FP8
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import GroupSampler, PromptSet
from crd_fast.errors import NonFiniteError
from crd_fast.ranks import Ranks
from crd_fast.rewards.aggregate import advantages
from crd_fast.rewards.base import Reward, score_batch, score_frames
from crd_fast.rollout import RolloutBatch, generate, initial_noise
from crd_fast.snapshots import BASE, OLD, SAMPLING, SLOTS, TRAINED, ParameterSets
from crd_fast.training.config import Recipe
from crd_fast.training.flops import TRAINED_PASSES, peak_flops
from crd_fast.training.metrics import epoch_metrics
from crd_fast.training.plan import DRAW_SHIFT, MicroStep, check_ranks, micro_steps
from crd_fast.training.prepare import Prepared
from crd_fast.training.reference_gate import gate_reference
from crd_fast.training.stop import StopRequest

Row = dict[str, Any]


class Trainer:
    """Everything a run carries from epoch to epoch, on one rank.

    conditioning: embeddings of all prompts, row by row; unconditional: of one empty prompt.

    Raises ConfigError when an update does not divide into micro-steps over the ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        sets: ParameterSets,
        prepared: Prepared,
        prompts: PromptSet,
        conditioning: Conditioning,
        unconditional: Conditioning,
        rewards: Mapping[str, Reward],
        stop: StopRequest,
        ranks: Ranks,
    ) -> None:
        self.recipe = recipe
        self.backbone = backbone
        self.sets = sets
        self.prepared = prepared
        self.prompts = prompts
        self.conditioning = conditioning
        self.unconditional = unconditional
        self.rewards = rewards
        self.stop = stop
        self.ranks = ranks
        train = recipe.train
        check_ranks(train, ranks.world)
        self.sampler = GroupSampler(len(prompts), train.groups, train.group_size, recipe.run.seed)
        self.loss_config = recipe.algorithm.loss_config()
        # where a group, or a batch that is centered as one, is spread over ranks
        spread = train.micro_batch % train.group_size != 0 or self.loss_config.centering == "batch"
        self.centering_group = ranks.data_group if spread else None
        self.optimizer = torch.optim.AdamW(
            sets.tensors(TRAINED), lr=train.lr, weight_decay=train.weight_decay, betas=(0.9, 0.999)
        )
        self._gated = prepared.precisions.roles["ref"] != FP8
        self.epoch = 0  # finished epochs
        self.step = 0  # optimiser steps taken
        self.skipped_in_a_row = 0
        self._predicted = 0.0  # forward passes of one sample, in this epoch's updates
        self._frozen: dict[int, tuple[crd_fast.ResidualStats, dict[str, Any]]] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    # --- state ---

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name: the sets and the optimiser's moments. Not copies."""
        state: dict[str, Tensor] = {
            f"{slot}.{name}": tensor.detach()
            for slot in SLOTS
            for name, tensor in self.sets.named_tensors(slot).items()
        }
        for name, parameter in self.sets.named_tensors(TRAINED).items():
            moments = self.optimizer.state[parameter]
            if not moments:  # AdamW makes them in its first step
                moments["step"] = torch.tensor(float(self.step))
                moments["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                moments["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"optimizer.{name}.{moment}"] = moments[moment]
        return state

    def values(self) -> dict[str, Any]:
        """The counters that a resumed run needs; its other inputs are functions of the recipe."""
        return {"epoch": self.epoch, "step": self.step, "skipped_in_a_row": self.skipped_in_a_row}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Continue from these counters; the tensors have been filled in place."""
        self.epoch, self.step = values["epoch"], values["step"]
        self.skipped_in_a_row = values["skipped_in_a_row"]
        for parameter in self.sets.tensors(TRAINED):
            self.optimizer.state[parameter]["step"].fill_(self.step)

    # --- one epoch ---

    def run_epoch(self) -> Row:
        """Train one epoch and return its row of metrics. Raises Interrupted when a stop was asked for."""
        started = time.perf_counter()
        self.seconds.clear()
        epoch = self.epoch
        batch = self._rollout(epoch)
        batch, advantage, reward_row = self._collect(batch, self._score(batch))
        if not self._gated:
            gate_reference(self, batch)
            self._gated = True
        totals = self.optimize(epoch, batch, advantage)
        decays = self._move_snapshots(epoch)
        self.epoch += 1
        elapsed = time.perf_counter() - started
        return {
            "epoch": epoch,
            "step": self.step,
            **totals,
            **reward_row,
            **decays,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.prepared.row(),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "samples_per_second": len(batch.latents) / elapsed,
        }

    def _rollout(self, epoch: int) -> RolloutBatch:
        """This rank's share of the epoch's samples."""
        rollout = self.recipe.rollout
        prompt_ids, group_ids = self.sampler.samples(epoch), self.sampler.group_ids()
        mine = self.ranks.share(len(prompt_ids))
        sample_ids = epoch * len(prompt_ids) + mine
        with self._timed("rollout"), self._precision("rollout"), self.sets.rollout(self.backbone, SAMPLING):
            latents = generate(
                self.backbone,
                self.conditioning[prompt_ids[mine].to(self.backbone.device)],
                initial_noise(self.backbone, sample_ids, self.recipe.run.seed),
                steps=rollout.steps,
                guidance_scale=rollout.guidance_scale,
                solver=rollout.solver,
                unconditional=self.unconditional,
                batch=rollout.batch,
                on_batch=lambda _: self._stop_if_asked(),
            )
        return RolloutBatch(latents, prompt_ids[mine], group_ids[mine], sample_ids)

    def _score(self, batch: RolloutBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rewards and diagnostics of this rank's samples."""
        chosen = batch.prompt_ids.tolist()
        prompts = [self.prompts.prompts[i] for i in chosen]
        metadata = [self.prompts.metadata[i] for i in chosen]
        with self._timed("decode"):
            pieces = batch.latents.split(self.recipe.rollout.decode_batch)
            images = torch.cat([self._decode(piece) for piece in pieces])
        scores: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        with self._timed("reward"), self.ranks.together("scoring the rollout"):
            for name, reward in self.rewards.items():
                score = score_batch if images.ndim == 4 else score_frames
                result = score(reward, images, prompts, metadata)
                scores[name] = result.pop(name)
                diagnostics |= {f"{name}_{key}": value for key, value in result.items()}
        self._stop_if_asked()
        return scores, diagnostics

    def _decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), or the frames (B, F, 3, H, W) of videos that rewards see, on the host."""
        pictures = self.backbone.decode(latents)
        if pictures.ndim == 5:
            count = min(self.recipe.rollout.scored_frames, pictures.shape[1])
            pictures = pictures[:, torch.linspace(0, pictures.shape[1] - 1, count).round().long()]
        return pictures.cpu()

    def _collect(self, batch: RolloutBatch, scores: tuple[dict[str, Tensor], ...]) -> tuple[RolloutBatch, Tensor, Row]:
        """The whole epoch's samples on every rank, with their advantages."""
        prompt_ids, group_ids = self.sampler.samples(self.epoch), self.sampler.group_ids()
        count = len(prompt_ids)
        with self._timed("exchange"):
            latents = self.ranks.gather(batch.latents, count)
            everyone = [
                {name: self.ranks.gather(value, count) for name, value in sorted(part.items())} for part in scores
            ]
        rewards = {name: everyone[0][name] for name in self.rewards}
        algorithm = self.recipe.algorithm
        outcome = advantages(
            rewards,
            {name: settings.spec for name, settings in self.recipe.rewards.items()},
            group_ids,
            mode=algorithm.advantage_mode,
            scope=algorithm.advantage_scope,
        )
        row = {
            "reward": {name: stats.mean for name, stats in outcome.stats.items()},
            "reward_std": {name: stats.group_std for name, stats in outcome.stats.items()},
            "reward_zero_std_share": {name: stats.zero_std_share for name, stats in outcome.stats.items()},
            "reward_diagnostics": {name: value.mean().item() for name, value in everyone[1].items()},
        }
        whole = RolloutBatch(latents, prompt_ids, group_ids, self.epoch * count + torch.arange(count))
        return whole, outcome.advantages, row

    def optimize(self, epoch: int, batch: RolloutBatch, advantage: Tensor) -> Row:
        train = self.recipe.train
        plan = list(
            micro_steps(
                train,
                kl_fraction=self.recipe.algorithm.kl_fraction if self.loss_config.kl_coef > 0 else 0.0,
                schedule=self.backbone.rollout_sigmas(self.recipe.rollout.steps)[:-1],
                seed=self.recipe.run.seed,
                epoch=epoch,
                rank=self.ranks.rank,
                ranks=self.ranks.world,
            )
        )
        started, self._predicted = time.perf_counter(), 0.0
        accumulation = len(plan) // (train.updates * train.inner_epochs)
        rows: list[Tensor] = []
        norms, skipped = [], 0
        self._frozen.clear()
        names: list[str] = []
        for micro in plan:
            self._stop_if_asked()
            out = self._micro_step(batch, advantage, micro)
            with self._timed("backward"):
                self.sets.before_backward(micro.last)
                (out.loss / accumulation).backward()
            rows.append(torch.stack(list(out.metrics.values())))
            names = list(out.metrics)
            if micro.last:
                norm, taken = self._update(batch, micro)
                skipped += not taken
                if taken:
                    norms.append(norm)
        self._frozen.clear()
        metrics = epoch_metrics(names, self.ranks.everyone(torch.stack(rows).cpu()))
        metrics |= {"grad_norm": sum(norms) / max(len(norms), 1), "skipped_steps": skipped}
        return metrics | self._throughput(time.perf_counter() - started)

    def _micro_step(self, batch: RolloutBatch, advantage: Tensor, micro: MicroStep) -> crd_fast.CRDOutput:
        device, train = self.backbone.device, self.recipe.train
        x0, sigma = batch.latents[micro.rows.to(batch.latents.device)], micro.sigma.to(device)
        noise_ids = batch.sample_ids[micro.rows]
        if train.shared_noise:
            noise_ids = noise_ids - micro.rows % train.group_size  # that of the group's first sample
        noise_ids = noise_ids + (micro.draw << DRAW_SHIFT)
        with self._timed("noise"):
            fwd = crd_fast.noise(x0, sigma, seed=self.recipe.run.seed, sample_ids=noise_ids.to(device))
        prompts = self.conditioning[batch.prompt_ids[micro.rows].to(device)]
        with self._timed("no_grad"):
            old, anchor = self._frozen_predictions(fwd, prompts, micro)
        self._predicted += len(x0) * TRAINED_PASSES[train.parameters]
        with self._timed("forward"), self._precision("train"):
            f_theta = self.sets.predict(self.backbone, [(TRAINED, len(x0))], fwd.x_t, sigma, prompts)
        group_ids = batch.group_ids[micro.rows] * train.timesteps + micro.timesteps
        with self._timed("loss"):
            return crd_fast.loss(
                f_theta,
                fwd,
                old=old,
                advantages=advantage[micro.rows].to(device),
                group_ids=group_ids.to(device),
                **anchor,
                process_group=self.centering_group,
                config=self.loss_config,
            )

    def _frozen_predictions(
        self, fwd: crd_fast.Noised, prompts: Conditioning, micro: MicroStep
    ) -> tuple[crd_fast.ResidualStats, dict[str, Any]]:
        """What the loss needs of the old and the reference model; made once where later passes have the same noise."""
        if not self.recipe.train.fixed_noise:
            return self._predict_frozen(fwd, prompts, micro)
        if micro.index not in self._frozen:
            self._frozen[micro.index] = self._predict_frozen(fwd, prompts, micro)
        return self._frozen[micro.index]

    @torch.no_grad()
    def _predict_frozen(
        self, fwd: crd_fast.Noised, prompts: Conditioning, micro: MicroStep
    ) -> tuple[crd_fast.ResidualStats, dict[str, Any]]:
        """One pass over [old | reference conditional | reference unconditional] rows.

        Of the old prediction the two statistics are kept. The anchor, the loss's arguments about the reference, has
        the rows of `micro.anchored`; its other rows are zero and have no KL weight.
        """
        count, scale = len(fwd.x_t), self.recipe.algorithm.guidance_scale
        anchored = micro.anchored.nonzero().flatten().to(fwd.x_t.device)
        guided = self.backbone.is_guided(scale)
        copies = 0 if len(anchored) == 0 else 1 + guided
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

        weights = torch.zeros(count, device=x.device).index_fill_(0, anchored, count / len(anchored))
        references = predictions[count:].split(len(anchored))
        if guided and self.backbone.guidance == "linear":
            return old, {
                "ref": spread(references[0]),
                "ref_uncond": spread(references[1]),
                "guidance_scale": self.backbone.linear_scale(scale),
                "kl_weights": weights,
            }
        ref = self.backbone.guide(references[0], references[1], scale) if guided else references[0]
        return old, {"ref": spread(ref), "kl_weights": weights}

    def _predict_rows(
        self, plan: list[tuple[str, int]], x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Old and reference rows, in one pass unless their precisions differ."""
        self._predicted += len(x)
        if len(plan) == 1 or self.prepared.precisions.equal("old", "ref"):
            with self._precision("old"):
                return self.sets.predict(self.backbone, plan, x, sigma, conditioning)
        cut = plan[0][1]
        pieces = ((slice(cut), "old", plan[:1]), (slice(cut, None), "ref", plan[1:]))
        parts = []
        for rows, role, own in pieces:
            with self._precision(role):
                parts.append(self.sets.predict(self.backbone, own, x[rows], sigma[rows], conditioning[rows]))
        return torch.cat(parts)

    def _precision(self, role: str) -> AbstractContextManager[None]:
        return self.prepared.precisions.use(role)

    def _update(self, batch: RolloutBatch, micro: MicroStep) -> tuple[float, bool]:
        """One optimiser step, or none when the gradient is not finite. Returns its norm and whether it was taken."""
        train = self.recipe.train
        with self._timed("optimizer"):
            self.sets.average_gradients(self.ranks)
            total = torch.nn.utils.clip_grad_norm_(self.sets.tensors(TRAINED), train.max_grad_norm)
            norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
            finite = math.isfinite(norm)
            if finite:
                for group in self.optimizer.param_groups:
                    group["lr"] = self._learning_rate()
                self.optimizer.step()
                self.step += 1
                self.skipped_in_a_row = 0
            else:
                self.skipped_in_a_row += 1
            self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= train.max_skipped:
            prompts = sorted({self.prompts.prompts[i] for i in batch.prompt_ids[micro.rows].tolist()})
            raise NonFiniteError(
                f"{self.skipped_in_a_row} optimiser steps in a row had a gradient that is not finite "
                f"(epoch {self.epoch}, sigma {micro.sigma.min():.3f} to {micro.sigma.max():.3f}, prompts such as "
                f"{prompts[0]!r}): lower train.lr, or look at the rewards and the model's predictions"
            )
        return norm, finite

    def _throughput(self, seconds: float) -> Row:
        """Arithmetic of this rank's updates a second, and its share of the device's peak where that is known."""
        achieved = self._predicted * self.prepared.forward_flops / seconds
        peak = peak_flops(self.backbone.device)
        return {"tflops_per_second": achieved / 1e12} | ({} if peak is None else {"mfu": achieved / peak})

    def _learning_rate(self) -> float:
        """Up over `warmup` steps, then flat, then down over the last `cooldown` epochs."""
        train = self.recipe.train
        rising = (self.step + 1) / max(train.warmup, 1)
        falling = (train.epochs - self.epoch) / max(train.cooldown, 1)
        return train.lr * min(1.0, rising, falling)

    def _move_snapshots(self, epoch: int) -> Row:
        snapshots = self.recipe.snapshots
        decays = {OLD: snapshots.old.at(epoch), SAMPLING: snapshots.sampling.at(epoch)}
        for slot, decay in decays.items():
            self.sets.update_snapshot(slot, decay)
        return {f"{slot}_decay": decay for slot, decay in decays.items()}

    def _stop_if_asked(self) -> None:
        """Raises Interrupted on every rank when one of them got a signal."""
        if self.ranks.any(self.stop.asked):
            self.stop.interrupt()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds wall seconds to a phase. On a GPU work is queued, so a phase shows the time until the next wait."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started
