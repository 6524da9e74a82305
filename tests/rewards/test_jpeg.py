"""The size of an image's JPEG as its score."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crd_fast.errors import ConfigError
from crd_fast.rewards import Reward, registry, score_batch
from crd_fast.rewards.jpeg import JpegCompressibility, JpegSettings

NAME = "jpeg_compressibility"


def pictures() -> np.ndarray:
    """uint8 (3, H, W, 3): noise, a flat gray, a ramp; wider than high, so that swapped axes show."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (24, 40, 3))
    return np.stack([noise, np.full_like(noise, 127), ramp * np.array([1, 0, 1], dtype=np.uint8)])


def images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def kilobytes(picture: np.ndarray, quality: int) -> float:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return len(file.getvalue()) / 1000


def score(batch: Tensor, quality: int = 95) -> Tensor:
    reward = registry.build(NAME, JpegSettings(quality))
    return score_batch(reward, batch, [""] * len(batch), [{}] * len(batch))[NAME]


@pytest.mark.parametrize("quality", [1, 50, 95])
def test_score_is_minus_the_kilobytes_of_pils_own_file(quality: int) -> None:
    pixels = pictures()
    expected = [-kilobytes(picture, quality) for picture in pixels]
    torch.testing.assert_close(score(images(pixels), quality), torch.tensor(expected), rtol=1e-6, atol=0)


def test_flat_beats_a_ramp_beats_noise() -> None:
    noise, flat, ramp = score(images(pictures())).tolist()
    assert noise < ramp < flat < 0


def test_lower_quality_scores_higher() -> None:
    assert (score(images(pictures()), 10)[0] > score(images(pictures()), 90)[0]).item()


def test_pixels_are_rounded_to_the_nearest_level() -> None:
    batch = images(pictures())
    nudged = (batch + 0.4 / 255 * torch.where(batch < 0.5, 1.0, -1.0)).requires_grad_()
    assert torch.equal(score(nudged), score(batch))


def test_an_image_scores_the_same_alone_and_in_a_batch() -> None:
    batch = images(pictures())
    assert torch.equal(score(batch.flip(0)), score(batch).flip(0))
    assert torch.equal(torch.cat([score(image[None]) for image in batch]), score(batch))


@pytest.mark.parametrize("quality", [0, 96, -1])
def test_quality_out_of_bounds_is_refused(quality: int) -> None:
    with pytest.raises(ConfigError, match=f"jpeg_compressibility.quality is {quality}: expected 1 to 95"):
        JpegSettings(quality)


def test_the_registry_knows_it() -> None:
    assert NAME in registry.available() and registry.options_type(NAME) is JpegSettings
    reward = registry.build(NAME, JpegSettings())
    assert isinstance(reward, JpegCompressibility) and isinstance(reward, Reward)
    assert reward.name == NAME and reward.requires == frozenset() and not reward.differentiable
    with pytest.raises(ConfigError, match="are dict: expected JpegSettings"):
        registry.build(NAME, {"quality": 50})
    with pytest.raises(ConfigError, match="did you mean 'jpeg_compressibility'"):
        registry.options_type("jpeg_compresibility")
