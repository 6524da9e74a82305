"""Human Preference Score v2.1: which of two images people preferred for a prompt, learned by a CLIP model.

Source: Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis" (arXiv 2306.09341), and the package hpsv2 1.2 for how images are prepared.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from crd_fast.errors import RewardError
from crd_fast.rewards.base import Metadata
from crd_fast.rewards.clip_embedding import ClipEmbedder, ClipModel, ClipOptions, check_counts, normalize, resize
from crd_fast.rewards.open_clip_weights import clip_from_open_clip

CHECKPOINT = "HPS_v2.1_compressed.pt"
_REPOSITORY = "xswu/HPSv2"
_WHERE = f"download {CHECKPOINT} from https://huggingface.co/{_REPOSITORY} and give its path as rewards.hpsv2.model"


@dataclass(frozen=True)
class HPSv2Options(ClipOptions):
    """model: the checkpoint file, or a folder or hub id with HPS_v2.1_compressed.pt. processor: whose tokenizer is
    used. See `ClipOptions`."""

    model: str = _REPOSITORY
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSv2:
    """The cosine of the image's and the prompt's embeddings, about 0.20 to 0.33 for generated images; see `Reward`.

    Images are resized to fit a square by their longer side and padded with black. The authors resize floats, so the
    two paths differ by 8-bit rounding of the images and nothing else.
    """

    name = "hpsv2"
    requires: frozenset[str] = frozenset()
    differentiable = True
    range: tuple[float, float] | None = (-1.0, 1.0)

    def __init__(self, options: HPSv2Options) -> None:
        self.embedder = ClipEmbedder(self.name, options, "hpsv2", load_hpsv2, PaddedPreparation)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        check_counts(self.name, images, prompts, metadata)
        return {self.name: self.embedder.cosines(images, prompts)}

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        check_counts(self.name, images, prompts, metadata)
        return self.embedder.differentiable_cosines(images, prompts)


class PaddedPreparation:
    """The longer side resized to the model's (bicubic, antialiased), black on both sides of the shorter, normalised."""

    def __init__(self, source: str, model: ClipModel) -> None:
        self._side = model.image_size

    def eight_bit(self, images: Tensor) -> Tensor:
        return self.tensor(images.float() / 255)

    def tensor(self, images: Tensor) -> Tensor:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        longer = max(images.shape[-2:])
        height, width = (max(round(side * self._side / longer), 1) for side in images.shape[-2:])
        below, right = self._side - height, self._side - width
        padding = (right // 2, right - right // 2, below // 2, below - below // 2)
        return normalize(F.pad(resize(images, (height, width)), padding), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def load_hpsv2(source: str) -> ClipModel:
    """The model of a checkpoint file, or of a folder or hub id that has it.

    Raises RewardError for a file that is missing, unreadable or of another model.
    """
    path = _find(source)
    try:
        loaded = torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RewardError(
            f"hpsv2's checkpoint {str(path)!r} cannot be read, it is cut off or holds more than tensors: {_WHERE}"
        ) from error
    weights = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
    if not isinstance(weights, Mapping):
        found = sorted(map(str, loaded))[:5] if isinstance(loaded, Mapping) else type(loaded).__name__
        raise RewardError(f"hpsv2's checkpoint {str(path)!r} holds {found}: expected a 'state_dict'; {_WHERE}")
    return clip_from_open_clip(weights)


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        path /= CHECKPOINT
    if path.is_file():
        return path
    if path.suffix in (".pt", ".pth") or path.is_absolute():
        raise RewardError(f"hpsv2's checkpoint {str(path)!r} is missing: {_WHERE}")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, CHECKPOINT))
