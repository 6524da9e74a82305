"""CRD in Flow-Factory (up to a0b2bc5, May 2026) with crd-fast's loss: one line of the YAML changes.

    train:
      trainer_type: dropin.flow_factory.CRDFastTrainingArguments    # was: crd
      crd_centering: batch                                          # optional, see below

    PYTHONPATH=/path/to/crd-fast/examples ff-train config.yaml

Put `examples` on the path, never `examples/dropin`: this file would then hide the project of the same name.

Flow-Factory looks `trainer_type` up twice, first as the class of the training arguments, then as the class of the
trainer. The YAML therefore names the arguments; they name `CRDFastTrainer`. All other keys keep their meaning.

What the trainer does differently:

- Noise is made again from a seed, and an old prediction leaves two floats a sample. Nothing of the size of a latent is
  kept from one pass to the next.
- Old parameters are swapped in once an inner epoch, the reference's once a batch, and the latter only if kl_beta > 0.
- Autocast is entered for each prediction. Around a whole pass it goes on using the weights it cast first, swapped
  and updated or not, when the trained weights are float32 (master_weight_dtype: fp32).
- x_t and the velocity target are computed in float32 and rounded once; the published code rounds the noise to the dtype
  of the latents first.

What it leaves out: the metrics old_kl_div and old_deviate, which need the old prediction itself, kl_div and kl_loss if
kl_beta is 0, and adv_clip_range with two different bounds. At weight_temp 0 it takes the samples below the middle for
the negative direction, and the mean of either side; the published code finds no sample there and weighs by a softmax.

`crd_centering: batch`, the default, is the published behaviour: everything that all ranks hold in one step is one
group. `crd_centering: prompt` centers within each prompt, as the paper does (arXiv 2603.14128), and all ranks train
on the same timesteps. A prompt's samples center with those of the same step only, and a sample alone in its group has
no policy gradient: watch train/singleton_groups, and choose per_device_batch_size times the ranks accordingly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flow_factory.hparams import CRDTrainingArguments
from flow_factory.samples import BaseSample

try:
    from flow_factory.trainers.crd import CRDTrainer
except ModuleNotFoundError as error:
    raise ImportError(
        "this trainer is for Flow-Factory up to commit a0b2bc5 of May 2026, which has flow_factory.trainers.crd. Later "
        "versions have trainers/rl/crd.py, whose predictions are dicts of components: check that commit out, or call "
        "crd_fast.loss there once for each component and add up"
    ) from error
from flow_factory.utils.dist import reduce_loss_info
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

import crd_fast

LOGGED = {
    "policy_loss": "policy_loss",
    "kl_div": "kl",
    "kl_loss": "kl_loss",
    "r_theta_mean": "implicit_reward_mean",
    "loss": "loss",
    "singleton_groups": "singleton_groups",
}
"""Flow-Factory's name -> the name in `CRDOutput.metrics`."""


@dataclass
class CRDFastTrainingArguments(CRDTrainingArguments):
    """Flow-Factory's CRD arguments and the scope of centering. Wrong values are refused before a model is loaded."""

    crd_centering: str = field(default="batch", metadata={"help": "Center within 'batch' or within each 'prompt'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trainer_type = f"{CRDFastTrainer.__module__}.{CRDFastTrainer.__qualname__}"
        crd_config(self)


def crd_config(training_args: CRDFastTrainingArguments) -> crd_fast.CRDConfig:
    """Flow-Factory's names as ours. kl_cfg is missing on purpose: their adapter returns a guided reference.

    Raises:
        ValueError: adv_clip_range is not symmetric, or a value is outside the range that `CRDConfig` allows.
    """
    low, high = training_args.adv_clip_range
    if low != -high:
        raise ValueError(
            f"adv_clip_range: expected a symmetric pair like (-5.0, 5.0), got ({low}, {high}); "
            "advantages are mapped to [0, 1] with one clip range, so give one number"
        )
    return crd_fast.CRDConfig(
        beta=training_args.crd_beta,
        kl_coef=training_args.kl_beta,
        adv_clip=high,
        adaptive_weight=training_args.adaptive_logp,
        adaptive_kl=training_args.reward_adaptive_kl,
        temperature=math.inf if training_args.weight_temp < 0 else training_args.weight_temp,
        loss_type=training_args.crd_loss_type,
        centering=training_args.crd_centering,
    )


def noise_seed(seed: int, epoch: int) -> int:
    """The run's seed moved on by the epoch, so that no epoch repeats another's noise."""
    return (seed + epoch) % 2**64


def sample_ids(count: int, rank: int, ranks: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int64, one identity for each of this rank's samples; no two ranks share one, whatever their counts."""
    return torch.arange(count, device=device) * ranks + rank


def group_ids(prompt_ids: Tensor, timesteps: Tensor) -> Tensor:
    """One id for each (prompt, timestep): (B,) int64 of (B,) int64 and (B,) float timesteps.

    An odd factor permutes the int64, so one prompt at two timesteps never has one id; two prompts keep the distance of
    their own 64-bit ids.
    """
    bits = timesteps.float().view(torch.int32).long()
    return prompt_ids ^ (bits * 0x1E3779B97F4A7C15)


@dataclass
class TrainingBatch:
    """Samples of one forward pass, and all that the two passes share about them.

    inputs: what the adapter takes, as `BaseSample.stack` makes it. sample_ids, prompt_ids: (B,) int64. timesteps:
    (T, B) in [0, 1000]. old: the statistics of the old prediction, one entry a timestep, filled by the first pass.
    """

    inputs: dict[str, Any]
    sample_ids: Tensor
    prompt_ids: Tensor
    timesteps: Tensor
    seed: int
    first_stream: int
    old: list[crd_fast.ResidualStats] = field(default_factory=list)

    def noised(self, step: int) -> crd_fast.Noised:
        """The clean latents at timestep number `step`: the same noise in every call."""
        device = self.sample_ids.device
        x0 = self.inputs["all_latents"][:, -1].to(device)  # (B, *latent)
        sigma = (self.timesteps[step] / 1000).clamp(0, 1)
        stream = self.first_stream + step
        return crd_fast.noise(x0, sigma, seed=self.seed, sample_ids=self.sample_ids, stream=stream)


class CRDFastTrainer(CRDTrainer):
    """`CRDTrainer` whose optimisation keeps no noise and no predictions. Rollouts and snapshots are Flow-Factory's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.crd_config = crd_config(self.training_args)

    def optimize(self, samples: list[BaseSample]) -> None:
        """Two passes an inner epoch: the old model's residual statistics, then the training steps."""
        for inner_epoch in range(self.training_args.num_inner_epochs):
            batches = self._batches(samples, inner_epoch)
            self._measure_old(batches)
            self._train(batches)

    def _sample_timesteps(self, batch_size: int) -> Tensor:
        """(T, B) in [0, 1000]. Per-prompt centering compares samples across ranks, so rank 0 draws for all."""
        timesteps = super()._sample_timesteps(batch_size).to(self.accelerator.device).contiguous()
        if self.crd_config.centering == "prompt" and dist.is_initialized():
            dist.broadcast(timesteps, src=0)
        return timesteps

    def _batches(self, samples: Sequence[BaseSample], inner_epoch: int) -> list[TrainingBatch]:
        accelerator, size = self.accelerator, self.training_args.per_device_batch_size
        device = accelerator.device
        ids = sample_ids(len(samples), accelerator.process_index, accelerator.num_processes, device)
        batches = []
        for first in range(0, len(samples), size):
            members = samples[first : first + size]
            batches.append(
                TrainingBatch(
                    inputs=BaseSample.stack(members),
                    sample_ids=ids[first : first + size],
                    prompt_ids=torch.tensor([s.unique_id for s in members], dtype=torch.int64, device=device),
                    timesteps=self._sample_timesteps(len(members)),
                    seed=noise_seed(self.training_args.seed, self.epoch),
                    first_stream=inner_epoch * self.num_train_timesteps,
                )
            )
        return batches

    def _predict(self, batch: TrainingBatch, step: int, fwd: crd_fast.Noised, **guidance: float | None) -> Tensor:
        # Autocast remembers cast weights until its outermost region ends, and would miss that they were swapped.
        with self.autocast():
            return self._compute_crd_output(batch.inputs, batch.timesteps[step], fwd.x_t, **guidance)["noise_pred"]

    @torch.no_grad()
    def _measure_old(self, batches: list[TrainingBatch]) -> None:
        self.adapter.rollout()
        if self.use_old_for_loss:
            old_parameters = self.adapter.use_named_parameters(self._OLD_PARAMS_NAME)
        else:
            old_parameters = self.adapter.use_ref_parameters()
        with old_parameters:
            for batch in self._progress(batches, "Old predictions"):
                for step in range(self.num_train_timesteps):
                    fwd = batch.noised(step)
                    batch.old.append(crd_fast.residual_stats(self._predict(batch, step, fwd), fwd))

    @torch.no_grad()
    def _reference_predictions(self, batch: TrainingBatch) -> list[Tensor | None]:
        """The guided reference at each timestep of one batch, (B, *latent), or None where no KL term wants it."""
        steps = range(self.num_train_timesteps)
        if not self.enable_kl_loss:
            return [None for _ in steps]
        guidance = self.kl_cfg if self.kl_cfg > 1.0 else None
        with self.adapter.use_ref_parameters():
            return [self._predict(batch, step, batch.noised(step), guidance_scale=guidance) for step in steps]

    def _train(self, batches: list[TrainingBatch]) -> None:
        self.adapter.train()
        logged: dict[str, list[Tensor]] = defaultdict(list)
        for batch in self._progress(batches, "Training"):
            references = self._reference_predictions(batch)
            for step in range(self.num_train_timesteps):
                with self.accelerator.accumulate(*self.adapter.trainable_components):
                    output = self._loss(batch, step, references[step])
                    for name, value in self._metrics(output).items():
                        logged[name].append(value)
                    self.accelerator.backward(output.loss)
                    if self.accelerator.sync_gradients:
                        self._optimizer_step(logged)
                        logged = defaultdict(list)

    def _loss(self, batch: TrainingBatch, step: int, reference: Tensor | None) -> crd_fast.CRDOutput:
        fwd = batch.noised(step)
        forward_pred = self._predict(batch, step, fwd)
        return crd_fast.loss(
            forward_pred,
            fwd,
            old=batch.old[step],
            advantages=batch.inputs["advantage"].to(forward_pred.device),
            group_ids=group_ids(batch.prompt_ids, batch.timesteps[step]),
            ref=reference,
            process_group=dist.group.WORLD if dist.is_initialized() else None,
            config=self.crd_config,
        )

    def _metrics(self, output: crd_fast.CRDOutput) -> dict[str, Tensor]:
        metrics = {name: output.metrics[ours] for name, ours in LOGGED.items()}
        metrics["unweighted_policy_loss"] = metrics["policy_loss"] * self.crd_config.beta / self.crd_config.adv_clip
        if not self.enable_kl_loss:
            del metrics["kl_div"], metrics["kl_loss"]
        return metrics

    def _optimizer_step(self, logged: dict[str, list[Tensor]]) -> None:
        grad_norm = self.accelerator.clip_grad_norm_(
            self.adapter.get_trainable_parameters(), self.training_args.max_grad_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = {**reduce_loss_info(self.accelerator, logged), "grad_norm": grad_norm}
        self.log_data({f"train/{name}": value for name, value in metrics.items()}, step=self.step)
        self.step += 1

    def _progress(self, batches: list[TrainingBatch], what: str) -> Any:
        return tqdm(batches, desc=f"Epoch {self.epoch} {what}", disable=not self.show_progress_bar, dynamic_ncols=True)
