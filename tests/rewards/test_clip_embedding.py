"""Pixels, tokens and embeddings of the CLIP rewards, against PIL and the whole model of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards.clip_embedding import (
    ClipEmbedder,
    ClipOptions,
    ClipPreparation,
    check_counts,
    load_clip,
    resize,
    to_eight_bit,
)

from .clip_models import MEAN, SIDE, SIZES, STD, eight_bit, save_clip, save_processor, save_tokenizer, smooth_images

# Levels of 255 between the tensor path and PIL, which rounds the input, the rows and the columns; weights of bicubic
# resizing add up to 1.3 at most in absolute value, so that the three roundings can reach 0.5 (1 + 1.3 + 1.3 * 1.3).
LEVELS = 2.0
PROMPTS = ["a cat", "two dogs on a very long bench", "a cat", "!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip")
    save_clip(path)
    return path


def embedder(folder: Path, **settings: object) -> ClipEmbedder:
    return ClipEmbedder("clipscore", ClipOptions(model=str(folder), device="cpu", **settings))


def pil_pixels(images: Tensor) -> Tensor:
    """Shortest side to SIDE, the middle of the longer, normalised."""
    rows = []
    for picture in eight_bit(images):
        image = Image.fromarray(picture.numpy())
        scale = SIDE / min(image.size)
        image = image.resize((int(image.width * scale + 1e-9), int(image.height * scale + 1e-9)), Image.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
        rows.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return (torch.stack(rows) - MEAN) / STD


@pytest.mark.parametrize("size", SIZES)
def test_eight_bit_pixels_are_those_of_pil(folder, size):
    images = smooth_images(2, *size)
    pixels = ClipPreparation(str(folder), load_clip(str(folder))).eight_bit(to_eight_bit(images))
    torch.testing.assert_close(pixels, pil_pixels(images), rtol=0, atol=1e-5)


def levels(folder: Path, images: Tensor) -> Tensor:
    """Between the two paths, of 255."""
    pixels = ClipPreparation(str(folder), load_clip(str(folder))).tensor(images)
    return ((pixels - pil_pixels(images)) * STD).abs() * 255


@pytest.mark.parametrize("size", [*SIZES, (512, 512), (300, 700), (200, 101)])
@pytest.mark.parametrize("kind", ["smooth", "edges"])
def test_tensor_pixels_are_near_those_of_pil(folder, size, kind):
    images = smooth_images(2, *size)
    if kind == "edges":
        images = (images > 0.5).float()
    tall = size[0] > 2 * size[1] and kind == "edges"  # Pillow 13 resizes their columns first
    assert levels(folder, images).max() < (16 if tall else LEVELS)
    assert levels(folder, images).mean() < 0.4


@pytest.mark.parametrize("size", SIZES)
def test_embeddings_by_both_paths_are_near(folder, size):
    """Measured: at most 0.011 apart, where embeddings of different images are 0.24 apart or more."""
    images, clip = smooth_images(4, *size), embedder(folder)
    exact, tensor = clip.image_embeddings(images), clip.differentiable_image_embeddings(images)
    assert (exact - tensor).norm(dim=-1).max() < 0.015
    assert (exact[0] - exact[1]).norm() > 0.1


def test_eight_bit_rounds_to_the_nearest_level():
    levels = torch.arange(256) / 255
    row = torch.cat([levels, levels + 0.499 / 255])[:511].expand(1, 3, 1, 511)
    expected = torch.cat([torch.arange(256), torch.arange(255)]).to(torch.uint8)
    assert torch.equal(to_eight_bit(row)[0, 1, 0], expected)
    assert torch.equal(to_eight_bit(torch.ones(1, 3, 1, 1, dtype=torch.bfloat16)), torch.full((1, 3, 1, 1), 255).byte())


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("eos", [None, 2])
def test_embeddings_are_those_of_the_whole_model(tmp_path, pad, eos):
    """Padded to the longest with a mask or to the context without one, and by either rule of where a text ends.

    Configurations of before transformers 4.31 say that texts end with token 2 and mean the highest.
    """
    save_clip(tmp_path, text={} if eos is None else {"eos_token_id": eos})
    tokenizer = save_tokenizer(tmp_path, pad_token=pad)
    images, reference = smooth_images(4, 40, 50), CLIPModel.from_pretrained(tmp_path).eval()
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    assert (tokens.attention_mask == 0).any() and len(tokens.input_ids[0]) == 12  # one is padded and one is cut
    with torch.no_grad():
        output = reference(pixel_values=pil_pixels(images), **tokens)
    clip = embedder(tmp_path)
    torch.testing.assert_close(clip.image_embeddings(images), output.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.text_embeddings(PROMPTS), output.text_embeds, rtol=0, atol=1e-5)
    cosines = output.logits_per_image.diagonal() / reference.logit_scale.exp()
    torch.testing.assert_close(clip.cosines(images, PROMPTS), cosines, rtol=0, atol=1e-5)


def test_a_prompt_is_cut_at_the_context_and_still_ends(folder):
    clip = embedder(folder)
    cut = clip.text_embeddings(["a b c d e f g h i j", "a b c d e f g h i j k l", "a b c d e f g h i x"])
    torch.testing.assert_close(cut[0], cut[1])
    assert (cut[0] - cut[2]).norm() > 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_scores_keep_their_order_and_do_not_depend_on_the_batch(folder, batch_size):
    images, clip = smooth_images(4, 48, 40), embedder(folder, batch_size=batch_size)
    scores, slopes = clip.cosines(images, PROMPTS), clip.differentiable_cosines(images, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = images[row : row + 1]
        torch.testing.assert_close(scores[row : row + 1], clip.cosines(alone, [prompt]), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            slopes[row : row + 1], clip.differentiable_cosines(alone, [prompt]), rtol=0, atol=1e-6
        )
    assert scores.unique().numel() == 4


def test_scores_of_samples_with_one_prompt_are_not_their_order(folder):
    images, clip = smooth_images(3, 40, 40), embedder(folder)
    forward, backward = clip.cosines(images, ["a", "b", "a"]), clip.cosines(images.flip(0), ["a", "b", "a"])
    torch.testing.assert_close(forward, backward.flip(0), rtol=0, atol=1e-6)


def test_gradients_reach_the_pixels_and_are_the_slopes(folder):
    images, clip = smooth_images(2, 48, 80) * 0.8 + 0.1, embedder(folder)
    images.requires_grad_()
    scores = clip.differentiable_cosines(images, ["a cat", "a dog"])
    (slope,) = torch.autograd.grad(scores.sum(), images)
    middle = slope[..., 17:63]  # a band of 48 of the 80 columns stays after the crop
    assert (middle.abs() > 0).all() and (slope[..., :12] == 0).all() and (slope[..., 68:] == 0).all()
    direction = slope / slope.norm()
    with torch.no_grad():
        high, low = (
            clip.differentiable_cosines(images + sign * 0.05 * direction, ["a cat", "a dog"]) for sign in (1, -1)
        )
    assert (high - low).sum() / 0.1 == pytest.approx(slope.norm().item(), rel=0.02)
    assert not clip.model.clip.visual_projection.weight.requires_grad


def test_bf16_is_close(folder):
    images = smooth_images(4, 64, 40)
    exact, rounded = embedder(folder), embedder(folder, dtype="bf16")
    assert rounded.model.clip.dtype == torch.bfloat16 and exact.model.clip.dtype == torch.float32
    full, half = exact.cosines(images, PROMPTS), rounded.cosines(images, PROMPTS)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.02
    slopes = rounded.differentiable_cosines(images.bfloat16(), PROMPTS)
    assert slopes.dtype == torch.float32
    assert (slopes - full).abs().max() < 0.03


def test_the_callers_autocast_does_not_round_the_model(folder):
    images, clip = smooth_images(2, 40, 40), embedder(folder)
    expected = clip.cosines(images, PROMPTS[:2]), clip.differentiable_cosines(images, PROMPTS[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip.cosines(images, PROMPTS[:2]), expected[0])
        assert torch.equal(clip.differentiable_cosines(images, PROMPTS[:2]), expected[1])


def test_the_scale_keeps_its_precision_in_bf16(folder):
    scale = CLIPModel.from_pretrained(folder).logit_scale.item()
    for dtype in ("fp32", "bf16"):
        assert embedder(folder, dtype=dtype).model.logit_scale == pytest.approx(np.exp(scale), rel=1e-6)


def test_offload_has_no_gradients(folder):
    clip = embedder(folder, offload=True)
    assert clip.cosines(smooth_images(1, 32, 32), ["a"]).shape == (1,)
    with pytest.raises(ConfigError, match=r"rewards\.clipscore\.offload is true"):
        clip.differentiable_cosines(smooth_images(1, 32, 32), ["a"])


def test_another_models_tokenizer_is_refused(tmp_path):
    save_clip(tmp_path / "clip")
    save_tokenizer(tmp_path / "other", eos_token="<|startoftext|>")
    with pytest.raises(RewardError, match="eos_token_id 189: expected the tokenizer that the model was trained with"):
        embedder(tmp_path / "clip", processor=str(tmp_path / "other")).text_embeddings(["a"])
    save_clip(tmp_path / "small", text={"vocab_size": 100, "eos_token_id": 2})
    with pytest.raises(RewardError, match="'clipscore'.*ids up to 189.*has 100 tokens"):
        embedder(tmp_path / "small").text_embeddings(["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_normalize": False}, "'do_normalize': False"),
        ({"resample": 2}, "'resample': 2"),
        ({"crop_size": {"height": 16, "width": 32}}, "'height': 16"),
        ({"size": {"height": 32, "width": 32}}, "size.shortest_edge at least 32"),
        ({"size": {"shortest_edge": 31}}, "size.shortest_edge at least 32"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0: expected 1/255"),
    ],
)
def test_another_image_processor_is_refused(folder, tmp_path, settings, message):
    save_processor(tmp_path, **settings)
    with pytest.raises(RewardError, match=message):
        ClipPreparation(str(tmp_path), load_clip(str(folder)))


def test_an_image_processor_of_the_first_releases_is_read(folder, tmp_path):
    """As in the published repositories of 2021: sides as plain numbers, and no word about rescaling."""
    settings = {"crop_size": SIDE, "size": SIDE, "do_center_crop": True, "do_resize": True, "do_normalize": True}
    settings |= {"resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    settings |= {"image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist()}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    images = smooth_images(1, 40, 60)
    preparation = ClipPreparation(str(tmp_path), load_clip(str(folder)))
    torch.testing.assert_close(preparation.eight_bit(to_eight_bit(images)), pil_pixels(images), rtol=0, atol=1e-5)


def test_missing_weights_are_not_made_up(tmp_path):
    save_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 weights of a CLIP model, the first is visual_projection\.weight"):
        load_clip(str(tmp_path))


def test_missing_files_are_named(tmp_path):
    missing = tmp_path / "absent"
    with pytest.raises(RewardError, match="absent' cannot be loaded.*give a folder with its files"):
        embedder(missing).cosines(smooth_images(1, 32, 32), ["a"])
    CLIPConfig().save_pretrained(missing)
    with pytest.raises(RewardError, match="absent' cannot be loaded"):
        embedder(missing).cosines(smooth_images(1, 32, 32), ["a"])


def test_a_missing_tokenizer_is_named(folder, tmp_path):
    save_processor(tmp_path)
    with pytest.raises(RewardError, match=str(tmp_path)):
        embedder(folder, processor=str(tmp_path)).cosines(smooth_images(1, 32, 32), ["a"])


def test_an_empty_processor_is_refused():
    with pytest.raises(ConfigError, match="processor is ''"):
        ClipOptions(model="m", processor="")


@pytest.mark.parametrize(("prompts", "entries"), [(1, 2), (2, 1), (3, 2)])
def test_unequal_numbers_are_refused(prompts, entries):
    images = torch.rand(2, 3, 8, 8)
    check_counts("clipscore", images, ["a"] * 2, [{}] * 2)
    with pytest.raises(RewardError, match=f"'clipscore' was given 2 images, {prompts} prompts and {entries} metadata"):
        check_counts("clipscore", images, ["a"] * prompts, [{}] * entries)


@pytest.mark.parametrize("sizes", [((40, 24), (16, 16)), ((9, 31), (24, 7)), ((16, 16), (16, 5))], ids=str)
def test_resizing_is_torchs_own_with_a_deterministic_gradient(sizes) -> None:
    old, new = sizes
    images = torch.rand(2, 3, *old, dtype=torch.float64, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        ours = resize(images, new)
        (slope,) = torch.autograd.grad(ours.square().sum(), images)
    finally:
        torch.use_deterministic_algorithms(False)
    rows = F.interpolate(images.float(), size=(new[0], old[1]), mode="bicubic", antialias=True)
    theirs = F.interpolate(rows, size=new, mode="bicubic", antialias=True)
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-6)
    (expected,) = torch.autograd.grad(theirs.double().square().sum(), images)
    torch.testing.assert_close(slope, expected, rtol=0, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize(images.detach(), new), ours.detach())
