"""Recipes of DIDR runs: YAML files and `key=value` overrides as frozen, validated dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from crd_fast import settings
from crd_fast.didr.reference import WEIGHTINGS
from crd_fast.didr.stages import REWARDS_AT, DIDRConfig
from crd_fast.didr.timesteps import STRATEGIES
from crd_fast.errors import ConfigError, nearest
from crd_fast.rewards import registry
from crd_fast.training.config import (
    DTYPES,
    PARAMETERS,
    AccelerationSettings,
    DataSettings,
    ModelSettings,
    RunSettings,
    check_evaluation,
    check_lora,
)
from crd_fast.training.resume import check_equal
from crd_fast.training.run_directory import RunDirectory

# Settings that a resumed run may change: they say how long, how work is cut, or what is kept at the end.
_FREE = (
    "train.epochs",
    "train.max_minutes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.micro_batch",
    "train.timeout_minutes",
    "train.towards_start",
    "decode.micro_batch",
    "decode.recompute",
    "evaluation.batch",
    "acceleration.recompute",
    "run.dir",
    "run.device",
    "run.wandb",
)


@dataclass(frozen=True)
class RewardSettings:
    """A differentiable reward by its name, and its own options. Its weight is 1 / algorithm.beta."""

    name: str
    options: Any


@dataclass(frozen=True)
class GeneratorSettings:
    """The one-step generator x0 = x_t - sigma v(x_t), x_t unit Gaussian noise as the model reads it.

    path: pipeline folder or hub id whose model it starts from and is fine-tuned from, or the folder of a model alone,
    as a run with train.parameters=full leaves in `transformer`; None is model.path, the reference's. lora: an adapter
    it starts from besides, of the rank in `lora`.
    start: where it starts, as a share in (0, 1] of the training time range: 1 is pure noise of a flow model, 0.399
    timestep 399 of SDXL's 1000.
    """

    path: str | None = None
    lora: str | None = None
    start: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1:
            raise ConfigError(f"generator.start is {self.start}: expected a share of the time range in (0, 1]")


@dataclass(frozen=True)
class AlgorithmSettings:
    """The mathematics; see `DIDRConfig`, `GaussianDamping` and `sample_times`.

    beta: temperature of the reward; None takes `beta_share` of the reward's standard deviation among images of one
    prompt, measured on the reference's images of `beta_prompts` prompts, `beta_images` of each.
    guidance_scale: of the reference, as the family's pipeline understands it.
    weighting, reward_at, guided_estimate, late_steps, max_correction, anchor: as in `DIDRConfig`. split, low, high:
    shares of the training time range.
    reward_until: share of the time range above which the reward is left out, and nothing decoded for it: what a
    sample shows is not settled there, so the reward's gradient is more noise than signal. The endpoint's reward knows
    no time and is never left out.
    curvature: kappa of the damping, 0 is none; variance: of a latent element, for the damping.
    timestep_strategy, timestep_mean, timestep_std, timestep_shift: of the times of both stages.
    """

    guidance_scale: float
    beta: float | None = None
    beta_share: float = 0.5
    beta_prompts: int = 16
    beta_images: int = 8
    weighting: str = "ikl"
    reward_at: str = "diffused"
    guided_estimate: bool = False
    split: float = 0.4
    late_steps: int = 2
    max_correction: float | None = None
    anchor: float = 0.0
    reward_until: float = 1.0
    curvature: float = 0.0
    variance: float = 1.0
    timestep_strategy: str = "uniform"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_shift: float = 1.0
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        settings.require_known("algorithm", self, "weighting", WEIGHTINGS)
        settings.require_known("algorithm", self, "reward_at", REWARDS_AT)
        settings.require_known("algorithm", self, "timestep_strategy", STRATEGIES)
        if self.beta_prompts < 1 or self.beta_images < 2:
            raise ConfigError(
                f"algorithm.beta_prompts {self.beta_prompts} and algorithm.beta_images {self.beta_images}: expected at "
                "least 1 and 2, images of one prompt are compared"
            )
        settings.require_positive("algorithm", self, "beta_share", "timestep_std", "timestep_shift", "variance")
        if not 0 < self.reward_until <= 1:
            raise ConfigError(f"algorithm.reward_until is {self.reward_until}: expected a share in (0, 1]")
        settings.require_at_least(0, "algorithm", self, "curvature")
        settings.require_finite("algorithm", self, "guidance_scale", "timestep_mean")
        if not 0 < self.low < self.high < 1:
            raise ConfigError(f"algorithm.low {self.low} and algorithm.high {self.high}: expected 0 < low < high < 1")
        self.stage_two(1.0 if self.beta is None else self.beta, guidance_scale=1.0, split=self.split)

    def stage_two(self, beta: float, guidance_scale: float, split: float) -> DIDRConfig:
        """What `stage_two` gets. guidance_scale: w of u + w (c - u). split: on the scale of its times."""
        return DIDRConfig(
            beta=beta,
            guidance_scale=guidance_scale,
            weighting=self.weighting,
            reward_at=self.reward_at,
            guided_estimate=self.guided_estimate,
            split=split,
            late_steps=self.late_steps,
            max_correction=self.max_correction,
            anchor=self.anchor,
        )


@dataclass(frozen=True)
class LoraSettings:
    """targets: endings of layer names; None takes the backbone's own."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_lora(self)


@dataclass(frozen=True)
class TrainSettings:
    """An epoch is `steps` iterations, an iteration `ta_ratio` steps of Stage I and one of Stage II, each of `batch`
    samples of all ranks together, `micro_batch` at a time on one rank.

    The first `ta_warmup` iterations are one step of Stage I alone. In the next `distil` the generator learns the
    reference without the reward. parameters: "lora", or "full" for all of the generator's and the TA's.
    lr, ta_lr: of the two; both rise linearly over their first `warmup` steps, and fall linearly towards 0 over the last
    `cooldown` of the run, a share of its iterations. ema: decay a step of the generator that is kept.
    towards_start: share of the way back to the start by which that average is moved at the end of the run, when nothing
    is trained any more: gives up some of the reward for more of the distance that it cost (WARP, arXiv 2406.16768).
    checkpoint_every: epochs; max_skipped: optimiser steps in a row that may be skipped for NaN or infinity;
    max_minutes: stop after the epoch that passes it; timeout_minutes: after which a rank that waits gives up.
    """

    parameters: str = "lora"
    epochs: int = 100
    steps: int = 10
    max_minutes: float | None = None
    batch: int = 32
    micro_batch: int = 4
    ta_ratio: int = 5
    ta_warmup: int = 500
    distil: int = 0
    lr: float = 5e-5
    ta_lr: float = 5e-5
    warmup: int = 0
    cooldown: float = 0.0
    towards_start: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 10.0
    ema: float = 0.999
    checkpoint_every: int = 10
    keep_checkpoints: int = 3
    max_skipped: int = 5
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        settings.require_known("train", self, "parameters", PARAMETERS)
        counts = ("epochs", "steps", "batch", "micro_batch", "ta_ratio", "checkpoint_every", "keep_checkpoints")
        settings.require_at_least(1, "train", self, *counts, "max_skipped")
        settings.require_at_least(0, "train", self, "ta_warmup", "distil", "warmup", "weight_decay")
        settings.require_positive("train", self, "lr", "ta_lr", "max_minutes", "timeout_minutes")
        settings.require_positive("train", self, "max_grad_norm", finite=False)
        if not 0 <= self.cooldown <= 1:
            raise ConfigError(f"train.cooldown is {self.cooldown}: expected a share of the run in [0, 1]")
        if not 0 <= self.towards_start < 1:
            raise ConfigError(f"train.towards_start is {self.towards_start}: expected a share of the way in [0, 1)")
        for name, values in (("betas", self.betas), ("ema", (self.ema,))):
            if not all(0 <= value < 1 for value in values):
                raise ConfigError(f"train.{name} is {getattr(self, name)}: expected values in [0, 1)")

    def rate(self, step: int, iteration: int) -> float:
        """What a learning rate is multiplied by, after so many steps of its network in so many iterations."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.cooldown == 0:
            return rise
        total = self.epochs * self.steps
        return rise * min(1.0, (total - iteration) / (self.cooldown * total))

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of one rank in a step. Raises ConfigError when `batch` does not divide into them."""
        together = ranks * self.micro_batch
        if self.batch % together:
            fitting = [n for n in range(1, self.batch + 1) if self.batch % (n * ranks) == 0]
            advice = f"use a micro_batch of {', '.join(map(str, fitting))}" if fitting else f"use a multiple of {ranks}"
            raise ConfigError(
                f"train.batch is {self.batch}, which {ranks} ranks with train.micro_batch {self.micro_batch} cannot "
                f"share out: {advice}"
            )
        return self.batch // together


@dataclass(frozen=True)
class DecodeSettings:
    """How pixels are made for the reward's gradient, the step's largest use of memory.

    micro_batch: samples decoded and rewarded at a time; recompute: their activations are computed again in the
    backward pass instead of kept. tiny: an `AutoencoderTiny` of diffusers, folder or hub id, that decodes instead of
    the pipeline's autoencoder, for a fraction of its memory and time; images before and after are the pipeline's.
    """

    micro_batch: int = 1
    recompute: bool = True
    tiny: str | None = None

    def __post_init__(self) -> None:
        settings.require_at_least(1, "decode", self, "micro_batch")


@dataclass(frozen=True)
class PrecisionSettings:
    """dtype of the models, "fp32" or "bf16". Adapters, copies that are trained, and all differences are fp32."""

    dtype: str = "bf16"

    def __post_init__(self) -> None:
        settings.require_known("precision", self, "dtype", DTYPES)


@dataclass(frozen=True)
class EvaluationSettings:
    """Images before and after training, of the one-step generator and of its reference in `steps` steps.

    suite: "shapes" scores them, `images` for each of its tasks; None keeps `images` of them and scores nothing but the
    reward. guidance_scale: of the reference; None is none. batch: samples at a time.
    """

    suite: str | None = None
    images: int = 16
    steps: int = 20
    guidance_scale: float | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        check_evaluation(self)


@dataclass(frozen=True)
class DIDRRecipe:
    """A whole run. `name` is the recipe file's; `model` is the reference and the TA. Without a reward the generator
    learns the reference as it is: distillation."""

    name: str
    model: ModelSettings
    data: DataSettings
    reward: RewardSettings | None
    algorithm: AlgorithmSettings
    generator: GeneratorSettings = GeneratorSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = field(default_factory=TrainSettings)
    decode: DecodeSettings = DecodeSettings()
    precision: PrecisionSettings = PrecisionSettings()
    acceleration: AccelerationSettings = AccelerationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run: RunSettings = RunSettings()

    def __post_init__(self) -> None:
        if self.train.parameters == "full" and self.generator.lora is not None:
            raise ConfigError(
                f"generator.lora is {self.generator.lora!r} but train.parameters is 'full', which has no adapter to "
                "start from: merge it into the model first, or train a LoRA"
            )
        if self.generator.lora is not None and self.train.towards_start:
            raise ConfigError(
                f"train.towards_start is {self.train.towards_start} but generator.lora is {self.generator.lora!r}: the "
                "way to an adapter is no adapter of the same rank. Merge it into the model first, or leave it at 0"
            )
        if self.generator.lora is not None and self.algorithm.anchor:
            raise ConfigError(
                f"algorithm.anchor is {self.algorithm.anchor} but generator.lora is {self.generator.lora!r}: the start "
                "is kept as a model without an adapter. Merge it into the model first, or leave the anchor at 0"
            )
        if self.evaluation.suite is not None and self.data.test_prompts is None:
            raise ConfigError("evaluation.suite is set but data.test_prompts is not: name the held-out prompts")

    def check_resumed(self, directory: RunDirectory) -> None:
        """A resumed run must be the same run. Raises ConfigError naming the keys that differ."""
        saved = build_recipe(settings.read_recipe(directory / "config.yaml"), self.name)
        # where the rates fall towards the run's end, its length is part of every step
        free = [key for key in _FREE if key != "train.epochs" or not self.train.cooldown]
        check_equal(dump_recipe(saved), dump_recipe(self), free)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> DIDRRecipe:
    """Read a YAML recipe and apply overrides like `train.lr=1e-4`.

    Raises ConfigError: no such file, YAML that does not parse, an unknown key (naming the nearest), a value of the
    wrong type or out of range.
    """
    return build_recipe(settings.read_recipe(path, overrides), Path(path).stem)


def build_recipe(tree: Mapping[str, Any], name: str) -> DIDRRecipe:
    """A recipe from nested mappings; see `load_recipe` for errors."""
    settings.require_command("didr", name, tree)
    return settings.build(DIDRRecipe, {"name": name} | dict(tree), converters={RewardSettings: _reward})


def dump_recipe(recipe: DIDRRecipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    tree = dataclasses.asdict(recipe)
    if recipe.reward is not None:
        tree["reward"] = {"name": recipe.reward.name, "options": settings.without_defaults(recipe.reward.options)}
    del tree["name"]
    return yaml.safe_dump(settings.plain(tree), sort_keys=False)


def _reward(value: Any, where: str) -> RewardSettings:
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"{where} is {value!r}: expected a section with name, one of {registry.available()}")
    for key in value:
        if key not in ("name", "options"):
            raise ConfigError(f"unknown key {where}.{key}{nearest(str(key), ['name', 'options'])}")
    name = str(value["name"])
    options = settings.build(registry.options_type(name), value.get("options") or {}, f"{where}.options")
    return RewardSettings(name, options)
