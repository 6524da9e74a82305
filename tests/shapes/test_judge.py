"""The committed judge against the exact detector, on images it was not trained on."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from crd_fast import backbones
from crd_fast.backbones.base import Backbone
from crd_fast.errors import CheckpointError, DataError
from crd_fast.rewards.geneval import evaluate
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.shapes import world
from crd_fast.shapes.judge import GROUPS, LOGIT_CAP, OUTCOMES, SIZES, WEIGHTS, Judge, fact_scores, facts, load_judge

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "shapes-judge"
SEED = 90_000  # training draws its own from small seeds


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """train_judge.py, which imports from its own folder as a script does."""
    folder = str(ROOT / "examples" / "shapes")
    sys.path.insert(0, folder)
    yield importlib.import_module("train_judge")
    sys.path.remove(folder)
    del sys.modules["train_judge"], sys.modules["judge_images"]


@pytest.fixture(scope="module")
def bank(script: ModuleType) -> ModuleType:
    """judge_images.py."""
    return sys.modules["judge_images"]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(MODEL)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones.load(str(ROOT / "models" / "shapes-sd3"))


@pytest.fixture(scope="module")
def generator(backbone: Backbone) -> Backbone:
    return backbone.with_model(str(ROOT / "models" / "shapes-one-step"))


def draw(count: int, seed: int) -> tuple[list[world.Metadata], Tensor, Tensor]:
    """Prompts of the six tasks in turn, renders of them, and renders of corrupted ones, (count, 3, 64, 64)."""
    rng = np.random.default_rng(seed)
    tasks = [world.prompts("all", [task]) for task in world.GENEVAL_TASKS]
    entries = [tasks[i % len(tasks)][rng.integers(len(tasks[i % len(tasks)]))] for i in range(count)]
    wrong = [world.corrupt(entry, rng) for entry in entries]
    right, other = (
        torch.from_numpy(world.render([world.sample_scene(entry, rng) for entry in shown], rng))
        for shown in (entries, wrong)
    )
    return entries, right, other


def verdicts(judge: Judge, images: Tensor, entries: list[world.Metadata]) -> tuple[Tensor, Tensor]:
    """The judge's and the detector's strict verdict, bool (N,)."""
    with torch.no_grad():
        held = fact_scores(judge(images), [facts(entry) for entry in entries])[1].exp() > 0.5
    found = detect_shapes(images)
    return held, torch.tensor([evaluate(d, entry).strict == 1 for d, entry in zip(found, entries, strict=True)])


def samples(script: ModuleType, backbone: Backbone, entries: list[world.Metadata], steps: int, guidance: float | None):
    return script.make_samples(backbone, entries, steps, SEED + steps, guidance_scale=guidance).float() / 255


def test_agrees_with_the_detector_on_renders(judge: Judge) -> None:
    entries, right, wrong = draw(360, SEED)
    images, asked = torch.cat([right, wrong]), entries + entries
    held, exact = verdicts(judge, images, asked)
    assert 0.4 < exact.float().mean() < 0.6, "half of the images should be right"
    assert (held == exact).float().mean() >= 0.97
    for task in world.GENEVAL_TASKS:
        rows = torch.tensor([entry["tag"] == task for entry in asked])
        assert (held == exact)[rows].float().mean() >= 0.93, task


def test_agrees_with_the_detector_on_samples_of_eight_steps(
    judge: Judge, script: ModuleType, backbone: Backbone
) -> None:
    entries, _, _ = draw(300, SEED + 1)
    images = torch.cat(
        [samples(script, backbone, entries[:150], 8, None), samples(script, backbone, entries[150:], 8, 4.0)]
    )
    held, exact = verdicts(judge, images, entries)
    assert 0.25 < exact.float().mean() < 0.75, "both verdicts should be common"
    assert (held == exact).float().mean() >= 0.9


def test_agrees_with_the_detector_on_samples_of_one_step(judge: Judge, script: ModuleType, backbone: Backbone) -> None:
    """Nearly all are blobs and the verdict is hardly ever yes, so what the detector does see has to rank first."""
    entries, _, _ = draw(300, SEED + 2)
    images = samples(script, backbone, entries, 1, 4.0)
    held, exact = verdicts(judge, images, entries)
    assert (held == exact).float().mean() >= 0.95
    with torch.no_grad():
        seen = torch.stack([1 - group[:, 0].exp() for group in judge(images).split(SIZES, -1)[:3]], 1).flatten()
    there = (script.targets(images)[:, :3] > 0).flatten()
    assert there.sum() >= 20
    ranked = (seen[there][:, None] > seen[~there]).float().mean()
    assert ranked >= 0.9


def test_agrees_with_the_detector_on_a_one_step_generator(
    judge: Judge, script: ModuleType, bank: ModuleType, backbone: Backbone, generator: Backbone
) -> None:
    """On its samples, and on those that were moved to please this judge, which it has not seen."""
    entries, _, _ = draw(300, SEED + 9)
    latents = bank.make_one_step(generator, entries, SEED + 9)
    held, exact = verdicts(judge, backbone.decode(latents), entries)
    assert 0.3 < exact.float().mean() < 0.7, "both verdicts should be common"
    assert (held == exact).float().mean() >= 0.85
    config = script.Training()
    pushed = bank.make_pushed(judge, backbone, latents, entries, config.pushes, config.push).float() / 255
    held, exact = verdicts(judge, pushed, entries)
    assert (held == exact).float().mean() >= 0.7


def test_the_right_scene_scores_higher_than_a_corrupted_one(judge: Judge) -> None:
    entries, right, wrong = draw(300, SEED + 3)
    asked = [facts(entry) for entry in entries]
    with torch.no_grad():
        better = fact_scores(judge(right), asked)[0] > fact_scores(judge(wrong), asked)[0]
    assert better.float().mean() >= 0.97


def test_the_score_of_a_wrong_scene_still_has_a_gradient(judge: Judge) -> None:
    entries, _, wrong = draw(60, SEED + 4)
    wrong.requires_grad_()
    fact_scores(judge(wrong), [facts(entry) for entry in entries])[0].sum().backward()
    length = wrong.grad.flatten(1).norm(dim=1)
    assert length.isfinite().all()
    assert length.median() > 1e-3


def test_ascent_on_a_blurred_scene_raises_the_score(judge: Judge, bank: ModuleType) -> None:
    entries, right, _ = draw(12, SEED + 5)
    asked = [facts(entry) for entry in entries]
    start = bank.blur(right, 3.0)
    images = start.clone().requires_grad_()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(fact_scores(judge(images), asked)[0].sum(), images)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-8).view(-1, 1, 1, 1)
        images = (images + 0.3 * gradient / length).detach().clamp(0, 1).requires_grad_()
    before, after = (fact_scores(judge(x), asked)[0] for x in (start, images))
    assert (after > before).float().mean() >= 0.95
    assert after.mean() > before.mean() + 0.2


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_images_have_a_finite_and_ordinary_gradient(judge: Judge, level: float) -> None:
    images = torch.full((2, 3, 64, 64), level, requires_grad=True)
    asked = [facts({"include": [{"class": "circle", "count": 1}]})] * 2
    score = fact_scores(judge(images), asked)[0]
    score.sum().backward()
    assert score.isfinite().all() and images.grad.isfinite().all()
    assert 0 < images.grad.flatten(1).norm(dim=1).max() < 100


def test_outcomes_of_a_question_sum_to_one_and_stay_within_the_cap(judge: Judge) -> None:
    entries, right, _ = draw(12, SEED + 6)
    hard = torch.cat([right, torch.rand(12, 3, 64, 64), 1e4 * torch.ones(1, 3, 64, 64)])
    with torch.no_grad():
        groups = judge(hard).split(SIZES, -1)
    for group in groups:
        torch.testing.assert_close(group.exp().sum(-1), torch.ones(len(hard)))
        assert (group >= -2 * LOGIT_CAP - np.log(group.shape[-1])).all()


def test_an_image_is_read_the_same_alone_and_in_a_batch(judge: Judge) -> None:
    _, right, _ = draw(4, SEED + 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([judge(image[None]) for image in right]), judge(right), rtol=0, atol=1e-4)


def test_facts_name_the_columns_of_the_questions() -> None:
    names = [f"{name}: {outcome}" for name, outcomes in GROUPS for outcome in outcomes]
    assert len(names) == OUTCOMES

    def said(entry: world.Metadata) -> list[list[str]]:
        return [[names[i] for i in fact] for fact in facts(entry)]

    assert said({"include": [{"class": "square", "count": 2, "color": "blue"}]}) == [
        ["squares: 2"],
        ["colour of squares: blue"],
    ]
    triangle_over_circle = {
        "include": [{"class": "circle", "count": 1}, {"class": "triangle", "count": 1, "position": ["above", 0]}]
    }
    assert said(triangle_over_circle) == [["circles: 1"], ["triangles: 1"], ["circle triangle down: below"]]
    excluded = {
        "include": [{"class": "circle", "count": 3}],
        "exclude": [{"class": "circle", "count": 4}, {"class": "square", "count": 2}],
    }
    assert said(excluded) == [["circles: 3"], ["squares: 0", "squares: 1"]]
    twice = {"include": [{"class": "circle", "count": 1}, {"class": "circle", "count": 1}]}
    assert said(twice) == [["circles: 2"]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "42"}, "no shapes are asked for .*reads shapes, and no texts"),
        ({"include": [{"class": "cow", "count": 1}]}, "'cow' is not one of the judge's, circle"),
        ({"include": [{"class": "circle", "count": 1, "color": "pink"}]}, "colour 'pink'"),
        ({"include": [{"class": "circle", "count": 5}]}, "5 of them .* counts to 4"),
        ({"include": [{"class": "circle", "count": 1}], "exclude": [{"class": "square", "count": 6}]}, "counts to 4"),
        ({"include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 2}]}, "no image can"),
        (
            {"include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "circle", "count": 1}]},
            "1 of 2 circles have a colour",
        ),
        (
            {"include": [{"class": "circle", "count": 2}, {"class": "square", "count": 1, "position": ["above", 0]}]},
            "1 square above 2 circle",
        ),
    ],
)
def test_entries_that_the_judge_does_not_cover_are_refused(entry: world.Metadata, message: str) -> None:
    with pytest.raises(DataError, match=message):
        facts(entry)


def test_the_score_is_the_mean_and_the_joint_the_sum_of_the_facts() -> None:
    torch.manual_seed(1)
    log_probs = torch.cat([torch.randn(2, size).log_softmax(-1) for size in SIZES], -1)
    asked = [[(1,), (19,)], [(0, 1, 2)]]
    mean, joint = fact_scores(log_probs, asked)
    first = log_probs[0, 1] + log_probs[0, 19]
    second = log_probs[1, :3].exp().sum().log()
    torch.testing.assert_close(joint, torch.stack([first, second]))
    torch.testing.assert_close(mean, torch.stack([first / 2, second]))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64), torch.zeros(1, 3, 32, 64)]
)
def test_images_of_another_size_or_type_are_refused(judge: Judge, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating point \(B, 3, 64, 64\)"):
        judge(images)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is missing: .*train_judge.py"):
        load_judge(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_judge(tmp_path)


def test_the_committed_judge_is_small_and_says_how_it_was_made() -> None:
    assert sum(parameter.numel() for parameter in Judge().parameters()) <= 300_000
    assert (MODEL / WEIGHTS).stat().st_size <= 1.5e6
    made = json.loads((MODEL / "judge.json").read_text())
    assert made["command"].startswith("python examples/shapes/train_judge.py")
    assert made["agreement"]["renders"]["agree"] >= 0.97


def test_the_detectors_answers_are_those_of_the_scene(script: ModuleType) -> None:
    items = (
        world.Item("circle", "red", 14.0, 14.0, 8.0),
        world.Item("square", "blue", 48.0, 16.0, 8.0),
        world.Item("square", "green", 48.0, 46.0, 8.0),
    )
    answers = script.targets(torch.from_numpy(world.render([world.Scene(items), world.Scene(items[:2])])))
    circles, squares, triangles, red, mixed, none = answers[0, :6].tolist()
    assert (circles, squares, triangles, red, mixed, none) == (1, 2, 0, 0, 4, script.UNKNOWN)
    assert (answers[0, 6:] == script.UNKNOWN).all()
    assert answers[1, [1, 4, 6, 9]].tolist() == [1, 2, 0, 1]  # one blue square; the circle left of it, on its level


def test_training_repeats_bit_by_bit(script: ModuleType) -> None:
    small = replace(script.Training(), cycles=((4, 3e-3), (2, 1e-3)), batch=8, replayed=3)
    renders = script.make_renders(20, np.random.default_rng(3))
    answers = script.targets(renders.float() / 255)
    first, second = (script.train(small, renders, answers).state_dict() for _ in range(2))
    torch.manual_seed(small.seed)
    untrained = Judge().state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert not torch.equal(first["head.3.weight"], untrained["head.3.weight"])


def test_replayed_images_have_moved_against_the_judge(script: ModuleType, judge: Judge) -> None:
    """A step along the sign of the loss's gradient is what the judge is trained to withstand."""
    _, right, _ = draw(24, SEED + 8)
    answers = script.targets(right)
    images = right.clone().requires_grad_()
    loss = script.answer_loss(judge(images), answers)
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    attack = script.Training().attack
    with torch.no_grad():
        moved = script.answer_loss(judge((right + attack * gradient.sign()).clamp(0, 1)), answers)
        jittered = script.answer_loss(judge((right + attack * torch.randn_like(right).sign()).clamp(0, 1)), answers)
    assert moved.mean() > jittered.mean()
    assert moved.mean() < 4.0, "twelve questions answered at random cost about 16"


def test_pushed_samples_please_the_judge_more(
    judge: Judge, bank: ModuleType, backbone: Backbone, generator: Backbone
) -> None:
    """Every third by one step, by two and by three; without length they stay where they are."""
    entries, _, _ = draw(12, SEED + 10)
    asked = [facts(entry) for entry in entries]
    latents = bank.make_one_step(generator, entries, SEED + 10)
    there, moved = (bank.make_pushed(judge, backbone, latents, entries, 3, length) for length in (0.0, 0.06))
    assert torch.equal(there, bank.as_bytes(backbone.decode(latents)))
    with torch.no_grad():
        before, after = (fact_scores(judge(images.float() / 255), asked)[0] for images in (there, moved))
    assert (after > before).float().mean() >= 0.7 and after.mean() > before.mean() + 0.1
    once = bank.make_pushed(judge, backbone, latents, entries, 1, 0.06)
    same = (once == moved).flatten(1).all(1)
    assert same[0::3].all() and not same[1::3].any() and not same[2::3].any()


def test_estimates_of_hardly_noised_samples_are_the_samples(
    bank: ModuleType, backbone: Backbone, generator: Backbone
) -> None:
    entries, _, _ = draw(12, SEED + 11)
    latents = bank.make_one_step(generator, entries, SEED + 11)
    decoded = backbone.decode(latents)
    near, far = (
        (bank.make_estimates(backbone, latents, entries, latest, 3).float() / 255 - decoded).abs().mean()
        for latest in (0.02, 0.9)
    )
    assert 5 * near < far


def test_training_asks_twice_a_cycle_for_more_images(script: ModuleType) -> None:
    """After a half and three quarters of its steps, of the judge as it is then."""
    small = replace(script.Training(), cycles=((8, 3e-3), (4, 1e-3)), batch=8, replayed=3)
    renders = script.make_renders(20, np.random.default_rng(3))
    answers = script.targets(renders.float() / 255)
    asked = []

    def more(judge: Judge, number: int) -> tuple[Tensor, Tensor]:
        asked.append((number, judge.training, judge.state_dict()["head.3.weight"].clone()))
        return renders[:5], answers[:5]

    trained = script.train(small, renders, answers, more)
    assert [number for number, _, _ in asked] == [0, 1, 2, 3] and not any(training for _, training, _ in asked)
    assert all(not torch.equal(first[2], then[2]) for first, then in itertools.pairwise(asked))
    plain = script.train(small, renders, answers)
    assert not torch.equal(trained.state_dict()["head.3.weight"], plain.state_dict()["head.3.weight"])


def test_a_cycle_depends_on_the_weights_alone(script: ModuleType) -> None:
    """So a judge can be trained further from its file."""
    both = replace(script.Training(), cycles=((3, 3e-3), (2, 1e-3)), batch=8, replayed=3)
    renders = script.make_renders(20, np.random.default_rng(3))
    answers = script.targets(renders.float() / 255)
    whole = script.train(both, renders, answers).state_dict()
    first = script.train(replace(both, cycles=both.cycles[:1]), renders, answers).state_dict()
    torch.manual_seed(99)
    continued = Judge()
    continued.load_state_dict(first)
    script.train_cycle(both, continued, 1, renders, answers)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in continued.state_dict().items())
