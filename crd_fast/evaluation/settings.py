"""What an evaluation is: a suite, its prompts, the settings of the images, and the models they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crd_fast.checks import SEED_LIMIT
from crd_fast.data.prompts import PromptSet
from crd_fast.errors import ConfigError
from crd_fast.evaluation.candidates import Candidate
from crd_fast.evaluation.scoring import build_options
from crd_fast.evaluation.suites import Suite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What decides an evaluation's images. images: per prompt, of the shapes suite per task; dtype: "fp32" or "bf16".

    max_sequence_length, resolution, distilled_guidance: as in `LoadOptions`. guidance_scale: as the family's pipeline
    understands it; None is none. batch: images at a time, which can change their last bit. transformer: in place of
    the model's own, see `models.load_model`. start_share: of a one-step generator, see `rollout.generate`.
    """

    model: str
    steps: int
    images: int
    transformer: str | None = None
    guidance_scale: float | None = None
    resolution: int | None = None
    max_sequence_length: int | None = None
    distilled_guidance: float | None = None
    batch: int = 64
    seed: int = 0
    dtype: str = "fp32"
    start_share: float | None = None

    def __post_init__(self) -> None:
        for name in ("images", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least 1")
        require_sampler(self.steps, self.guidance_scale, self.max_sequence_length, self.seed, self.start_share)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}: expected one of {', '.join(DTYPES)}")


def require_sampler(
    steps: int,
    guidance_scale: float | None,
    max_sequence_length: int | None,
    seed: int,
    start_share: float | None = None,
) -> None:
    """Raises ConfigError for the first number that no model can sample with; None is one unset."""
    for name, value in (("steps", steps), ("max_sequence_length", max_sequence_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: expected at least 1")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ConfigError(f"guidance_scale is {guidance_scale}: expected a finite number")
    if start_share is not None and not 0 < start_share <= 1:
        raise ConfigError(f"one step from {start_share}: expected a share of the time range in (0, 1], 1 is pure noise")
    if start_share is not None and guidance_scale is not None:
        raise ConfigError(f"guidance_scale is {guidance_scale}, but a one-step generator has no guidance: leave it out")
    if not 0 <= seed < SEED_LIMIT:
        raise ConfigError(f"seed is {seed}: expected 0 or more, and less than 2**64")


@dataclass(frozen=True)
class Evaluation:
    """A suite over candidates. out: where the page goes; each candidate has a folder of its own.

    trained: rewards that a run was trained on; their columns are marked. options: of rewards, by name. run: the run
    directory that the candidates come from.

    Raises ConfigError for a scorer or an option of one that is not known, and for another score than the suite's.
    """

    suite: Suite
    prompts: PromptSet
    settings: Settings
    candidates: tuple[Candidate, ...]
    out: Path
    scorers: tuple[str, ...]
    options: dict[str, dict[str, Any]]
    trained: frozenset[str]
    run: Path | None = None

    def __post_init__(self) -> None:
        for name in self.scorers:
            self.scorer_options(name)
            own, given = (options.get(name, {}).get("score") for options in (self.suite.options, self.options))
            if own is not None and given not in (None, own):
                raise ConfigError(
                    f"options of {name} ask for score {given!r}, but the column of suite {self.suite.name} is "
                    f"{own!r}, as the published numbers beside it: leave it out"
                )

    def scorer_options(self, name: str) -> Any:
        """A scorer's options: those given, then the suite's, then its own defaults."""
        return build_options(name, {**self.suite.options.get(name, {}), **self.options.get(name, {})})
