"""What an evaluation is: a suite, its prompts, the settings of the images, and the models they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crd_fast.data.prompts import PromptSet
from crd_fast.errors import ConfigError
from crd_fast.evaluation.candidates import Candidate
from crd_fast.evaluation.suites import Suite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What decides an evaluation's images. images: per prompt, of the shapes suite per task; dtype: "fp32" or "bf16".

    max_sequence_length, resolution, distilled_guidance: as in `LoadOptions`. guidance_scale: as the family's pipeline
    understands it; None is none. batch: images at a time, which can change their last bit.
    """

    model: str
    steps: int
    images: int
    guidance_scale: float | None = None
    resolution: int | None = None
    max_sequence_length: int | None = None
    distilled_guidance: float | None = None
    batch: int = 64
    seed: int = 0
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("steps", "images", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: expected 0 or more")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}: expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Evaluation:
    """A suite over candidates. out: where the page goes; each candidate has a folder of its own.

    trained: rewards that a run was trained on; their columns are marked. options: of rewards, by name. run: the run
    directory that the candidates come from.
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
