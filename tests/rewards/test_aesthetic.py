"""The aesthetic rating against its five layers, written out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPModel

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import registry, score_batch
from crd_fast.rewards.aesthetic import Aesthetic, AestheticOptions, load_head
from crd_fast.rewards.base import DifferentiableReward

from .clip_models import save_clip, save_head, smooth_images

PROMPTS = ["a cat", "dogs", "a bench"]
NO_DATA = [{}] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip")
    save_clip(path, projection=768)
    save_head(path / "head.pth")
    return path


def options(folder: Path, **settings: object) -> AestheticOptions:
    head = {"head": str(folder / "head.pth")}
    return AestheticOptions(**({"model": str(folder), "device": "cpu"} | head | settings))


def published_layers(state: dict[str, torch.Tensor]) -> nn.Sequential:
    """As they were trained, dropout and all."""
    layers = nn.Sequential(
        nn.Linear(768, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    layers.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    return layers.eval()


def test_scores_are_the_layers_of_the_normalised_embedding(folder):
    images, reward = smooth_images(3, 48, 80), registry.build("aesthetic", options(folder))
    assert isinstance(reward, DifferentiableReward)
    scores = score_batch(reward, images, PROMPTS, NO_DATA)
    assert set(scores) == {"aesthetic"}
    embedder = reward.embedder
    pixels = embedder._pixels(embedder.model).eight_bit((images * 255).round().to(torch.uint8))
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).eval().get_image_features(pixel_values=pixels).pooler_output
        layers = published_layers(torch.load(folder / "head.pth", weights_only=True))
        expected = layers(features / features.norm(dim=-1, keepdim=True))[:, 0]
    torch.testing.assert_close(scores["aesthetic"], expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_a_head_that_can_be_followed_by_hand(tmp_path):
    """The first layer takes 3 e_5 + 1, the others pass it on, the last adds 4 and doubles: 2 (3 e_5 + 1) + 4."""
    widths, state = (768, 1024, 128, 64, 16, 1), {}
    for place, wide, narrow in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{place}.weight"] = torch.eye(narrow, wide)
        state[f"layers.{place}.bias"] = torch.zeros(narrow)
    state["layers.0.weight"] = torch.zeros(1024, 768)
    state["layers.0.weight"][0, 5] = 3.0
    state["layers.0.bias"][0] = 1.0
    state["layers.7.weight"] *= 2
    state["layers.7.bias"] += 4
    torch.save(state, tmp_path / "head.pth")
    weight, bias = load_head(tmp_path / "head.pth")
    expected = torch.zeros(768)
    expected[5] = 6.0
    assert torch.equal(weight, expected) and bias.item() == 6.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_head_may_be_safetensors(tmp_path, dtype):
    state = save_head(tmp_path / "head.pth")
    state = save_head(tmp_path / "head.safetensors", **{key: value.to(dtype) for key, value in state.items()})
    torch.save(state, tmp_path / "head.pth")
    pairs = zip(load_head(tmp_path / "head.safetensors"), load_head(tmp_path / "head.pth"), strict=True)
    assert all(torch.equal(ours, published) and ours.dtype == torch.float32 for ours, published in pairs)


def test_the_prompt_plays_no_part_and_neither_does_the_batch(folder):
    images = smooth_images(3, 40, 40)
    scores = Aesthetic(options(folder, batch_size=2))(images, PROMPTS, NO_DATA)["aesthetic"]
    for row in range(3):
        alone = Aesthetic(options(folder))(images[row : row + 1], ["other"], [{}])["aesthetic"]
        torch.testing.assert_close(alone, scores[row : row + 1], rtol=0, atol=1e-5)


def test_differentiable_scores_are_near(folder):
    """Measured: at most 0.006 apart, where scores of different images vary by 0.2."""
    reward = Aesthetic(options(folder))
    for size in [(32, 32), (64, 48), (20, 24), (40, 90)]:
        images = smooth_images(3, *size).requires_grad_()
        scores = reward(images, PROMPTS, NO_DATA)["aesthetic"]
        near = reward.differentiable_scores(images, PROMPTS, NO_DATA)
        assert near.shape == (3,) and not scores.requires_grad
        assert (near - scores).abs().max() < 0.01
        assert torch.autograd.grad(near.sum(), images)[0].abs().sum() > 0


def test_bf16_is_close(folder):
    images = smooth_images(3, 40, 40)
    full, half = (Aesthetic(options(folder, dtype=t))(images, PROMPTS, NO_DATA)["aesthetic"] for t in ("fp32", "bf16"))
    assert 0 < (full - half).abs().max() < 0.03


def test_a_missing_head_says_what_to_download(folder, tmp_path):
    reward = Aesthetic(options(folder, head=str(tmp_path / "absent.pth")))
    message = (
        r"absent\.pth' is missing: download sac\+logos\+ava1-l14-linearMSE\.pth from "
        "https://github.com/christophschuhmann/improved-aesthetic-predictor"
    )
    for method in (reward, reward.differentiable_scores):
        with pytest.raises(RewardError, match=message):
            method(smooth_images(3, 32, 32), PROMPTS, NO_DATA)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"layers.4.weight": torch.zeros(64, 127)},
            r"layers\.4\.weight \(64, 127\): expected layers\.4\.weight \(64, 128\)",
        ),
        ({"layers.6.bias": None}, r"no layers\.6\.bias: expected layers\.6\.bias \(16,\)"),
        ({"layers.9.bias": torch.zeros(1)}, r"has \['layers\.9\.bias'\] besides its five layers"),
    ],
)
def test_other_tensors_are_refused(tmp_path, changed, message):
    save_head(tmp_path / "head.pth", **changed)
    with pytest.raises(RewardError, match=message):
        load_head(tmp_path / "head.pth")


class Harmful:
    """What a pickle may hold: something to run at loading."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save({"layers.0.weight": Harmful(tmp_path / "ran")}, tmp_path / "head.pth")
    with pytest.raises(RewardError, match=r"head\.pth' cannot be read"):
        load_head(tmp_path / "head.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>", bytes(100)])
def test_an_unreadable_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RewardError, match=f"{name}' cannot be read"):
        load_head(tmp_path / name)


def test_something_else_in_the_file_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "head.pth")
    with pytest.raises(RewardError, match="is no dictionary of tensors"):
        load_head(tmp_path / "head.pth")


def test_unequal_numbers_name_the_reward(folder):
    reward = Aesthetic(options(folder))
    for method in (reward, reward.differentiable_scores):
        with pytest.raises(RewardError, match="'aesthetic' was given 3 images, 4 prompts"):
            method(smooth_images(3, 32, 32), [*PROMPTS, "more"], NO_DATA)


def test_an_empty_head_is_refused():
    with pytest.raises(ConfigError, match=r"rewards\.aesthetic\.head is ''"):
        AestheticOptions(head="")
