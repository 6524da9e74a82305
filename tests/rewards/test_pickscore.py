"""PickScore against the logits of the whole model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from crd_fast.errors import RewardError
from crd_fast.rewards import registry, score_batch
from crd_fast.rewards.base import DifferentiableReward
from crd_fast.rewards.pickscore import PickScore, PickScoreOptions

from .clip_models import CONTEXT, eight_bit, save_clip, save_processor, save_tokenizer, smooth_images

PROMPTS = ["a cat", "two dogs on a bench", "a cat"]
NO_DATA = [{}] * 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the model and of the processor, which the model's own folder lacks."""
    torch.manual_seed(5)
    model, processor = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("processor")
    clip = save_clip(processor, text={"eos_token_id": 2})
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(100))
    clip.save_pretrained(model)
    return model, processor


def options(folders: tuple[Path, Path], **settings: object) -> PickScoreOptions:
    return PickScoreOptions(model=str(folders[0]), processor=str(folders[1]), device="cpu", **settings)


def expected(folders: tuple[Path, Path], images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """exp(logit_scale) cos(text, image), as its authors compute it from the processor's outputs."""
    model = CLIPModel.from_pretrained(folders[0]).eval()
    pictures = [Image.fromarray(image.numpy()) for image in eight_bit(images)]
    pixels = CLIPImageProcessorPil.from_pretrained(folders[1])(images=pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folders[1])(
        prompts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    with torch.no_grad():
        image, text = (
            features.pooler_output / features.pooler_output.norm(dim=-1, keepdim=True)
            for features in (model.get_image_features(**pixels), model.get_text_features(**tokens))
        )
        return model.logit_scale.exp() * (image * text).sum(-1)


def test_scores_are_the_models_logits(folders):
    images, reward = smooth_images(3, 48, 80), registry.build("pickscore", options(folders))
    assert isinstance(reward, DifferentiableReward)
    scores = score_batch(reward, images, PROMPTS, NO_DATA)
    assert set(scores) == {"pickscore"} and scores["pickscore"].shape == (3,)
    torch.testing.assert_close(scores["pickscore"], expected(folders, images, PROMPTS), rtol=0, atol=1e-3)
    assert scores["pickscore"].std() > 1


def test_pairs_do_not_mix(folders):
    images, reward = smooth_images(3, 40, 40), PickScore(options(folders, batch_size=2))
    scores = reward(images, PROMPTS, NO_DATA)["pickscore"]
    for row, prompt in enumerate(PROMPTS):
        other = torch.rand_like(images)
        other[row] = images[row]
        prompts = ["elsewhere"] * 3
        prompts[row] = prompt
        assert reward(other, prompts, NO_DATA)["pickscore"][row].item() == pytest.approx(scores[row].item(), abs=1e-4)


def test_differentiable_scores_are_near(folders):
    """Measured: at most 0.2 apart, where scores of different images vary by 5."""
    reward = PickScore(options(folders))
    for size in [(32, 32), (64, 48), (20, 24), (40, 90)]:
        images = smooth_images(3, *size).requires_grad_()
        near = reward.differentiable_scores(images, PROMPTS, NO_DATA)
        assert (near - reward(images, PROMPTS, NO_DATA)["pickscore"]).abs().max() < 0.4
        assert torch.autograd.grad(near.sum(), images)[0].abs().sum() > 0


def test_bf16_rounds_the_features_and_not_the_scale(folders):
    """A scale of 100, stored as its logarithm, would be 98.9 in bf16."""
    images = smooth_images(3, 40, 40)
    full, half = (PickScore(options(folders, dtype=t))(images, PROMPTS, NO_DATA)["pickscore"] for t in ("fp32", "bf16"))
    assert 0 < (full - half).abs().max() < 1
    assert PickScore(options(folders, dtype="bf16")).embedder.model.logit_scale == pytest.approx(100, rel=1e-6)


def test_unequal_numbers_name_the_reward(folders):
    reward, images = PickScore(options(folders)), smooth_images(3, 32, 32)
    for method in (reward, reward.differentiable_scores):
        with pytest.raises(RewardError, match="'pickscore' was given 3 images, 3 prompts and 2 metadata"):
            method(images, PROMPTS, NO_DATA[:2])


def test_a_missing_processor_says_what_to_fetch(folders, tmp_path):
    reward = PickScore(options((folders[0], tmp_path / "absent")))
    with pytest.raises(RewardError, match="absent' cannot be loaded.*hf download"):
        reward(smooth_images(3, 32, 32), PROMPTS, NO_DATA)


def test_the_processor_may_be_apart(folders, tmp_path):
    images = smooth_images(3, 64, 64)
    save_processor(tmp_path, image_mean=[0.0, 0.0, 0.0])
    save_tokenizer(tmp_path)
    changed = PickScore(options((folders[0], tmp_path)))(images, PROMPTS, NO_DATA)["pickscore"]
    assert (changed - PickScore(options(folders))(images, PROMPTS, NO_DATA)["pickscore"]).abs().min() > 0.1


def test_the_released_model_is_the_default():
    assert PickScoreOptions().model == "yuvalkirstain/PickScore_v1"
    assert PickScoreOptions().processor_source == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
