"""HPSv2: its padded images, its checkpoint, and open_clip's weights against open_clip's architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crd_fast.errors import RewardError
from crd_fast.rewards import registry, score_batch
from crd_fast.rewards.base import DifferentiableReward
from crd_fast.rewards.clip_embedding import to_eight_bit
from crd_fast.rewards.hpsv2 import CHECKPOINT, HPSv2, HPSv2Options, PaddedPreparation, load_hpsv2
from crd_fast.rewards.open_clip_weights import OpenClipLayout, clip_from_open_clip, map_names

from .clip_models import CONTEXT, MEAN, STD, OpenClip, save_tokenizer, smooth_images, vocabulary

SIDE = 28
PROMPTS = ["a cat", "two dogs on a bench", "!"]
NO_DATA = [{}] * 3
END = len(vocabulary()) - 1


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.fixture(scope="module")
def model() -> OpenClip:
    """With weights that the half precision of the checkpoint holds."""
    torch.manual_seed(7)
    return OpenClip().half().float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: OpenClip) -> Path:
    path = tmp_path_factory.mktemp("hps")
    save_tokenizer(path)
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, path / CHECKPOINT)
    return path


def options(folder: Path, **settings: object) -> HPSv2Options:
    return HPSv2Options(**({"model": str(folder), "processor": str(folder), "device": "cpu"} | settings))


def ids(*texts: list[int]) -> Tensor:
    """As open_clip's tokenizer gives them: begun, ended, zeros after that."""
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text) + 2] = torch.tensor([END - 1, *text, END])
    return rows


# ---- weights


@pytest.mark.parametrize(
    ("activation", "name"), [(nn.GELU(), "gelu"), (QuickGELU(), "quick_gelu")], ids=["gelu", "quick_gelu"]
)
@pytest.mark.parametrize(("image_heads", "text_heads"), [(2, 3), (1, 2)])
def test_the_mapped_model_is_open_clips(activation, name, image_heads, text_heads):
    theirs = OpenClip(activation, image_heads, text_heads)
    ours = clip_from_open_clip(theirs.state_dict(), OpenClipLayout(activation=name)).eval()
    pixels, texts = torch.randn(3, 3, SIDE, SIDE), ids([5, 9], [], list(range(10, 20)))
    with torch.no_grad():
        image, text = theirs.encode_image(pixels), theirs.encode_text(texts)
        close = {"rtol": 0, "atol": 2e-6}
        torch.testing.assert_close(ours.image_embeddings(pixels), F.normalize(image, dim=-1), **close)
        torch.testing.assert_close(ours.text_embeddings(texts), F.normalize(text, dim=-1), **close)
        features = ours.clip.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(features, image, rtol=1e-4, atol=1e-4)
    assert ours.logit_scale == pytest.approx(theirs.logit_scale.exp().item())
    for features in (image, text):
        assert F.normalize(features, dim=-1).std(0).mean() > 0.005  # inputs matter


def test_the_wrong_activation_or_heads_would_show(model):
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels), dim=-1)
        for layout in (OpenClipLayout(activation="quick_gelu"), OpenClipLayout(image_head_width=40)):
            other = clip_from_open_clip(model.state_dict(), layout).eval().image_embeddings(pixels)
            assert (other - image).abs().max() > 1e-3


def test_every_weight_arrives_once(model):
    state = {key: torch.full_like(value, i) for i, (key, value) in enumerate(model.state_dict().items())}
    ours = clip_from_open_clip(state).clip.state_dict()
    assert sum(value.numel() for value in ours.values()) == sum(value.numel() for value in state.values())
    assert {value.flatten()[0].item() for value in ours.values()} == set(range(len(state)))


def test_leftovers_are_named(model):
    state = model.state_dict() | {
        "visual.attn_pool.query": torch.zeros(2),
        "transformer.resblocks.0.ls_1.gamma": torch.ones(2),
    }
    message = (
        r"2 open_clip weights have no place .*'transformer\.resblocks\.0\.ls_1\.gamma', 'visual\.attn_pool\.query'"
    )
    with pytest.raises(RewardError, match=message):
        clip_from_open_clip(state)
    with pytest.raises(RewardError, match="no place"):
        map_names({"module.logit_scale": torch.tensor(1.0)})


@pytest.mark.parametrize("key", ["visual.proj", "token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight"])
def test_weights_that_the_architecture_needs(model, key):
    state = {k: v for k, v in model.state_dict().items() if k != key}
    with pytest.raises(RewardError, match=f"lack .*{key}"):
        clip_from_open_clip(state)


@pytest.mark.parametrize("key", ["logit_scale", "visual.ln_pre.bias", "transformer.resblocks.1.attn.in_proj_bias"])
def test_missing_weights_are_named(model, key):
    state = {k: v for k, v in model.state_dict().items() if k != key}
    with pytest.raises(RewardError, match=r"missing \["):
        clip_from_open_clip(state)


def test_weights_of_another_shape_are_named(model):
    state = model.state_dict() | {"ln_final.bias": torch.zeros(3)}
    with pytest.raises(RewardError, match=r"mismatched .*text_model\.final_layer_norm\.bias"):
        clip_from_open_clip(state)
    with pytest.raises(RewardError, match="the image encoder is 160 wide: expected a multiple of its heads' 64"):
        clip_from_open_clip(model.state_dict(), OpenClipLayout(image_head_width=64))
    state = model.state_dict() | {"visual.positional_embedding": torch.zeros(4, 160)}
    with pytest.raises(RewardError, match="positions for 3 patches: expected a square"):
        clip_from_open_clip(state)


# ---- images


@pytest.fixture(scope="module")
def preparation(folder: Path) -> PaddedPreparation:
    return PaddedPreparation("", load_hpsv2(str(folder)))


def test_a_wide_image_lies_between_black(preparation):
    """28 x 13 keeps its pixels; 15 rows of black, 7 above and 8 below."""
    images = smooth_images(1, 13, SIDE)
    pixels = preparation.tensor(images) * STD + MEAN
    torch.testing.assert_close(pixels[..., 7:20, :], images)
    assert pixels[..., :7, :].abs().max() < 1e-6 and pixels[..., 20:, :].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("size", "inside"),
    [
        ((56, 56), (slice(None), slice(None))),
        ((56, 20), (slice(None), slice(9, 19))),  # 10 of 28 columns
        ((10, 40), (slice(10, 17), slice(None))),  # 7 of 28 rows
        ((14, 7), (slice(None), slice(7, 21))),  # enlarged
        ((1, 200), (slice(13, 14), slice(None))),  # one row is left
    ],
)
def test_resizing_keeps_the_shape_and_the_colour(preparation, size, inside):
    pixels = preparation.tensor(torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(1, 3, *size)) * STD + MEAN
    expected = torch.zeros(3, SIDE, SIDE)
    expected[:, inside[0], inside[1]] = torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-5)


def test_resizing_is_antialiased(preparation):
    """Stripes of one pixel become grey; without the wider filter they would stay stripes, or one of the two colours."""
    stripes = torch.zeros(1, 3, 112, 112)
    stripes[..., ::2] = 1.0
    pixels = preparation.tensor(stripes) * STD + MEAN
    assert (pixels[..., 2:-2] - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("size", [(28, 28), (50, 20), (20, 50), (13, 28), (200, 150)])
def test_the_paths_differ_by_the_rounding_of_the_image(preparation, size):
    images = smooth_images(2, *size)
    rounded = (images * 255).round() / 255
    exact, tensor = preparation.eight_bit(to_eight_bit(images)), preparation.tensor(images)
    torch.testing.assert_close(exact, preparation.tensor(rounded), rtol=0, atol=1e-5)
    assert ((exact - tensor) * STD).abs().max() * 255 < 0.5 * 1.3**2  # bicubic weights, as above


# ---- scores


def test_scores_are_open_clips_cosines(folder, model):
    images, reward = smooth_images(3, 56, 40), registry.build("hpsv2", options(folder))
    assert isinstance(reward, DifferentiableReward)
    scores = score_batch(reward, images, PROMPTS, NO_DATA)
    assert set(scores) == {"hpsv2"}
    rounded = (images * 255).round() / 255
    resized = F.interpolate(rounded, size=(28, 20), mode="bicubic", antialias=True)
    pixels = (F.pad(resized, (4, 4)) - MEAN) / STD
    tokens = vocabulary()
    # the context holds ten besides the ends
    words = [["a</w>", *"ca", "t</w>"], [*"tw", "o</w>", *"dog", "s</w>", "o", "n</w>", "a</w>"], ["!</w>"]]
    with torch.no_grad():
        text = F.normalize(model.encode_text(ids(*([tokens[w] for w in row] for row in words))), dim=-1)
        expected = (F.normalize(model.encode_image(pixels), dim=-1) * text).sum(-1)
    torch.testing.assert_close(scores["hpsv2"], expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_differentiable_scores_are_near(folder):
    """Measured: at most 0.0001 apart, where scores of different images vary by 0.008."""
    reward = HPSv2(options(folder))
    for size in [(28, 28), (64, 48), (20, 24), (30, 90)]:
        images = smooth_images(3, *size).requires_grad_()
        near = reward.differentiable_scores(images, PROMPTS, NO_DATA)
        assert (near - reward(images, PROMPTS, NO_DATA)["hpsv2"]).abs().max() < 0.0005
        assert torch.autograd.grad(near.sum(), images)[0].abs().sum() > 0


def test_pairs_do_not_mix(folder):
    images = smooth_images(3, 40, 40)
    scores = HPSv2(options(folder, batch_size=2))(images, PROMPTS, NO_DATA)["hpsv2"]
    for row, prompt in enumerate(PROMPTS):
        alone = HPSv2(options(folder))(images[row : row + 1], [prompt], [{}])["hpsv2"]
        torch.testing.assert_close(alone, scores[row : row + 1], rtol=0, atol=1e-6)


def test_bf16_is_close(folder):
    images = smooth_images(3, 40, 40)
    full, half = (HPSv2(options(folder, dtype=t))(images, PROMPTS, NO_DATA)["hpsv2"] for t in ("fp32", "bf16"))
    assert 0 < (full - half).abs().max() < 0.006


def test_the_file_itself_is_a_model_too(folder):
    images = smooth_images(1, 40, 40)
    file = HPSv2(options(folder, model=str(folder / CHECKPOINT)))
    assert torch.equal(file(images, ["a"], [{}])["hpsv2"], HPSv2(options(folder))(images, ["a"], [{}])["hpsv2"])


@pytest.mark.parametrize("missing", ["absent.pt", "", "absent"])
def test_a_missing_checkpoint_says_what_to_download(tmp_path, missing):
    reward = HPSv2(options(tmp_path, model=str(tmp_path / missing)))
    message = "is missing: download HPS_v2.1_compressed.pt from https://huggingface.co/xswu/HPSv2"
    with pytest.raises(RewardError, match=message):
        reward(smooth_images(1, 28, 28), ["a"], [{}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, r"holds \['model'\]: expected a 'state_dict'"),
        ([1.0], "holds list: expected a 'state_dict'"),
        ({"state_dict": {}}, "lack .*visual.conv1.weight"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / CHECKPOINT)
    with pytest.raises(RewardError, match=message):
        load_hpsv2(str(tmp_path))


def test_an_unreadable_checkpoint_is_refused(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"<html>")
    with pytest.raises(RewardError, match="cannot be read, .*download HPS_v2.1_compressed.pt"):
        load_hpsv2(str(tmp_path))


def test_unequal_numbers_name_the_reward(folder):
    reward = HPSv2(options(folder))
    for method in (reward, reward.differentiable_scores):
        with pytest.raises(RewardError, match="'hpsv2' was given 3 images, 2 prompts"):
            method(smooth_images(3, 28, 28), PROMPTS[:2], NO_DATA)


def test_the_released_model_is_the_default():
    assert HPSv2Options().model == "xswu/HPSv2"
    assert HPSv2Options().processor_source == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
