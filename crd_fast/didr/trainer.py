"""The DIDR trainer: the TA follows the generator, the generator follows reference and reward.

One iteration, as in "Diff-Instruct with Diffused Reward" (arXiv 2605.24001): Stage I `ta_ratio` times, a step of the TA
on fresh samples of the generator; Stage II once, a step of the generator along the difference of the TA's, the
reference's and the diffused reward's scores; the generator's moving average follows.

The paper's training code is not public; where its text is silent, this is ours: a warm-up of the TA alone, and one of
both without the reward; an anchor at the start (`DIDRConfig.anchor`); times are stratified over a batch; what a step
sees depends on settings, seed and the number of the step, not on ranks or micro-batches; a step whose gradient is not
finite is skipped and counted.
Every model is read as a rectified flow: times are noise levels of the linear path, which loses nothing, since the loss
depends on the ratio of noise to signal alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crd_fast.acceleration.compilation import CompileMetrics
from crd_fast.backbones.base import Conditioning
from crd_fast.data.prompts import PromptSet
from crd_fast.didr.diffused_reward import GaussianDamping
from crd_fast.didr.draws import Draw, draw_step
from crd_fast.didr.metrics import EpochLog, Row
from crd_fast.didr.networks import EMA, GENERATOR, START, TA, Networks, OneStep
from crd_fast.didr.recipe import DIDRRecipe
from crd_fast.didr.stages import DIDRConfig, Predict, StageTwoOutput, stage_one, stage_two
from crd_fast.didr.ta import TAOutput
from crd_fast.errors import ConfigError, NonFiniteError
from crd_fast.ranks import Ranks
from crd_fast.rewards.base import DifferentiableReward
from crd_fast.schedules import RectifiedFlow
from crd_fast.snapshots import BASE
from crd_fast.training.optimizer import GuardedAdamW
from crd_fast.training.phases import Phases
from crd_fast.training.stop import StopRequest

FLOW = RectifiedFlow()


class DIDRTrainer:
    """Everything a run carries from epoch to epoch, on one rank.

    conditioning: embeddings of all prompts, row by row; unconditional: of one empty prompt. reward: None distils the
    reference as it is. beta: the reward's temperature, which the recipe may leave to be measured.

    Raises ConfigError when a step does not divide into micro-batches over the ranks, or for guidance that the family
    does not have or combines in another way than u + w (c - u).
    """

    def __init__(
        self,
        recipe: DIDRRecipe,
        networks: Networks,
        prompts: PromptSet,
        conditioning: Conditioning,
        unconditional: Conditioning,
        reward: DifferentiableReward | None,
        beta: float,
        stop: StopRequest,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.networks, self.prompts = recipe, networks, prompts
        self.conditioning, self.unconditional = conditioning, unconditional
        self.reward, self.stop, self.ranks = reward, stop, ranks
        train, algorithm = recipe.train, recipe.algorithm
        self.micro_batches = train.micro_batches(ranks.world)
        self.generator = OneStep(networks, recipe.generator.start)
        self.optimizers = {
            slot: GuardedAdamW(
                networks.sets_of(slot),
                slot,
                lr=lr,
                betas=train.betas,
                weight_decay=train.weight_decay,
                max_grad_norm=train.max_grad_norm,
            )
            for slot, lr in ((GENERATOR, train.lr), (TA, train.ta_lr))
        }
        self.config = stage_two_config(recipe, networks, beta)
        self.damping = GaussianDamping(FLOW, algorithm.curvature, algorithm.variance) if algorithm.curvature else None
        self.compiling = CompileMetrics(networks.counters)
        self.phases = Phases()
        self.epoch = 0  # finished epochs
        self.iteration = 0  # finished iterations
        self.draws = 0  # steps that noise was drawn for

    # --- state ---

    @property
    def light(self) -> bool:
        return self.networks.light

    @property
    def step(self) -> int:
        """Optimiser steps taken, of both networks."""
        return sum(optimizer.steps for optimizer in self.optimizers.values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name: the networks and both optimisers' moments. Not copies."""
        state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in self.networks.named_tensors().items()}
        for slot, optimizer in self.optimizers.items():
            state |= {f"optimizer.{slot}.{name}": moment for name, moment in optimizer.tensors().items()}
        return state

    def values(self) -> Row:
        """The counters that a resumed run needs; its other inputs are functions of the recipe."""
        counts = {slot: [o.steps, o.skipped_in_a_row] for slot, o in self.optimizers.items()}
        return {
            "epoch": self.epoch,
            "step": self.step,
            "iteration": self.iteration,
            "draws": self.draws,
            "optimizers": counts,
        }

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Continue from these counters; the tensors have been filled in place."""
        self.epoch, self.iteration, self.draws = values["epoch"], values["iteration"], values["draws"]
        for slot, counts in values["optimizers"].items():
            self.optimizers[slot].set_counts(*counts)

    # --- one epoch ---

    def run_epoch(self) -> Row:
        """Train `train.steps` iterations and return their row. Raises Interrupted when a stop was asked for."""
        started = time.perf_counter()
        self.phases.seconds.clear()
        log = EpochLog()
        first_draw = self.draws
        for number in range(self.recipe.train.steps):
            self._iterate(log, probe=number + 1 == self.recipe.train.steps)
        self.epoch += 1
        return {
            "epoch": self.epoch - 1,
            "iteration": self.iteration,
            "step": self.optimizers[GENERATOR].steps,
            "ta_step": self.optimizers[TA].steps,
            **log.row(self.ranks, "" if self.reward is None else self.reward.name),
            "lr": self.optimizers[GENERATOR].lr,
            "ta_lr": self.optimizers[TA].lr,
            **self.compiling.row(settled=self.iteration > self.recipe.train.ta_warmup + self.recipe.train.distil),
            "seconds": {name: round(value, 4) for name, value in self.phases.seconds.items()},
            "samples_per_second": (self.draws - first_draw) * self.recipe.train.batch / (time.perf_counter() - started),
        }

    def _iterate(self, log: EpochLog, probe: bool) -> None:
        """Stage I, then Stage II. probe: measure what Stage I did to the loss of its first samples."""
        train = self.recipe.train
        warming = self.iteration < train.ta_warmup
        distilling = self.iteration < train.ta_warmup + train.distil
        first: list[Draw] = []
        for _ in range(1 if warming else train.ta_ratio):
            draws = self._draw()
            loss = self._stage_one(draws, log)
            if not first:
                first, before = draws, loss
        if probe:
            log.before_and_after.append(torch.stack([before, self._ta_loss(first)]))
        if not warming:
            taken = self._stage_two(self._draw(), None if distilling else self.reward, log)
            if taken:
                self.networks.own.update_snapshot(EMA, train.ema, GENERATOR)
        self.iteration += 1

    # --- Stage I ---

    def _stage_one(self, draws: list[Draw], log: EpochLog) -> Tensor:
        """A step of the TA. Returns its loss on this rank, on the device."""
        losses = []
        for number, draw in enumerate(draws):
            self.stop.check(self.ranks)
            with self.phases.timed("stage_one"):
                out = self._ta_output(draw)
                self._backward(TA, out.loss, last=number + 1 == len(draws))
            losses.append(out.errors.mean())
        loss = torch.stack(losses).mean()
        log.ta_losses.append(loss)
        self._step(TA, log, draws)
        return loss

    @torch.no_grad()
    def _ta_loss(self, draws: list[Draw]) -> Tensor:
        """The loss of samples that Stage I has seen, with the TA as it is now: the generator has not moved since."""
        with self.phases.timed("probe"):
            return torch.stack([self._ta_output(draw).loss for draw in draws]).mean()

    def _ta_output(self, draw: Draw) -> TAOutput:
        """The error is taken of what the model was trained to predict."""
        kind = self.networks.backbone.prediction
        generator, ta = self._generate(draw), self._predict(TA, draw)
        return stage_one(generator, ta, draw.z, draw.eps, draw.t, schedule=FLOW, kind=kind)

    # --- Stage II ---

    def _stage_two(self, draws: list[Draw], reward: DifferentiableReward | None, log: EpochLog) -> bool:
        """A step of the generator, unless its gradient is not finite or nothing of it is left. Whether it was taken."""
        usable = torch.zeros((), dtype=torch.int64, device=self.networks.backbone.device)
        for number, draw in enumerate(draws):
            self.stop.check(self.ranks)
            with self.phases.timed("stage_two"):
                out = self._generator_loss(draw, reward)
                self._backward(GENERATOR, out.loss, last=number + 1 == len(draws))
            usable += out.x0.numel() - out.generator.zeroed.sum()
            log.add(draw.shares, out)
        if not self.ranks.any(int(usable) > 0):  # every element was replaced: its zeros are no direction
            self.optimizers[GENERATOR].skip()
            log.norms[GENERATOR].append(math.nan)
            self._guard(GENERATOR, draws)
            return False
        return self._step(GENERATOR, log, draws)

    def _generator_loss(self, draw: Draw, reward: DifferentiableReward | None) -> StageTwoOutput:
        unconditional = self.unconditional.expand(len(draw))
        rewarded = self._rewarded(draw)
        return stage_two(
            self._generate(draw),
            self._predict(TA, draw),
            self._predict(BASE, draw),
            None if reward is None else self._scorer(reward, draw.prompt_ids[rewarded]),
            draw.z,
            draw.eps,
            draw.t,
            schedule=FLOW,
            config=self.config,
            unconditional=lambda x, t: self.networks.predict(BASE, x, t, unconditional),
            damping=self.damping,
            rewarded=rewarded,
            start=lambda z: self.generator.sample(START, z, draw.conditioning),
        )

    def _rewarded(self, draw: Draw) -> Tensor:
        """Which samples the reward sees, bool (B,); the endpoint's sees all."""
        if self.config.reward_at == "endpoint":
            return torch.ones(len(draw), dtype=torch.bool)
        return draw.shares <= self.recipe.algorithm.reward_until

    def _scorer(self, reward: DifferentiableReward, prompt_ids: Tensor) -> Any:
        """Clean latents of these prompts -> rewards (B,) with graph, decoded a few at a time."""
        settings, backbone = self.recipe.decode, self.networks.backbone

        def score(latents: Tensor, ids: list[int]) -> Tensor:
            prompts = [self.prompts.prompts[i] for i in ids]
            metadata = [self.prompts.metadata[i] for i in ids]
            images = backbone.decode_with_graph(latents)
            return reward.differentiable_scores(images, prompts, metadata).to(latents.device, torch.float32)

        def score_all(latents: Tensor) -> Tensor:
            pieces = []
            for rows, ids in zip(
                latents.split(settings.micro_batch), prompt_ids.split(settings.micro_batch), strict=True
            ):
                if settings.recompute:
                    pieces.append(checkpoint(score, rows, ids.tolist(), use_reentrant=False))
                else:
                    pieces.append(score(rows, ids.tolist()))
            return torch.cat(pieces)

        return score_all

    # --- what both stages do ---

    def _draw(self) -> list[Draw]:
        """This rank's micro-batches of the next step."""
        self.draws += 1
        return draw_step(self.recipe, self.networks.backbone, self.conditioning, self.draws - 1, self.ranks)

    def _generate(self, draw: Draw) -> Any:
        return lambda z: self.generator.sample(GENERATOR, z, draw.conditioning)

    def _predict(self, slot: str, draw: Draw) -> Predict:
        return lambda x, t: self.networks.predict(slot, x, t, draw.conditioning)

    def _backward(self, slot: str, loss: Tensor, last: bool) -> None:
        self.networks.sets_of(slot).before_backward(last, slot)
        (loss / self.micro_batches).backward()

    def _step(self, slot: str, log: EpochLog, draws: list[Draw]) -> bool:
        """One optimiser step of a network; whether it was taken."""
        train, optimizer = self.recipe.train, self.optimizers[slot]
        lr = train.lr if slot == GENERATOR else train.ta_lr
        with self.phases.timed("optimizer"):
            norm = optimizer.step(self.ranks, lr * train.rate(optimizer.steps, self.iteration))
        log.norms[slot].append(norm)
        self._guard(slot, draws)
        return math.isfinite(norm)

    def _guard(self, slot: str, draws: list[Draw]) -> None:
        skipped = self.optimizers[slot].skipped_in_a_row
        if skipped >= self.recipe.train.max_skipped:
            levels = torch.cat([draw.t for draw in draws])
            raise NonFiniteError(
                f"{skipped} optimiser steps of the {slot} in a row had a gradient that is not finite (iteration "
                f"{self.iteration}, noise levels {levels.min():.3f} to {levels.max():.3f}, prompts such as "
                f"{self.prompts.prompts[int(draws[0].prompt_ids[0])]!r}): lower train.lr and train.ta_lr, or look at "
                "the reward and the models' predictions"
            )


def stage_two_config(recipe: DIDRRecipe, networks: Networks, beta: float) -> DIDRConfig:
    """The recipe's settings of Stage II in terms of its model. Raises ConfigError, see `DIDRTrainer`."""
    split = float(networks.backbone.sigma_at(torch.tensor(recipe.algorithm.split)))
    return recipe.algorithm.stage_two(beta, _linear_scale(recipe, networks), split)


def _linear_scale(recipe: DIDRRecipe, networks: Networks) -> float:
    """w of the reference u + w (c - u). Raises ConfigError for a family that guides in another way."""
    backbone, scale = networks.backbone, recipe.algorithm.guidance_scale
    if not backbone.is_guided(scale):
        return 1.0
    if backbone.guidance != "linear":
        raise ConfigError(
            f"algorithm.guidance_scale is {scale}, but {backbone.family} rescales its guidance, and the reference's "
            f"score needs u + w (c - u): set it to {backbone.unguided_scale}, which is none"
        )
    return backbone.linear_scale(scale)
