"""PickScore: which of two images people preferred for a prompt, learned by a CLIP model.

Source: Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation"
(arXiv 2305.01569), equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from crd_fast.rewards.base import Metadata
from crd_fast.rewards.clip_embedding import ClipEmbedder, ClipOptions, check_counts


@dataclass(frozen=True)
class PickScoreOptions(ClipOptions):
    """See `ClipOptions`; the released model is used with the processor of the one it was fine-tuned from."""

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """exp(logit_scale) cos(prompt, image), of prompts cut or padded to the model's 77 tokens; see `Reward`.

    The score is the raw one, about 20 for generated images. Recipes train on score / 26, which is `scale: 0.0384615`
    (1/26) in the reward's `RewardSpec`.
    """

    name = "pickscore"
    requires: frozenset[str] = frozenset()
    differentiable = True
    range: tuple[float, float] | None = None

    def __init__(self, options: PickScoreOptions) -> None:
        self.embedder = ClipEmbedder(self.name, options)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        check_counts(self.name, images, prompts, metadata)
        return {self.name: self.embedder.model.logit_scale * self.embedder.cosines(images, prompts)}

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        check_counts(self.name, images, prompts, metadata)
        return self.embedder.model.logit_scale * self.embedder.differentiable_cosines(images, prompts)
