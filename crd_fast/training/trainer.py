"""The CRD trainer: roll out, score, regress the centered implicit reward, move the snapshots.

One epoch, as in arXiv 2603.14128: samples of `groups` prompts from the *sampling* snapshot; rewards and advantages;
for each micro-step fresh seeded noise, one pass without gradients over [old | reference conditional | reference
unconditional] rows, one pass with gradients, the loss, and an optimiser step every few micro-steps; then both
snapshots move.

Where it departs from the paper: noise levels are stratified over the epoch and shared within a group, and so may be
the noise (`shared_noise`); a group that does not fit into a micro-step is centered as a whole, by a pass ahead of its
parts; the anchor may be evaluated for a random share of the samples (`kl_fraction`, unbiased); an epoch may pass over
its samples several times (`inner_epochs`), with the same noise (`fixed_noise`).
Where it departs from the authors' public code: groups are centered per (prompt, timestep) by default; of the old
prediction two floats a sample are kept and noise is made again from its seed; adapters are rows of a bank and are never
swapped; what an optimiser step sees does not depend on the number of ranks, but for centering "batch"; the reference is
not run when kl_coef is 0; resuming restores snapshots and counters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import crd_fast
from crd_fast.acceleration.precision import FP8
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import PromptSet
from crd_fast.errors import ConfigError, NonFiniteError
from crd_fast.ranks import Ranks
from crd_fast.reference_objective import METRICS
from crd_fast.rewards.scorer import Scorer
from crd_fast.rollout import RolloutBatch
from crd_fast.snapshots import OLD, SAMPLING, SLOTS, TRAINED, ParameterSets
from crd_fast.training.config import Recipe
from crd_fast.training.experience import Experience, Explorer
from crd_fast.training.flops import TRAINED_PASSES, peak_flops
from crd_fast.training.frozen import FrozenPredictions
from crd_fast.training.metrics import epoch_metrics
from crd_fast.training.optimizer import GuardedAdamW
from crd_fast.training.phases import Phases
from crd_fast.training.plan import MicroStep, check_ranks, micro_steps
from crd_fast.training.prepare import Prepared
from crd_fast.training.reference_gate import gate_reference
from crd_fast.training.step_inputs import StepInputs, step_inputs
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
        scorer: Scorer,
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
        self.stop = stop
        self.ranks = ranks
        train = recipe.train
        check_ranks(train, ranks.world)
        self.phases = Phases()
        self.explorer = Explorer(
            recipe,
            backbone,
            sets,
            prepared,
            prompts,
            conditioning,
            unconditional,
            scorer,
            stop,
            ranks,
            self.phases,
        )
        self.frozen = FrozenPredictions(
            backbone,
            sets,
            prepared.precisions,
            unconditional,
            recipe.algorithm.guidance_scale,
            keep=train.fixed_noise,
        )
        self.loss_config = recipe.algorithm.loss_config()
        # where a group, or a batch that is centered as one, is spread over ranks
        by_batch = self.loss_config.centering == "batch"
        spread = train.micro_batch % train.group_size != 0 or by_batch
        if by_batch and ranks.world * train.micro_batch == 1:
            raise ConfigError(
                "algorithm.centering is 'batch' but a micro-step has one sample (train.micro_batch 1 on 1 rank), with "
                "nothing to be compared with: raise train.micro_batch, or use centering 'prompt'"
            )
        # micro-steps that hold the parts of one group
        self.parts = 1 if by_batch else max(1, train.group_size // (ranks.world * train.micro_batch))
        self.centering_group = ranks.data_group if spread else None
        self.optimizer = GuardedAdamW(
            sets, lr=train.lr, weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm
        )
        self._gated = prepared.precisions.roles["ref"] != FP8
        self.epoch = 0  # finished epochs
        self._trained = self._previewed = 0  # samples that the trained model saw in this epoch's updates

    # --- state ---

    @property
    def light(self) -> bool:
        return self.sets.light

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.optimizer.steps

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name: the sets and the optimiser's moments. Not copies."""
        state: dict[str, Tensor] = {
            f"{slot}.{name}": tensor.detach()
            for slot in SLOTS
            for name, tensor in self.sets.named_tensors(slot).items()
        }
        return state | {f"optimizer.{name}": moment for name, moment in self.optimizer.tensors().items()}

    def values(self) -> dict[str, Any]:
        """The counters that a resumed run needs; its other inputs are functions of the recipe."""
        return {"epoch": self.epoch, "step": self.step, "skipped_in_a_row": self.optimizer.skipped_in_a_row}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Continue from these counters; the tensors have been filled in place."""
        self.epoch = values["epoch"]
        self.optimizer.set_counts(values["step"], values["skipped_in_a_row"])

    # --- one epoch ---

    def run_epoch(self) -> Row:
        """Train one epoch and return its row of metrics. Raises Interrupted when a stop was asked for."""
        started = time.perf_counter()
        self.phases.seconds.clear()
        epoch = self.epoch
        experience = self.explorer.explore(epoch)
        gated = self._gated
        if not gated:
            gate_reference(self, experience.batch)
            self._gated = True
        totals = self.optimize(epoch, experience)
        decays = self._move_snapshots()
        self.epoch += 1
        elapsed = time.perf_counter() - started
        return {
            "epoch": epoch,
            "step": self.step,
            **totals,
            **experience.row,
            **decays,
            "lr": self.optimizer.lr,
            **self.prepared.compiling.row(settled=gated),  # the gate may change layers that a rollout has compiled
            "seconds": {name: round(value, 4) for name, value in self.phases.seconds.items()},
            "samples_per_second": len(experience.batch.latents) / elapsed,
        }

    def optimize(self, epoch: int, experience: Experience) -> Row:
        """An epoch's updates on its samples, and their metrics."""
        train = self.recipe.train
        plan = list(
            micro_steps(
                train,
                kl_fraction=self.recipe.algorithm.kl_fraction if self.loss_config.kl_coef > 0 else 0.0,
                schedule=self.backbone.rollout_sigmas(self.recipe.rollout.steps)[:-1],
                seed=self.recipe.run.seed,
                epoch=epoch,
                valid=experience.valid,
                rank=self.ranks.rank,
                ranks=self.ranks.world,
            )
        )
        started, self._trained, self._previewed, self.frozen.predicted = time.perf_counter(), 0, 0, 0
        metrics, norms = self._updates(step_inputs(plan, experience, train, self.backbone.device), experience)
        taken = [norm for norm in norms if math.isfinite(norm)]
        row = epoch_metrics(METRICS, self.ranks.everyone(metrics.cpu()))
        row |= {"grad_norm": sum(taken) / max(len(taken), 1), "skipped_steps": len(norms) - len(taken)}
        return row | self._throughput(time.perf_counter() - started)

    def _updates(self, steps: Sequence[StepInputs], experience: Experience) -> tuple[Tensor, list[float]]:
        """All updates. Returns metrics (micro-steps, names) on the device, and the gradient's norm of each update.

        Reading that norm is the only wait for the device, once an update; a norm that is not finite was not stepped.
        """
        rows, norms = [], []
        self.frozen.forget()
        members: crd_fast.GroupMembers | None = None
        for number, step in enumerate(steps):
            self.stop.check(self.ranks)
            if self.parts > 1 and number % self.parts == 0:
                members = self._members(experience.batch.latents, steps[number : number + self.parts])
            out = self._micro_step(experience.batch.latents, step, members)
            with self.phases.timed("backward"):
                self.sets.before_backward(step.plan.last)
                (out.loss * step.plan.scale).backward()
            rows.append(torch.stack([out.metrics[name] for name in METRICS]))
            if step.plan.last:
                norms.append(self._update(experience.batch, step.plan))
        self.frozen.forget()
        return torch.stack(rows), norms

    @torch.no_grad()
    def _members(self, latents: Tensor, parts: Sequence[StepInputs]) -> crd_fast.GroupMembers:
        """What every part of a group has to know of the others: the group is centered as a whole, over all ranks."""
        self.frozen.release()
        found = []
        for step in parts:
            fwd, prompts = self._noised(latents, step), self.conditioning[step.prompt_ids]
            with self.phases.timed("no_grad"):
                old, _ = self.frozen.predict(fwd, prompts, step, again=True)
            self._previewed += len(fwd.x_t)
            with self.phases.timed("preview"):
                found.append(
                    crd_fast.group_members(
                        self._predict_trained(fwd, prompts),
                        fwd,
                        old=old,
                        advantages=step.advantages,
                        group_ids=step.group_ids,
                        sample_weights=step.weights,
                        process_group=self.centering_group,
                        config=self.loss_config,
                    )
                )
        return crd_fast.GroupMembers.cat(found)

    def _micro_step(
        self, latents: Tensor, step: StepInputs, members: crd_fast.GroupMembers | None
    ) -> crd_fast.CRDOutput:
        fwd, prompts = self._noised(latents, step), self.conditioning[step.prompt_ids]
        with self.phases.timed("no_grad"):
            old, anchor = self.frozen.predict(fwd, prompts, step)
        self._trained += len(fwd.x_t)
        with self.phases.timed("forward"):
            f_theta = self._predict_trained(fwd, prompts)
        with self.phases.timed("loss"):
            return crd_fast.loss(
                f_theta,
                fwd,
                old=old,
                advantages=step.advantages,
                group_ids=step.group_ids,
                **anchor,
                sample_weights=step.weights,
                members=members,
                process_group=self.centering_group if members is None else None,
                config=self.loss_config,
            )

    def _noised(self, latents: Tensor, step: StepInputs) -> crd_fast.Noised:
        with self.phases.timed("noise"):
            return crd_fast.noise(latents[step.rows], step.sigma, seed=self.recipe.run.seed, sample_ids=step.noise_ids)

    def _predict_trained(self, fwd: crd_fast.Noised, prompts: Conditioning) -> Tensor:
        with self._precision("train"):
            return self.sets.predict(self.backbone, [(TRAINED, len(fwd.x_t))], fwd.x_t, fwd.sigma, prompts)

    def _precision(self, role: str) -> AbstractContextManager[None]:
        return self.prepared.precisions.use(role)

    def _update(self, batch: RolloutBatch, micro: MicroStep) -> float:
        """One optimiser step, or none when the gradient is not finite. Returns the gradient's norm."""
        train = self.recipe.train
        with self.phases.timed("optimizer"):
            norm = self.optimizer.step(self.ranks, self._learning_rate())
        if self.optimizer.skipped_in_a_row >= train.max_skipped:
            prompts = sorted({self.prompts.prompts[i] for i in batch.prompt_ids[micro.rows].tolist()})
            raise NonFiniteError(
                f"{self.optimizer.skipped_in_a_row} optimiser steps in a row had a gradient that is not finite "
                f"(epoch {self.epoch}, sigma {micro.sigma.min():.3f} to {micro.sigma.max():.3f}, prompts such as "
                f"{prompts[0]!r}): lower train.lr, or look at the rewards and the model's predictions"
            )
        return norm

    def _throughput(self, seconds: float) -> Row:
        """Arithmetic of this rank's updates a second, and its share of the device's peak where that is known."""
        passes = self.frozen.predicted + self._previewed + self._trained * TRAINED_PASSES[self.recipe.train.parameters]
        achieved = passes * self.prepared.forward_flops / seconds
        peak = peak_flops(self.backbone.device)
        return {"tflops_per_second": achieved / 1e12} | ({} if peak is None else {"mfu": achieved / peak})

    def _learning_rate(self) -> float:
        """Up over `warmup` steps, then flat, then down over the last `cooldown` epochs."""
        train = self.recipe.train
        rising = (self.step + 1) / max(train.warmup, 1)
        falling = (train.epochs - self.epoch) / max(train.cooldown, 1)
        return train.lr * min(1.0, rising, falling)

    def _move_snapshots(self) -> Row:
        snapshots = self.recipe.snapshots
        decays = {OLD: snapshots.old.at(self.step), SAMPLING: snapshots.sampling.at(self.step)}
        for slot, decay in decays.items():
            self.sets.update_snapshot(slot, decay)
        return {f"{slot}_decay": decay for slot, decay in decays.items()}
