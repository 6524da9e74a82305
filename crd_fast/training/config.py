"""Recipes: YAML files and `key=value` overrides as frozen, validated dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from crd_fast import settings
from crd_fast.acceleration.attention import BACKENDS
from crd_fast.acceleration.precision import FP8, ROLES
from crd_fast.acceleration.recompute import MODES
from crd_fast.errors import ConfigError, nearest
from crd_fast.forward_process import TIMESTEP_STRATEGIES
from crd_fast.losses.config import CRDConfig
from crd_fast.rewards import registry
from crd_fast.rewards.aggregate import ADVANTAGE_MODES, ADVANTAGE_SCOPES, RewardSpec
from crd_fast.rollout import SOLVERS
from crd_fast.snapshots import DecaySchedule

PARAMETERS = ("lora", "full")
SHARDING = ("replicate", "fsdp", "hsdp")
DTYPES = ("fp32", "bf16")  # of models
SUITES = ("shapes",)


@dataclass(frozen=True)
class ModelSettings:
    """path: pipeline folder or hub id; family: None reads it from the pipeline; the others as in `LoadOptions`."""

    path: str
    family: str | None = None
    max_sequence_length: int | None = None
    resolution: int | None = None
    frames: int | None = None
    distilled_guidance: float | None = None


@dataclass(frozen=True)
class DataSettings:
    """Prompt files; `test_prompts` are held out and must not overlap `prompts`."""

    prompts: str
    test_prompts: str | None = None


@dataclass(frozen=True)
class RewardSettings:
    """How a reward enters the sum (weight, scale, shift, clip) and the scorer's own options."""

    spec: RewardSpec
    options: Any


@dataclass(frozen=True)
class AlgorithmSettings(CRDConfig):
    """The loss's settings, and how its inputs are made.

    guidance_scale: of the anchor, as the family's pipeline understands it; its unguided scale is no guidance.
    kl_fraction: share of (sample, timestep) pairs whose anchor is evaluated, weighted by its inverse.
    advantage_mode, advantage_scope, min_group: see `rewards.aggregate.advantages`.
    """

    guidance_scale: float = 4.5
    kl_fraction: float = 1.0
    advantage_mode: str = "sum"
    advantage_scope: str = "global"
    min_group: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.kl_fraction <= 1:
            raise ConfigError(f"algorithm.kl_fraction is {self.kl_fraction}: expected a share in (0, 1]")
        if self.min_group < 2:
            raise ConfigError(
                f"algorithm.min_group is {self.min_group}: expected at least 2, samples are compared in it"
            )
        settings.require_known("algorithm", self, "advantage_mode", ADVANTAGE_MODES)
        settings.require_known("algorithm", self, "advantage_scope", ADVANTAGE_SCOPES)
        if self.advantage_mode == "gdpo" and self.advantage_scope == "group":
            raise ConfigError(
                "algorithm.advantage_scope is 'group' but algorithm.advantage_mode is 'gdpo', which normalises in "
                "groups and whitens over the batch anyway: leave the scope out"
            )
        settings.require_finite("algorithm", self, "guidance_scale")
        if self.reduction != "mean" or self.prediction != "v":
            raise ConfigError("algorithm.reduction and algorithm.prediction belong to the loss: the trainer sets them")
        self.loss_config()

    def loss_config(self) -> CRDConfig:
        """What `crd_fast.loss` gets."""
        return CRDConfig(**{f.name: getattr(self, f.name) for f in fields(CRDConfig)})


@dataclass(frozen=True)
class SnapshotSettings:
    """Decays of the moving reference and of the sampler; see `DecaySchedule`."""

    old: DecaySchedule = DecaySchedule()
    sampling: DecaySchedule = DecaySchedule(initial=0.0, slope=0.0075, start=75)


@dataclass(frozen=True)
class LoraSettings:
    """targets: endings of layer names; None takes the backbone's own. path: an adapter to start from, of this rank.

    merge: rollouts add the adapter to the weights, which is faster and takes a copy of the adapted ones; never done
    where weights are sharded.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    path: str | None = None
    merge: bool = True

    def __post_init__(self) -> None:
        check_lora(self)


def check_lora(lora: Any) -> None:
    """What the adapters of both kinds of run have in common. Raises ConfigError."""
    settings.require_at_least(1, "lora", lora, "rank")
    settings.require_positive("lora", lora, "alpha")


@dataclass(frozen=True)
class RolloutSettings:
    """steps, solver: see `rollout.generate`; guidance_scale None is none; batch, decode_batch: samples at a time.

    scored_frames: of a video, evenly spaced, that rewards see; a sample's score is their mean.
    """

    steps: int = 10
    solver: str = "euler"
    guidance_scale: float | None = None
    batch: int = 64
    decode_batch: int = 8
    scored_frames: int = 4

    def __post_init__(self) -> None:
        settings.require_at_least(1, "rollout", self, "steps", "batch", "decode_batch", "scored_frames")
        settings.require_known("rollout", self, "solver", SOLVERS)
        settings.require_finite("rollout", self, "guidance_scale")


@dataclass(frozen=True)
class TrainSettings:
    """One epoch: `groups` prompts with `group_size` samples, each at `timesteps` noise levels, in `updates` steps.

    micro_batch: samples in one forward on one rank; those of all ranks together hold whole groups, or are a whole part
    of one. max_minutes: stop after the epoch that passes it. inner_epochs: passes over an epoch's samples, each in
    `updates` steps; fixed_noise: every pass has the noise and noise levels of the first, so that old and reference
    predictions are made once. sharding: "replicate" keeps the whole model on every rank, "fsdp" shards it over all of
    them, "hsdp" over the ranks of a node and replicates it over nodes. timeout_minutes: after which a rank that waits
    for another gives up.
    timestep_mean, timestep_std, timestep_shift: of the logit-normal strategy (shift also of uniform).
    shared_noise: one noise for all samples of a group at a timestep, so that what they have in common cancels in the
    centered reward. warmup: optimiser steps over which the learning rate rises; cooldown: epochs before the last over
    which it falls to zero, both linearly; a run that max_minutes ends sooner has less of it. checkpoint_every: epochs;
    max_skipped: optimiser steps in a row that may be skipped for NaN or infinity.
    """

    parameters: str = "lora"
    epochs: int = 100
    max_minutes: float | None = None
    groups: int = 48
    group_size: int = 24
    micro_batch: int = 24
    updates: int = 2
    inner_epochs: int = 1
    fixed_noise: bool = False
    sharding: str = "replicate"
    timeout_minutes: float = 10.0
    timesteps: int = 10
    timestep_strategy: str = "discrete"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_shift: float = 1.0
    shared_noise: bool = False
    lr: float = 3e-4
    warmup: int = 0
    cooldown: int = 0
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    checkpoint_every: int = 10
    keep_checkpoints: int = 3
    max_skipped: int = 5

    def __post_init__(self) -> None:
        counts = ("epochs", "groups", "micro_batch", "updates", "inner_epochs", "timesteps")
        settings.require_at_least(1, "train", self, *counts, "checkpoint_every", "keep_checkpoints", "max_skipped")
        settings.require_at_least(0, "train", self, "warmup", "cooldown", "weight_decay")
        positive = ("timestep_std", "timestep_shift", "lr", "max_minutes", "timeout_minutes")
        settings.require_positive("train", self, *positive)
        settings.require_positive("train", self, "max_grad_norm", finite=False)
        settings.require_finite("train", self, "timestep_mean")
        settings.require_known("train", self, "parameters", PARAMETERS)
        settings.require_known("train", self, "sharding", SHARDING)
        settings.require_known("train", self, "timestep_strategy", TIMESTEP_STRATEGIES)
        if self.group_size < 2:
            raise ConfigError(f"train.group_size is {self.group_size}: expected at least 2, samples are compared in it")
        if self.fixed_noise and self.inner_epochs == 1:
            raise ConfigError("train.fixed_noise keeps the noise of earlier passes: it needs train.inner_epochs > 1")
        pairs = self.groups * self.timesteps
        if pairs % self.updates:
            fitting = [n for n in range(1, pairs + 1) if pairs % n == 0]
            raise ConfigError(
                f"train.updates {self.updates} does not divide the {pairs} pairs of a group and a timestep in an "
                f"epoch: use one of {', '.join(map(str, fitting))}"
            )


@dataclass(frozen=True)
class PrecisionSettings:
    """dtype of the backbone: "fp32" or "bf16". Adapters, statistics and losses are fp32.

    train, old, ref, rollout: "fp8" for the linear layers of the blocks in passes of that kind; None is `dtype`. train
    and old must be equal, or their difference, the implicit reward, is biased. ref is measured before it is used.
    """

    dtype: str = "bf16"
    train: str | None = None
    old: str | None = None
    ref: str | None = None
    rollout: str | None = None

    def __post_init__(self) -> None:
        settings.require_known("precision", self, "dtype", DTYPES)
        for role in ROLES:
            if getattr(self, role) not in (None, self.dtype, FP8):
                raise ConfigError(
                    f"precision.{role} is {getattr(self, role)!r}: expected 'fp8', or {self.dtype!r} as precision.dtype"
                )
        roles = self.roles()
        if roles["train"] != roles["old"]:
            raise ConfigError(
                f"precision.train is {roles['train']!r} and precision.old is {roles['old']!r}: the implicit reward is "
                "their difference, so set both alike"
            )

    def roles(self) -> dict[str, str]:
        """The precision of every kind of pass."""
        return {role: getattr(self, role) or self.dtype for role in ROLES}


@dataclass(frozen=True)
class AccelerationSettings:
    """What makes passes faster and leaves what they compute.

    compile: the repeated blocks, one by one. attention: see `acceleration.attention.BACKENDS`. recompute: "off",
    "selective" or "full", activations computed again in the backward pass instead of kept.
    """

    compile: bool = False
    attention: str = "native"
    recompute: str = "off"

    def __post_init__(self) -> None:
        settings.require_known("acceleration", self, "attention", BACKENDS)
        settings.require_known("acceleration", self, "recompute", MODES)


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out evaluation before and after training; suite None skips it.

    images: per task; steps, guidance_scale: of the sampler; reference_guidance: scale at which the base is
    evaluated once more for comparison, None skips that.
    """

    suite: str | None = None
    images: int = 60
    steps: int = 20
    guidance_scale: float | None = None
    reference_guidance: float | None = None
    batch: int = 64

    def __post_init__(self) -> None:
        check_evaluation(self)
        settings.require_finite("evaluation", self, "reference_guidance")


def check_evaluation(evaluation: Any) -> None:
    """What the evaluations of both kinds of run have in common. Raises ConfigError."""
    if evaluation.suite is not None:
        settings.require_known("evaluation", evaluation, "suite", SUITES)
    settings.require_at_least(1, "evaluation", evaluation, "images", "steps", "batch")
    settings.require_finite("evaluation", evaluation, "guidance_scale")


@dataclass(frozen=True)
class RunSettings:
    """dir: None makes runs/<recipe>-<time>; seed: of everything random; device: None takes the GPU if there is one.
    wandb: project of Weights & Biases that metrics go to as well.
    """

    dir: str | None = None
    seed: int = 0
    device: str | None = None
    wandb: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run. `name` is the recipe file's."""

    name: str
    model: ModelSettings
    data: DataSettings
    rewards: dict[str, RewardSettings]
    algorithm: AlgorithmSettings = AlgorithmSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    lora: LoraSettings = LoraSettings()
    rollout: RolloutSettings = RolloutSettings()
    train: TrainSettings = field(default_factory=TrainSettings)
    precision: PrecisionSettings = PrecisionSettings()
    acceleration: AccelerationSettings = AccelerationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run: RunSettings = RunSettings()

    def __post_init__(self) -> None:
        if self.train.parameters == "full" and self.lora.path is not None:
            raise ConfigError(
                f"lora.path is {self.lora.path!r} but train.parameters is 'full', which has no adapter to start: merge "
                "it into the model first, or train a LoRA"
            )
        if not self.rewards:
            raise ConfigError(f"recipe {self.name} has no rewards: name at least one of {registry.available()}")
        if all(given.spec.weight == 0 for given in self.rewards.values()):
            raise ConfigError(
                f"rewards {', '.join(self.rewards)} all have weight 0, nothing to train on: give one a weight"
            )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides like `train.lr=1e-4`.

    Raises ConfigError: no such file, YAML that does not parse, an unknown key (naming the nearest), a value of the
    wrong type or out of range.
    """
    return build_recipe(settings.read_recipe(path, overrides), Path(path).stem)


def build_recipe(tree: Mapping[str, Any], name: str) -> Recipe:
    """A recipe from nested mappings; see `load_recipe` for errors."""
    settings.require_command("train", name, tree)
    return settings.build(Recipe, {"name": name} | dict(tree), converters={dict[str, RewardSettings]: _rewards})


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    tree = dataclasses.asdict(recipe)
    tree["rewards"] = {
        name: settings.without_defaults(chosen.spec) | settings.without_defaults(chosen.options)
        for name, chosen in recipe.rewards.items()
    }
    del tree["name"]
    return yaml.safe_dump(settings.plain(tree), sort_keys=False)


def _rewards(value: Any, where: str) -> dict[str, RewardSettings]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}: expected sections named after rewards, {registry.available()}")
    rewards = {}
    for name, section in value.items():
        options_type = registry.options_type(str(name))
        if not isinstance(section or {}, Mapping):
            raise ConfigError(f"{where}.{name} is {section!r}: expected a section of options, such as {{weight: 1}}")
        entries = dict(section or {})
        spec_names = {f.name for f in fields(RewardSpec)}
        option_names = {f.name for f in fields(options_type)}
        for key in entries:
            if key not in spec_names | option_names:
                raise ConfigError(f"unknown key {where}.{name}.{key}{nearest(str(key), spec_names | option_names)}")
        spec = {k: v for k, v in entries.items() if k in spec_names}
        options = {k: v for k, v in entries.items() if k in option_names}
        at = f"{where}.{name}"
        rewards[str(name)] = RewardSettings(
            settings.build(RewardSpec, spec, at), settings.build(options_type, options, at)
        )
    return rewards
