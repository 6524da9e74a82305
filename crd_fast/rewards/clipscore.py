"""How well an image matches its prompt, by CLIP.

Source: Radford et al. (arXiv 2103.00020) for the model, Hessel et al., "CLIPScore" (arXiv 2104.08718) for its use as a
score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from crd_fast.rewards.base import Metadata
from crd_fast.rewards.clip_embedding import ClipEmbedder, ClipOptions, check_counts


@dataclass(frozen=True)
class ClipScoreOptions(ClipOptions):
    """See `ClipOptions`."""

    model: str = "openai/clip-vit-large-patch14"


class ClipScore:
    """The cosine of the image's and the prompt's embeddings; see `Reward`.

    The paper's CLIPScore is 2.5 max(cosine, 0), of ViT-B/32 and of "A photo depicts " before the text; with scale 2.5
    and clip (0, null), its formula is reached on this model and the bare prompt.
    """

    name = "clipscore"
    requires: frozenset[str] = frozenset()
    differentiable = True
    range: tuple[float, float] | None = (-1.0, 1.0)

    def __init__(self, options: ClipScoreOptions) -> None:
        self.embedder = ClipEmbedder(self.name, options)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        check_counts(self.name, images, prompts, metadata)
        return {self.name: self.embedder.cosines(images, prompts)}

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        check_counts(self.name, images, prompts, metadata)
        return self.embedder.differentiable_cosines(images, prompts)
