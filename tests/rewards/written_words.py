"""Pictures of words, clean and hard, in the fonts that matplotlib brings along."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

FONTS = ("DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf")
WORDS = (
    *("Harbor", "Bakery", "Museum", "Library", "Welcome", "Station", "Market", "Garden", "Theatre", "Kitchen"),
    *("Open 24", "Route 66", "Sale 50", "Gate 17", "Exit 9", "Fresh Bread", "Quiet Zone", "Night Bus", "City Tour"),
    "Last Call",
)
SIDE = 512


def picture(word: str, font: str, hard: bool, seed: int) -> Tensor:
    """(3, 512, 512) in [0, 1]: dark on white; or turned, in colours, blurred, on a gradient with noise."""
    rng = np.random.default_rng(seed)
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    size = int(rng.integers(44, 72))
    drawn = ImageFont.truetype(str(path), size)
    if not hard:
        image = Image.new("RGB", (SIDE, SIDE), "white")
        ImageDraw.Draw(image).text((SIDE // 2, SIDE // 2), word, fill="black", font=drawn, anchor="mm")
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    corners = rng.uniform(90, 200, (2, 3))
    ramp = np.linspace(0, 1, SIDE)[:, None, None]
    background = corners[0] * (1 - ramp) + corners[1] * ramp + np.zeros((SIDE, SIDE, 3))
    mask = Image.new("L", (SIDE, SIDE), 0)
    place = (SIDE // 2 + int(rng.integers(-40, 40)), SIDE // 2 + int(rng.integers(-120, 120)))
    ImageDraw.Draw(mask).text(place, word, fill=255, font=drawn, anchor="mm")
    mask = mask.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1.0))
    share = np.asarray(mask)[..., None] / 255
    ink = rng.uniform(0, 50, 3) if rng.random() < 0.5 else rng.uniform(235, 255, 3)
    pixels = background * (1 - share) + ink * share + rng.normal(0, 12, background.shape)
    return torch.from_numpy(pixels.clip(0, 255)).permute(2, 0, 1).float().div(255).contiguous()


def pictures(hard: bool) -> tuple[Tensor, list[str]]:
    """60 pictures (60, 3, 512, 512), every word in every font, and the prompts that ask for them."""
    cases = [(word, font) for font in FONTS for word in WORDS]
    images = torch.stack([picture(word, font, hard, seed) for seed, (word, font) in enumerate(cases)])
    return images, [f'a sign that says "{word}"' for word, _ in cases]
