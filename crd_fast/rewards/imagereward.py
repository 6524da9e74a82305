"""ImageReward: how well people would like an image for its prompt, from a model of their comparisons.

Source: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation" (arXiv
2304.05977).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards.base import Metadata
from crd_fast.rewards.clip_embedding import check_counts, normalize, resize, to_eight_bit
from crd_fast.rewards.imagereward_weights import REPOSITORY, load_imagereward
from crd_fast.rewards.models import ModelOptions, SharedModel, missing_files

TOKENS = 35  # of a prompt, with the first and the last one; longer prompts are cut

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageRewardOptions(ModelOptions):
    """model: folder or hub id with ImageReward.pt (or ImageReward.safetensors) and med_config.json. tokenizer: folder
    or hub id of BERT's uncased tokens."""

    model: str = REPOSITORY
    tokenizer: str = "bert-base-uncased"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokenizer:
            raise ConfigError("rewards.imagereward.tokenizer is '': expected a folder or a hub id")


class ImageReward:
    """Scores of pairs of an image and its prompt, higher is better, without bounds; see `DifferentiableReward`.

    The model sees the central square of the image, its shorter side resized to the model's 224 pixels.
    """

    name = "imagereward"
    requires: frozenset[str] = frozenset()
    differentiable = True
    range: tuple[float, float] | None = None

    def __init__(self, options: ImageRewardOptions) -> None:
        self._options = options
        self._shared = SharedModel(self.name, options, load_imagereward)
        self._tokenizer: Any = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """float32 (B,) on the CPU, of 8-bit images resized with PIL as the model's authors do.

        Raises RewardError for files that are missing or do not fit, and where B images and B prompts do not meet.
        """
        check_counts(self.name, images, prompts, metadata)
        with torch.no_grad():
            return {self.name: self._scores(images, prompts, pil_pixels).cpu()}

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """float32 (B,) on the images' device, with a graph to them; see `tensor_pixels`. Raises as a call does.

        ConfigError under offload: the model would be gone before the backward pass.
        """
        if self._options.offload:
            raise ConfigError(
                "rewards.imagereward.offload is true: expected false where gradients of its scores are needed"
            )
        check_counts(self.name, images, prompts, metadata)
        return self._scores(images, prompts, tensor_pixels).to(images.device)

    def _scores(self, images: Tensor, prompts: Sequence[str], prepare: Callable[[Tensor, int], Tensor]) -> Tensor:
        device, batch = self._options.torch_device, self._options.batch_size
        with self._shared.on_device() as model:
            ids, mask = self._tokens(prompts, model.vocab_size)
            return torch.cat(
                [
                    model(prepare(part, model.image_size).to(device), part_ids.to(device), part_mask.to(device))
                    for part, part_ids, part_mask in zip(
                        images.split(batch), ids.split(batch), mask.split(batch), strict=True
                    )
                ]
            )

    def _tokens(self, prompts: Sequence[str], vocabulary: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, TOKENS). The first token stays BERT's CLS: only BLIP's other uses put its [ENC] there."""
        if self._tokenizer is None:
            with missing_files(self._options.tokenizer):
                from transformers import BertTokenizer

                tokenizer = BertTokenizer.from_pretrained(self._options.tokenizer)
            tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's, so the model has rows for them
            if len(tokenizer) != vocabulary:
                raise RewardError(
                    f"tokenizer {self._options.tokenizer!r} has {len(tokenizer)} tokens with [DEC] and [ENC], model "
                    f"{self._options.model!r} {vocabulary}: expected equal numbers; {REPOSITORY} goes with "
                    "bert-base-uncased"
                )
            self._tokenizer = tokenizer
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]


def pil_pixels(images: Tensor, side: int) -> Tensor:
    """The model's input (B, 3, side, side), float32 on the CPU, of images (B, 3, H, W) in [0, 1].

    8-bit images, the shorter side resized to `side` with PIL's bicubic filter, their central square, normalised.
    """
    from PIL import Image

    height, width, top, left = _geometry(images, side)
    squares = []
    for levels in to_eight_bit(images).permute(0, 2, 3, 1):
        resized = Image.fromarray(levels.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        squares.append(np.asarray(resized.crop((left, top, left + side, top + side))))
    return normalize(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255, _MEAN, _STD)


def tensor_pixels(images: Tensor, side: int) -> Tensor:
    """`pil_pixels` on the images' device and with a graph to them: without 8-bit rounding, otherwise the same.

    Also the order is PIL's, rows before columns with the overshoot of the filter cut off after each; on high contrast
    one pass over both differs by several levels.
    """
    height, width, top, left = _geometry(images, side)
    rows = resize(images.float(), (images.shape[-2], width)).clamp(0, 1)[..., left : left + side]
    columns = resize(rows, (height, side)).clamp(0, 1)[..., top : top + side, :]
    return normalize(columns, _MEAN, _STD)


def _geometry(images: Tensor, side: int) -> tuple[int, int, int, int]:
    """Height and width after resizing, top and left of the central square in it, rounded as the authors' library."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    height, width = int(side * height / shorter), int(side * width / shorter)
    return height, width, round((height - side) / 2), round((width - side) / 2)
