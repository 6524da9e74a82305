"""CLIPScore against the definition of a cosine."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from crd_fast.errors import RewardError
from crd_fast.rewards import Reward, RewardSpec, registry, score_batch
from crd_fast.rewards.aesthetic import Aesthetic, AestheticOptions
from crd_fast.rewards.base import DifferentiableReward
from crd_fast.rewards.clipscore import ClipScore, ClipScoreOptions

from .clip_models import save_clip, save_head, smooth_images

PROMPTS = ["a cat", "dogs", "a bench"]
NO_DATA = [{}] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip")
    save_clip(path, projection=768)
    return path


def options(folder: Path, **settings: object) -> ClipScoreOptions:
    return ClipScoreOptions(model=str(folder), device="cpu", **settings)


def aligned(folder: Path, images: torch.Tensor, prompt: str, sign: float) -> None:
    """Makes the image's embedding `sign` times the prompt's, by the image projection alone."""
    clip = ClipScore(options(folder)).embedder
    clip.model.clip.visual_projection.weight.zero_()
    direction = clip.text_embeddings([prompt])[0]
    state = clip.model.clip.vision_model(pixel_values=clip._pixels(clip.model).tensor(images)).pooler_output[0]
    clip.model.clip.visual_projection.weight.copy_(sign * torch.outer(direction, state) / state.norm() ** 2)
    clip.model.clip.save_pretrained(folder)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_image_that_is_embedded_as_its_prompt(tmp_path, sign):
    save_clip(tmp_path)
    images = (smooth_images(1, 32, 32) * 255).round() / 255
    aligned(tmp_path, images, "a cat", sign)
    scores = ClipScore(options(tmp_path))(images, ["a cat"], [{}])
    assert scores["clipscore"].item() == pytest.approx(sign, abs=1e-5)


def test_scores_are_cosines_of_the_models_features(folder):
    images, reward = smooth_images(3, 48, 40), registry.build("clipscore", options(folder))
    assert isinstance(reward, Reward) and isinstance(reward, DifferentiableReward)
    scores = score_batch(reward, images, PROMPTS, NO_DATA)
    assert set(scores) == {"clipscore"}
    reference = CLIPModel.from_pretrained(folder).eval()
    embedder = reward.embedder
    pixels = embedder._pixels(embedder.model).eight_bit((images * 255).round().to(torch.uint8))
    ids = embedder._ids(PROMPTS, embedder.model)
    with torch.no_grad():
        image = reference.get_image_features(pixel_values=pixels).pooler_output.double()
        text = reference.get_text_features(input_ids=ids).pooler_output.double()
    for row in range(3):
        expected = (image[row] @ text[row]) / (image[row].norm() * text[row].norm())
        assert scores["clipscore"][row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_papers_score_is_a_setting():
    """2.5 max(cosine, 0)."""
    cosines = torch.tensor([-0.2, 0.0, 0.3], dtype=torch.float64)
    spec = RewardSpec(scale=2.5, clip=(0.0, None))
    torch.testing.assert_close(spec.apply(cosines, spec.weight), 2.5 * cosines.clamp_min(0))


def test_differentiable_scores_are_near(folder):
    """Measured: at most 0.0003 apart, where scores of different images vary by 0.014."""
    reward = ClipScore(options(folder))
    for size in [(32, 32), (64, 48), (20, 24), (40, 90)]:
        images = smooth_images(3, *size).requires_grad_()
        scores = reward(images, PROMPTS, NO_DATA)["clipscore"]
        near = reward.differentiable_scores(images, PROMPTS, NO_DATA)
        assert near.requires_grad and not scores.requires_grad
        assert (near - scores).abs().max() < 0.001
        assert torch.autograd.grad(near.sum(), images)[0].abs().sum() > 0


def test_bf16_is_close(folder):
    images = smooth_images(3, 40, 40)
    full, half = (ClipScore(options(folder, dtype=t))(images, PROMPTS, NO_DATA)["clipscore"] for t in ("fp32", "bf16"))
    assert 0 < (full - half).abs().max() < 0.005


def test_the_aesthetic_reward_shares_the_model(folder, tmp_path):
    save_head(tmp_path / "head.pth")
    clipscore = ClipScore(options(folder))
    aesthetic = Aesthetic(AestheticOptions(model=str(folder), device="cpu", head=str(tmp_path / "head.pth")))
    images = smooth_images(3, 32, 32)
    clipscore(images, PROMPTS, NO_DATA), aesthetic(images, PROMPTS, NO_DATA)
    assert clipscore.embedder.model is aesthetic.embedder.model
    module = weakref.ref(clipscore.embedder.model)
    del clipscore
    gc.collect()
    assert module() is not None
    del aesthetic
    gc.collect()
    assert module() is None


def test_unequal_numbers_name_the_reward(folder):
    reward, images = ClipScore(options(folder)), smooth_images(3, 32, 32)
    for method in (reward, reward.differentiable_scores):
        with pytest.raises(RewardError, match="'clipscore' was given 3 images, 2 prompts"):
            method(images, PROMPTS[:2], NO_DATA)


def test_a_missing_model_says_what_to_fetch(tmp_path):
    with pytest.raises(RewardError, match="cannot be loaded.*hf download"):
        ClipScore(options(tmp_path / "absent"))(smooth_images(3, 32, 32), PROMPTS, NO_DATA)
    assert ClipScoreOptions().model == "openai/clip-vit-large-patch14"
