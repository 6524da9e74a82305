"""GenEval's detector on tiny random models of the real classes, and its formulas on logits made by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import registry, score_batch
from crd_fast.rewards.geneval import Detection, asks_color, evaluate
from crd_fast.rewards.geneval_detector import (
    CLASSES,
    COLORS,
    ClipColors,
    Mask2FormerDetector,
    Mask2FormerOptions,
    color_crop,
    instances,
)
from crd_fast.rewards.registry import GenEvalOptions

from .clip_models import MEAN, SIDE, STD, save_clip, save_tokenizer, smooth_images

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]


def save_mask2former(folder: Path, classes: int = 80) -> Path:
    """Weights large enough that queries are sure of a class, and that masks depend on the image."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        num_labels=classes,
        init_std=0.5,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=0.5)
        model.class_predictor.bias[: min(classes, 20)] += torch.arange(min(classes, 20)) * 0.4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, text={"max_position_embeddings": 77})
    return folder


# ---- the model


def test_detector_is_the_model_on_what_pil_resizes(mask2former: Path) -> None:
    images = smooth_images(3, 40, 64)
    options = Mask2FormerOptions(model=str(mask2former), device="cpu", batch_size=2, short_side=64)
    found = Mask2FormerDetector(options)(images)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    for image, objects in zip(images, found, strict=True):
        picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        # 64 by 102 pixels, the longer one then up to a multiple of 32
        pixels = torch.tensor(np.array(picture.resize((128, 64), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
        with torch.no_grad():
            output = model(pixel_values=((pixels - IMAGENET[0]) / IMAGENET[1])[None])
        expected = instances(output.class_queries_logits[0], output.masks_queries_logits[0], (64, 128), (40, 64))
        assert [(d.label, d.box) for d in objects] == [(d.label, d.box) for d in expected]
        torch.testing.assert_close(
            torch.tensor([d.score for d in objects]), torch.tensor([d.score for d in expected]), rtol=1e-4, atol=1e-5
        )
        assert objects
        for d in objects:
            assert 0 <= d.box[0] < d.box[2] <= 64 and 0 <= d.box[1] < d.box[3] <= 40
    assert len({tuple(d.box for d in objects) for objects in found}) == 3, "the masks do not depend on the image"
    assert Mask2FormerOptions().short_side == 800  # the benchmark's, where the published files say 384


def test_channels_are_red_green_blue(mask2former: Path) -> None:
    options = Mask2FormerOptions(model=str(mask2former), device="cpu", short_side=64)
    images = smooth_images(1, 64, 64)
    straight, swapped = Mask2FormerDetector(options)(torch.cat([images, images.flip(1)]))
    assert [d.score for d in straight] != [d.score for d in swapped]


def test_half_precision_finds_the_same_objects(mask2former: Path) -> None:
    images = smooth_images(2, 64, 64)
    full, half = (
        Mask2FormerDetector(Mask2FormerOptions(model=str(mask2former), device="cpu", dtype=dtype, short_side=64))(
            images
        )
        for dtype in ("fp32", "bf16")
    )
    for a, b in zip(full, half, strict=True):
        assert [d.label for d in a][:1] == [d.label for d in b][:1]
        assert a[0].score == pytest.approx(b[0].score, abs=0.05)


# ---- colours


def test_crop_shows_the_object_on_grey() -> None:
    image = torch.arange(3 * 6 * 7, dtype=torch.uint8).view(3, 6, 7)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    crop = color_crop(image, Detection("cow", 0.9, (2.0, 1.0, 5.0, 3.0), mask=mask))
    assert crop.shape == (3, 2, 3) and crop.dtype == torch.uint8
    for c in range(3):
        for y in range(2):
            for x in range(3):
                assert crop[c, y, x] == (image[c, 1 + y, 2 + x] if mask[y, x] else 153)
    whole = torch.zeros(6, 7, dtype=torch.bool)
    whole[1:3, 2:5] = mask
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    by_pil = Image.composite(picture, Image.new("RGB", picture.size, "#999"), Image.fromarray(whole.numpy()))
    assert (np.array(by_pil.crop((2, 1, 5, 3))) == crop.permute(1, 2, 0).numpy()).all()


def objects_of(count: int, height: int, width: int) -> list[tuple[int, Detection]]:
    """Objects in two images, of two classes, all sizes down to a single pixel, with holes in their masks."""
    generator = np.random.default_rng(0)
    found = []
    for i in range(count):
        h, w = ((1, 1), (3, 20), (20, 3), (1, 9))[i] if i < 4 else generator.integers(4, 30, 2)
        x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
        mask = torch.tensor(generator.random((h, w)) > 0.3)
        mask[0, 0] = True
        box = (float(x), float(y), float(x + w), float(y + h))
        found.append((i % 2, Detection(("cow", "wine glass")[i % 3 == 0], 0.9, box, mask=mask)))
    return found


def test_colors_are_named_by_the_benchmarks_classifier(clip: Path) -> None:
    """With the CLIP model, PIL and the three texts written out."""
    images = smooth_images(2, 40, 48)
    objects = objects_of(14, 40, 48)
    colors = ClipColors(Mask2FormerOptions(color_model=str(clip), device="cpu", batch_size=5))
    names = colors(images, objects)

    model, tokens = CLIPModel.from_pretrained(clip).eval(), save_tokenizer(clip)

    @cache
    def encode(text: str) -> Tensor:
        with torch.no_grad():
            return F.normalize(model.get_text_features(**tokens([text], return_tensors="pt")).pooler_output[0], dim=-1)

    margins = []
    for name, (index, d) in zip(names, objects, strict=True):
        x0, y0, x1, y1 = map(int, d.box)
        pixels = (images[index] * 255).round().to(torch.uint8)[:, y0:y1, x0:x1].clone()
        pixels[:, ~d.mask] = 0x99
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        factor = SIDE / min(picture.size)
        picture = picture.resize(tuple(int(side * factor) for side in picture.size), Image.Resampling.BICUBIC)
        left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
        crop = np.array(picture.crop((left, top, left + SIDE, top + SIDE)))
        with torch.no_grad():
            inputs = (torch.tensor(crop).permute(2, 0, 1) / 255 - MEAN) / STD
            seen = F.normalize(model.get_image_features(pixel_values=inputs[None]).pooler_output, dim=-1)[0]
        rows = []
        for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"):
            texts = (f"{color} {d.label}", f"{color}-colored {d.label}", f"{color} object")
            row = torch.stack([encode(f"a photo of a {text}") for text in texts]).mean(0)
            rows.append((float(row @ seen / row.norm()), color))
        ranked = sorted(rows, reverse=True)
        margins.append(ranked[0][0] - ranked[1][0])
        assert name == ranked[0][1]
    assert len(set(names)) >= 3, "the model names one colour for everything: the test proves nothing"
    assert min(margins) > 1e-5


def test_color_does_not_depend_on_the_batch(clip: Path) -> None:
    images, objects = smooth_images(2, 40, 48), objects_of(9, 40, 48)
    one, many = (ClipColors(Mask2FormerOptions(color_model=str(clip), device="cpu", batch_size=n)) for n in (1, 9))
    assert one(images, objects) == many(images, objects)
    assert many(images, objects[::-1]) == many(images, objects)[::-1]


def test_an_object_without_a_mask_has_no_color(clip: Path) -> None:
    colors = ClipColors(Mask2FormerOptions(color_model=str(clip), device="cpu"))
    with pytest.raises(RewardError, match="'cow' has no mask"):
        colors(smooth_images(1, 40, 48), [(0, Detection("cow", 0.9, (1.0, 1.0, 5.0, 5.0)))])


# ---- as a reward


def options(mask2former: Path, clip: Path | str, **more: object) -> GenEvalOptions:
    settings = {"model": str(mask2former), "color_model": str(clip), "device": "cpu", "short_side": 64}
    return GenEvalOptions(detector="mask2former", **(settings | more))


def test_reward_is_the_rules_on_detections_and_colors(mask2former: Path, clip: Path) -> None:
    images = smooth_images(3, 64, 64)
    settings = options(mask2former, clip)
    found = Mask2FormerDetector(settings)(images)
    label = found[1][0].label
    n = sum(d.label == label for d in found[1])
    plain = {"tag": "single_object", "include": [{"class": label, "count": 1}]}
    color = ClipColors(settings)(images, [(1, d) for d in found[1] if d.label == label])
    colored = {"tag": "colors", "include": [{"class": label, "count": n, "color": color[0]}]}
    other = next(c for c in COLORS if c not in color)
    wrong = {"tag": "colors", "include": [{"class": label, "count": n, "color": other}]}
    metadata = [plain, colored, wrong]
    scores = score_batch(registry.build("geneval", settings), images[[1, 1, 1]], ["x"] * 3, metadata)
    share = color.count(color[0]) / n
    assert scores["geneval"].tolist() == pytest.approx([max(0, 2 - n), (1 + share) / 2, 0.5])
    assert scores["accuracy"].tolist() == [1, float(share == 1), 0]


def test_colors_are_only_named_where_they_are_asked_for(mask2former: Path) -> None:
    images, missing = smooth_images(1, 64, 64), "/no/such/folder"
    settings = options(mask2former, missing)
    (found,) = Mask2FormerDetector(settings)(images)
    reward = registry.build("geneval", settings)
    label, absent = found[0].label, next(c for c in CLASSES if c not in {d.label for d in found})
    for asked in ({"class": label, "count": 1}, {"class": absent, "count": 1, "color": "red"}):
        score_batch(reward, images, ["x"], [{"tag": "colors", "include": [asked]}])
    with pytest.raises(RewardError, match="/no/such/folder"):
        asked = {"class": label, "count": 1, "color": "red"}
        score_batch(reward, images, ["x"], [{"tag": "colors", "include": [asked]}])


def test_a_detector_that_is_not_there_is_named(mask2former: Path, clip: Path, tmp_path: Path) -> None:
    reward = registry.build("geneval", options(tmp_path / "nothing", clip))
    one = ["a cow"], [{"include": [{"class": "cow", "count": 1}]}]
    with pytest.raises(RewardError, match=r"nothing.*give a folder"):
        score_batch(reward, smooth_images(1, 64, 64), *one)


def test_another_model_is_no_detector(clip: Path, tmp_path: Path) -> None:
    for folder, message in ((clip, "lacks"), (save_mask2former(tmp_path, classes=5), "5 classes: expected")):
        detector = Mask2FormerDetector(Mask2FormerOptions(model=str(folder), device="cpu", short_side=64))
        with pytest.raises(RewardError, match=message):
            detector(smooth_images(1, 64, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "shapes", "color_model": "/models/clip"}, "rewards.geneval.color_model is set"),
        ({"short_side": 800, "batch_size": 2}, "rewards.geneval.batch_size is set"),
        ({"detector": "mask2former", "short_side": 32}, "short_side is 32"),
        ({"detector": "mask2former", "dtype": "fp8"}, "dtype is 'fp8'"),
        ({"detector": "mask2former", "color_model": ""}, "model is ''"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenEvalOptions(**settings)


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mask2former'"):
        registry.build("geneval", GenEvalOptions(detector="mask2formr"))


def test_colors_are_asked_of_the_objects_the_rules_look_at() -> None:
    def at(label: str, score: float) -> Detection:
        return Detection(label, score, (0.0, 0.0, 4.0, 4.0))

    found = [at("cow", 0.5), at("dog", 0.9), at("cow", 0.2), at("cow", 0.95), *[at("cow", 0.6)] * 17]
    red = {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "dog", "count": 1}]}
    assert asks_color(found, red) == [3, *range(4, 19)]
    assert asks_color(found, red | {"tag": "counting"}) == [3]
    assert asks_color(found, {"include": [{"class": "cow", "count": 1}]}) == []
    # renaming the colours of all others changes nothing
    asked = set(asks_color(found, red))
    painted = [Detection(d.label, d.score, d.box, "red" if i in asked else None) for i, d in enumerate(found)]
    every = [Detection(d.label, d.score, d.box, "red") for d in found]
    assert evaluate(painted, red) == evaluate(every, red)
