"""GenEval's strict rule on the shapes world, as a smooth score: what a differentiable reward needs.

The exact detector behind `geneval` has no gradient. Here a small network (`crd_fast.shapes.judge`) says how likely each
asked fact is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.errors import CheckpointError, ConfigError, DataError, RewardError
from crd_fast.rewards.base import Metadata
from crd_fast.rewards.clip_embedding import check_counts
from crd_fast.rewards.geneval import check_metadata
from crd_fast.shapes.judge import LOGIT_CAP, SIZES, Fact, Judge, check_pictures, fact_scores, facts, load_judge


@dataclass(frozen=True)
class ShapesJudgeOptions:
    """model: folder of the judge's weights. device: None takes the GPU if there is one."""

    model: str = "models/shapes-judge"
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("rewards.shapes_judge.model is '': expected the folder of the judge's weights")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


class ShapesJudge:
    """Mean log-probability of the facts that GenEval's strict rule asks of an image; see `Reward`.

    Times the number of facts it is log P(right | image), so a model tilted by e^(r/β) leans towards p(image | right).
    Unlike the probability it has a gradient where an image is wrong; unlike a plain logarithm it is bounded, by the
    judge's cap on its logits. The diagnostic `strict` is P(right | image).

    Both paths are the same arithmetic in float32: images are neither rounded nor resized.
    """

    name = "shapes_judge"
    requires: frozenset[str] = frozenset({"include"})
    differentiable = True
    range: tuple[float, float] | None = (-2 * LOGIT_CAP - math.log(max(SIZES)), 0.0)

    def __init__(self, options: ShapesJudgeOptions) -> None:
        self._options = options
        self._judge: Judge | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """Raises RewardError for images of another size or type, and names an item that the judge cannot score."""
        with torch.no_grad():
            mean, joint = self._score(images, prompts, metadata)
        return {self.name: mean.cpu(), "strict": joint.exp().cpu()}

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return self._score(images, prompts, metadata)[0].to(images.device)

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Raises DataError for what the judge's questions do not cover, such as a text."""
        check_metadata(metadata)
        facts(metadata)

    def _score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        check_counts(self.name, images, prompts, metadata)
        asked = [self._facts(index, *item) for index, item in enumerate(zip(prompts, metadata, strict=True))]
        try:
            check_pictures(images)
        except ValueError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        if self._judge is None:
            try:
                self._judge = load_judge(self._options.model).to(self._options.torch_device)
            except CheckpointError as error:
                raise RewardError(f"reward {self.name!r}: {error}") from error
        return fact_scores(self._judge(images.to(self._options.torch_device)), asked)

    def _facts(self, index: int, prompt: str, entry: Metadata) -> list[Fact]:
        try:
            self.check_prompt(prompt, entry)
            return facts(entry)
        except DataError as error:
            raise RewardError(f"reward {self.name!r}: item {index}, prompt {prompt!r}: {error}") from error
