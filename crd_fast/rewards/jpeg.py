"""How little room an image takes as a JPEG: a reward that needs no model.

Source: Black et al., "Training Diffusion Models with Reinforcement Learning" (arXiv 2305.13301), section 5.1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.errors import ConfigError
from crd_fast.rewards.base import Metadata


@dataclass(frozen=True)
class JpegSettings:
    """quality: of the encoder, 1 to 95."""

    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ConfigError(f"rewards.jpeg_compressibility.quality is {self.quality}: expected 1 to 95")


class JpegCompressibility:
    """Minus the kilobytes (1000 bytes) of each image encoded as JPEG; see `Reward`."""

    name = "jpeg_compressibility"
    requires: frozenset[str] = frozenset()
    differentiable = False
    range: tuple[float, float] | None = None

    def __init__(self, settings: JpegSettings) -> None:
        self._quality = settings.quality

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        from PIL import Image

        sizes = []
        for pixels in (images.detach().cpu().float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1):
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, format="JPEG", quality=self._quality)
            sizes.append(file.tell())
        return {self.name: torch.tensor(sizes, dtype=torch.float32, device="cpu") / -1000}
