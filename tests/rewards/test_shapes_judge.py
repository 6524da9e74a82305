"""The differentiable reward of the shapes world, as recipes and one-step training see it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crd_fast.data.prompts import PromptSet, load_prompts
from crd_fast.errors import ConfigError, DataError, RewardError
from crd_fast.rewards import Reward, registry, score_batch
from crd_fast.rewards.base import DifferentiableReward
from crd_fast.rewards.shapes_judge import ShapesJudge, ShapesJudgeOptions
from crd_fast.shapes import world
from crd_fast.shapes.judge import LOGIT_CAP, SIZES

ROOT = Path(__file__).parents[2]
NAME = "shapes_judge"
OPTIONS = ShapesJudgeOptions(model=str(ROOT / "models" / "shapes-judge"), device="cpu")


@pytest.fixture(scope="module")
def reward() -> ShapesJudge:
    built = registry.build(NAME, OPTIONS)
    assert isinstance(built, ShapesJudge)
    return built


def batch(count: int = 24, seed: int = 70_000) -> tuple[Tensor, list[str], list[world.Metadata]]:
    """Renders (count, 3, 64, 64), every other one of a corrupted prompt."""
    rng = np.random.default_rng(seed)
    catalogue = world.prompts("test", world.GENEVAL_TASKS)
    entries = [catalogue[i] for i in rng.integers(len(catalogue), size=count)]
    shown = [world.corrupt(entry, rng) if i % 2 else entry for i, entry in enumerate(entries)]
    images = torch.from_numpy(world.render([world.sample_scene(entry, rng) for entry in shown], rng))
    return images, [entry["prompt"] for entry in entries], entries


def test_the_registry_knows_it(reward: ShapesJudge) -> None:
    assert NAME in registry.available() and registry.options_type(NAME) is ShapesJudgeOptions
    assert isinstance(reward, Reward) and isinstance(reward, DifferentiableReward)
    assert reward.name == NAME and reward.differentiable and reward.requires == {"include"}


def test_scores_are_within_the_range_and_right_images_come_first(reward: ShapesJudge) -> None:
    scores = score_batch(reward, *batch())
    assert set(scores) == {NAME, "strict"}
    low, high = reward.range
    for value in scores.values():
        assert value.dtype == torch.float32 and value.shape == (24,) and value.device.type == "cpu"
    assert (scores[NAME] >= low).all() and (scores[NAME] <= high).all()
    assert (scores["strict"] >= 0).all() and (scores["strict"] <= 1).all()
    assert scores["strict"][0::2].median() > 0.8 and scores["strict"][1::2].median() < 0.2
    assert scores[NAME][0::2].mean() > scores[NAME][1::2].mean() + 0.5


def test_the_range_holds_for_the_worst_logits_that_the_cap_allows(reward: ShapesJudge) -> None:
    low, high = reward.range
    worst = torch.tensor([-LOGIT_CAP] + [LOGIT_CAP] * (max(SIZES) - 1)).log_softmax(0)[0].item()
    assert low <= worst < low + 0.2
    assert high == 0


def test_the_path_with_a_graph_gives_the_same_numbers(reward: ShapesJudge) -> None:
    images, prompts, entries = batch()
    torch.testing.assert_close(
        reward.differentiable_scores(images, prompts, entries).detach(),
        reward(images, prompts, entries)[NAME],
        rtol=0,
        atol=0,
    )


def test_the_gradient_is_that_of_finite_differences(reward: ShapesJudge) -> None:
    images, prompts, entries = batch(6)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.differentiable_scores(images, prompts, entries).sum(), images)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(images.shape, generator=generator)
    direction += gradient / gradient.norm() * direction.norm()
    step = 1e-3
    up, down = (
        reward(images.detach() + sign * step * direction, prompts, entries)[NAME].double().sum() for sign in (1, -1)
    )
    torch.testing.assert_close(((up - down) / (2 * step)).float(), (gradient * direction).sum(), rtol=0.05, atol=1e-2)


def test_nothing_but_the_images_has_a_gradient(reward: ShapesJudge) -> None:
    images, prompts, entries = batch(2)
    images.requires_grad_()
    reward.differentiable_scores(images, prompts, entries).sum().backward()
    assert images.grad.abs().sum() > 0
    assert reward._judge is not None and all(p.grad is None for p in reward._judge.parameters())


def test_an_image_alone_has_the_gradient_it_has_in_a_batch(reward: ShapesJudge) -> None:
    images, prompts, entries = batch(4)
    images.requires_grad_()
    (together,) = torch.autograd.grad(reward.differentiable_scores(images, prompts, entries).sum(), images)
    alone = images.detach()[2:3].requires_grad_()
    (own,) = torch.autograd.grad(reward.differentiable_scores(alone, prompts[2:3], entries[2:3]).sum(), alone)
    torch.testing.assert_close(own[0], together[2], rtol=1e-3, atol=1e-5)


def test_half_precision_images_are_scored_in_single_precision(reward: ShapesJudge) -> None:
    images, prompts, entries = batch(4)
    low = images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.differentiable_scores(low, prompts, entries)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(low.float(), prompts, entries)[NAME])


def test_a_sign_is_refused_at_load_and_when_scored(reward: ShapesJudge) -> None:
    images, _, _ = batch(1)
    sign = world.prompts("test", ["text"])[0]
    with pytest.raises(RewardError, match="item 0, prompt 'a sign .*'include'"):
        reward(images, [sign["prompt"]], [sign])
    with pytest.raises(DataError, match="requires 'include'"):
        load_prompts(str(ROOT / "recipes" / "prompts" / "shapes_test.jsonl")).require(reward.requires)


def test_an_entry_of_another_world_names_its_item(reward: ShapesJudge) -> None:
    images, prompts, entries = batch(2)
    cow = {"tag": "single_object", "include": [{"class": "cow", "count": 1}]}
    with pytest.raises(RewardError, match="'shapes_judge': item 1, prompt 'a cow': the class 'cow'"):
        reward(images, [prompts[0], "a cow"], [entries[0], cow])
    with pytest.raises(DataError, match="made, prompt 1: reward 'shapes_judge': the class 'cow'"):
        PromptSet((prompts[0], "a cow"), (entries[0], cow), "made").require_for(reward)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(2, 3, 32, 32), r"\(2, 3, 32, 32\)"),
        (torch.zeros(2, 1, 64, 64), r"\(2, 1, 64, 64\)"),
    ],
)
def test_images_of_another_size_or_type_are_refused(reward: ShapesJudge, images: Tensor, message: str) -> None:
    _, prompts, entries = batch(2)
    for score in (reward, reward.differentiable_scores):
        with pytest.raises(RewardError, match=f"'shapes_judge'.*{message}.*the judge of the shapes world"):
            score(images, prompts, entries)


def test_unequal_numbers_are_refused(reward: ShapesJudge) -> None:
    images, prompts, entries = batch(3)
    with pytest.raises(RewardError, match="3 images, 2 prompts"):
        reward(images, prompts[:2], entries)


def test_missing_weights_and_an_empty_path_are_named(tmp_path: Path) -> None:
    images, prompts, entries = batch(1)
    with pytest.raises(RewardError, match=r"'shapes_judge'.*is missing: .*train_judge.py"):
        registry.build(NAME, ShapesJudgeOptions(model=str(tmp_path)))(images, prompts, entries)
    with pytest.raises(ConfigError, match="model is ''"):
        ShapesJudgeOptions(model="")
