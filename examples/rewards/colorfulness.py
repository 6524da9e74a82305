"""How colourful people find an image: a reward of one's own, for recipes and for `crd-fast score`.

Source: Hasler and Süsstrunk, "Measuring colourfulness in natural images" (Human Vision and Electronic Imaging 2003),
equation 12 of its metric M3, on values from 0 to 1 instead of 0 to 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def colorfulness(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], scale: float = 1.0
) -> dict[str, Tensor]:
    """Scores of images (B, 3, H, W) in [0, 1]: 0 is grey, about .4 is extremely colourful; times `scale`."""
    red, green, blue = images.flatten(2).unbind(1)  # (B, HW) each
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    # of a grey image the root has no slope, so it starts a little above 0
    spread = (red_green.var(1, correction=0) + yellow_blue.var(1, correction=0) + 1e-12).sqrt()
    tint = (red_green.mean(1).square() + yellow_blue.mean(1).square() + 1e-12).sqrt()
    return {"score": scale * (spread + 0.3 * tint), "tint": tint}


colorfulness.differentiable = True  # type: ignore[attr-defined]
