"""GenEval as a reward: what it returns, and what it asks of a detector and of what names colours."""

from __future__ import annotations

import pytest
import torch

from crd_fast.errors import ConfigError, DataError, RewardError
from crd_fast.rewards import Detection, GenEvalReward, registry
from crd_fast.rewards.geneval import Vocabulary


def obj(label, color=None, score=0.95):
    return Detection(label, score, (27.0, 27.0, 37.0, 37.0), color)


ANY_COW = {"tag": "single_object", "include": [{"class": "cow", "count": 1}]}
RED_COW = {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}]}
IMAGES = torch.full((2, 3, 8, 8), 0.5)
BATCH = (["a cow", "a red cow"], [ANY_COW, RED_COW])
FOUND = [[obj("cow")], [obj("cow", "blue")]]


@pytest.mark.parametrize(
    ("score", "expected"),
    [("soft", [1, 0.5]), ("strict", [1, 0]), ("accuracy", [1, 0]), ("strict+soft", [1, 0.25])],
)
def test_reward_returns_the_chosen_score_and_diagnostics(score, expected):
    reward = GenEvalReward(lambda images: FOUND, score=score)
    result = reward(IMAGES, *BATCH)
    assert result["geneval"].tolist() == expected
    assert set(result) == {"geneval", "accuracy", "strict", "soft"}
    assert result["soft"].tolist() == [1, 0.5]
    for values in result.values():
        assert values.dtype == torch.float32
        assert values.shape == (2,)
        assert values.device.type == "cpu"


def test_reward_passes_images_to_the_detector():
    seen = []
    GenEvalReward(lambda images: seen.append(images) or FOUND)(IMAGES, *BATCH)
    assert seen[0] is IMAGES


def test_reward_names_the_item_without_include():
    reward = GenEvalReward(lambda images: FOUND)
    with pytest.raises(RewardError, match=r"item 1, prompt 'a red cow', .*\['text'\].*'include'"):
        reward(IMAGES, BATCH[0], [BATCH[1][0], {"text": "42"}])
    assert reward.requires == {"include"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"include": [{"class": "cwo", "count": 1}]}, r"include\[0\].class is 'cwo', .*did you mean 'cow'"),
        (
            {"include": [{"class": "cow", "count": 1, "color": "rde"}]},
            r"include\[0\].color is 'rde'.*did you mean 'red'",
        ),
        (ANY_COW | {"exclude": [{"class": "dgo", "count": 2}]}, r"exclude\[0\].class is 'dgo', .*did you mean 'dog'"),
    ],
)
def test_reward_refuses_names_that_its_detector_never_finds(entry, message):
    """They would score 0 whatever the image shows."""
    reward = GenEvalReward(lambda images: FOUND, vocabulary=Vocabulary(("cow", "dog"), ("red", "blue")))
    assert reward(IMAGES, *BATCH)["geneval"].tolist() == [1, 0.5]
    with pytest.raises(RewardError, match=f"item 1, prompt 'a red cow': {message}"):
        reward(IMAGES, BATCH[0], [ANY_COW, entry])


@pytest.mark.parametrize(("detector", "name", "known"), [("shapes", "cow", "circle"), ("mask2former", "circle", "cow")])
def test_the_detectors_have_their_own_names(detector, name, known):
    reward = registry.build("geneval", registry.options_type("geneval")(detector=detector))
    with pytest.raises(DataError, match=f"class is '{name}', which the detector does not know"):
        reward.vocabulary.check({"include": [{"class": name, "count": 1}]})
    reward.vocabulary.check({"include": [{"class": known, "count": 1, "color": "red"}]})


def test_reward_refuses_a_detector_of_wrong_length():
    with pytest.raises(RewardError, match="1 lists for 2 images"):
        GenEvalReward(lambda images: FOUND[:1])(IMAGES, *BATCH)


def test_reward_asks_for_colors_where_they_count():
    """Item 0 asks for none; item 1 has a dog and a doubtful cow, whose colours nobody asks for."""
    found = [[obj("cow")], [obj("dog"), obj("cow", score=0.6), obj("cow", score=0.2), obj("cow", score=0.7)]]
    seen = []

    def paint(images, objects):
        seen.extend((index, detection.score) for index, detection in objects)
        assert images is IMAGES
        return ["red", "blue"]

    result = GenEvalReward(lambda images: found, colors=paint)(IMAGES, *BATCH)
    assert seen == [(1, 0.6), (1, 0.7)]
    assert result["accuracy"].tolist() == [1, 0]  # blue is the more confident one
    assert found[1][1].color is None


def test_reward_refuses_colors_of_wrong_length():
    with pytest.raises(RewardError, match="0 colours were named for 1 objects"):
        GenEvalReward(lambda images: FOUND, colors=lambda images, objects: [])(IMAGES, *BATCH)


def test_reward_asks_for_no_colors_when_nothing_is_there():
    def never(images, objects):
        raise AssertionError("asked about nothing")

    result = GenEvalReward(lambda images: [[obj("cow")], []], colors=never)(IMAGES, *BATCH)
    assert result["accuracy"].tolist() == [1, 0]


@pytest.mark.parametrize("arguments", [{"score": "sotf"}, {"name": "strict"}])
def test_reward_refuses_wrong_settings(arguments):
    with pytest.raises(ConfigError):
        GenEvalReward(lambda images: FOUND, **arguments)
