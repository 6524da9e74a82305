"""ImageReward as a reward: tokens, pixels by both paths, batches, gradients, precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer, CLIPImageProcessorPil

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import registry, score_batch
from crd_fast.rewards.base import DifferentiableReward
from crd_fast.rewards.imagereward import ImageReward, ImageRewardOptions, pil_pixels, tensor_pixels
from tests.rewards.test_imagereward_weights import SIDE, Original, random_state, write

NAME = "imagereward"
STD = (0.26862954, 0.26130258, 0.27577711)
WORDS = "a red blue green cube ball on the left of two big small".split()  # ids from 5 on
PROMPTS = ["a red cube", "Two BIG balls", "the left of a blue ball on a green cube", "small", "a red cube"]
IDS = [
    [2, 5, 6, 9, 3],
    [2, 15, 16, 1, 3],  # "balls" is no word of this vocabulary
    [2, 12, 13, 14, 5, 7, 10, 11, 5, 8, 9, 3],
    [2, 17, 3],
    [2, 5, 6, 9, 3],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("imagereward"), random_state())
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder)
    return folder


def build(folder: Path, **options: object) -> ImageReward:
    settings = {"model": str(folder), "tokenizer": str(folder), "device": "cpu"} | options
    reward = registry.build(NAME, ImageRewardOptions(**settings))
    assert isinstance(reward, ImageReward)
    return reward


def pictures() -> Tensor:
    """(5, 3, 24, 40): ramps, waves and noise."""
    generator = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 40), indexing="ij")
    return torch.stack(
        [
            torch.stack([x, y, 1 - x]),
            torch.stack([y, (9 * x).sin() / 2 + 0.5, x * y]),
            torch.rand(3, 24, 40, generator=generator),
            torch.stack([(x > 0.5).float(), (y > 0.5).float(), x]),
            torch.rand(3, 1, 1, generator=generator).expand(3, 24, 40),
        ]
    )


def score(reward: ImageReward, images: Tensor, prompts: list[str]) -> Tensor:
    return score_batch(reward, images, prompts, [{}] * len(prompts))[NAME]


def differentiable(reward: ImageReward, images: Tensor, prompts: list[str]) -> Tensor:
    return reward.differentiable_scores(images, prompts, [{}] * len(prompts))


def original(pixels: Tensor, ids: list[list[int]]) -> Tensor:
    padded = torch.zeros(len(ids), 35, dtype=torch.long)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return Original(random_state())(pixels, padded, (padded > 0).long())


def test_a_score_for_each_pair_from_its_own_tokens_and_pixels(folder: Path) -> None:
    images = pictures()
    scores = score(build(folder), images, PROMPTS)
    torch.testing.assert_close(scores, original(pil_pixels(images, SIDE), IDS), rtol=0, atol=2e-5)
    assert scores.std() > 0.05


def test_prompts_are_cut_at_35_tokens(folder: Path) -> None:
    words = (WORDS * 4)[:50]
    image = pictures()[:1]
    long, cut, shorter = (score(build(folder), image, [" ".join(words[:count])]) for count in (50, 33, 32))
    assert torch.equal(long, cut)
    assert (long - shorter).abs() > 1e-3


def test_special_tokens_of_blip_are_known_in_prompts(folder: Path) -> None:
    image = pictures()[:1]
    expected = original(pil_pixels(image, SIDE), [[2, 18, 5, 19, 3]])
    torch.testing.assert_close(score(build(folder), image, ["[DEC] a [ENC]"]), expected, rtol=0, atol=2e-5)


def test_order_and_batch_size_do_not_matter(folder: Path) -> None:
    images = pictures()
    whole = score(build(folder), images, PROMPTS)
    order = [3, 0, 4, 2, 1]
    for size in (1, 2, 16):
        shuffled = score(build(folder, batch_size=size), images[order], [PROMPTS[i] for i in order])
        torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (16, 16), (64, 64), (10, 20), (100, 18), (16, 30)])
def test_eight_bit_pixels_are_those_of_the_clip_processor(size: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    expected = processor(images=list(levels), return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(pil_pixels(images, SIDE), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "top"), [(SIDE, 0), (SIDE + 1, 0), (SIDE + 2, 1), (SIDE + 3, 2), (SIDE + 5, 2)])
def test_an_odd_margin_is_split_as_the_authors_library_does(height: int, top: int) -> None:
    """Half of it, rounded to an even number: what the authors' image library makes of a half."""
    image = torch.rand(1, 3, height, SIDE)
    square = image[..., top : top + SIDE, :]
    for pixels in (pil_pixels, tensor_pixels):
        assert torch.equal(pixels(image, SIDE), pixels(square, SIDE))
        assert torch.equal(pixels(image.mT, SIDE), pixels(square.mT, SIDE))


@pytest.mark.parametrize("size", [(24, 40), (64, 48), (16, 16), (10, 12)])
def test_tensor_pixels_are_eight_bit_pixels_but_for_the_rounding(size: tuple[int, int]) -> None:
    """PIL rounds after each of two passes; the second carries the first error on by at most 1.25, the sum of the
    filter's absolute weights: 1.125 levels in all, of 8-bit images of any contrast."""
    images = torch.randint(0, 256, (2, 3, *size)) / 255
    levels = (tensor_pixels(images, SIDE) - pil_pixels(images, SIDE)) * 255 * torch.tensor(STD)[:, None, None]
    assert levels.abs().max() <= 1.13


def test_differentiable_scores_are_close_to_the_eight_bit_ones(folder: Path) -> None:
    reward, images = build(folder), pictures()
    tensor, eight_bit = differentiable(reward, images, PROMPTS), score(reward, images, PROMPTS)
    assert tensor.dtype == torch.float32 and tensor.shape == (5,)
    assert eight_bit.std() > 0.2
    torch.testing.assert_close(tensor.detach(), eight_bit, rtol=0, atol=0.01)


def test_gradients_are_the_original_architectures_and_reach_the_images_only(folder: Path) -> None:
    reward = build(folder, batch_size=2)
    images = pictures().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    (gradient,) = torch.autograd.grad((differentiable(reward, images, PROMPTS) * weights).sum(), images)
    (expected,) = torch.autograd.grad((original(tensor_pixels(images, SIDE), IDS) * weights).sum(), images)
    assert expected.abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in reward._shared.module().parameters())
    assert not score(reward, images, PROMPTS).requires_grad


def test_an_image_has_no_gradient_of_another_images_score(folder: Path) -> None:
    images = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(differentiable(build(folder), images, PROMPTS)[1], images)
    assert gradient[1].abs().max() > 0 and not gradient[[0, 2, 3, 4]].any()


def test_bf16_is_close_to_fp32(folder: Path) -> None:
    images = pictures()
    half, full = (score(build(folder, dtype=dtype), images, PROMPTS) for dtype in ("bf16", "fp32"))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert full.std() > 0.2
    torch.testing.assert_close(half, full, rtol=0, atol=0.03)


def test_offload_scores_the_same_and_refuses_gradients(folder: Path) -> None:
    images = pictures()
    reward = build(folder, offload=True)
    assert torch.equal(score(reward, images, PROMPTS), score(build(folder), images, PROMPTS))
    with pytest.raises(ConfigError, match="rewards.imagereward.offload is true: expected false where gradients"):
        differentiable(reward, images, PROMPTS)


def test_images_and_prompts_that_do_not_pair_up_are_refused(folder: Path) -> None:
    reward, images = build(folder), pictures()
    for scores in (reward, reward.differentiable_scores):
        with pytest.raises(RewardError, match="5 images, 1 prompts"):
            scores(images, ["a red cube"], [{}] * 5)


def test_missing_files_are_an_error_that_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="has no ImageReward.pt: .* hf download zai-org/ImageReward"):
        score(build(tmp_path), pictures(), PROMPTS)
    with pytest.raises(RewardError, match="'/no/such/folder' cannot be loaded: .* give a folder with its files"):
        score(build(Path("/no/such/folder")), pictures(), PROMPTS)
    with pytest.raises(RewardError, match="'/no/such/folder' cannot be loaded: .* give a folder with its files"):
        score(build(folder, tokenizer="/no/such/folder"), pictures(), PROMPTS)


def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}).save_pretrained(tmp_path)
    with pytest.raises(
        RewardError, match=r"has 7 tokens with \[DEC\] and \[ENC\], model .* 20: expected equal numbers"
    ):
        score(build(folder, tokenizer=str(tmp_path)), pictures(), PROMPTS)


def test_the_registry_knows_it() -> None:
    assert registry.options_type(NAME) is ImageRewardOptions
    reward = registry.build(NAME, ImageRewardOptions())
    assert isinstance(reward, ImageReward) and isinstance(reward, DifferentiableReward)
    assert reward.differentiable and reward.requires == frozenset()
    with pytest.raises(ConfigError, match="rewards.imagereward.tokenizer is ''"):
        ImageRewardOptions(tokenizer="")
