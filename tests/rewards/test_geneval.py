"""GenEval's rules on hand-made detections."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.errors import DataError, RewardError
from crd_fast.rewards import Detection, evaluate
from crd_fast.rewards.geneval import relations


def at(x, y, size=10.0):
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def obj(label, color=None, score=0.95, x=32.0, y=32.0, size=10.0):
    return Detection(label, score, at(x, y, size), color)


def entry(tag, include, exclude=None):
    return {"tag": tag, "include": include} | ({"exclude": exclude} if exclude else {})


def check(detections, metadata, accuracy, strict, soft):
    result = evaluate(detections, metadata)
    assert (result.accuracy, result.strict) == (accuracy, strict), result.reasons
    assert result.soft == pytest.approx(soft)
    assert bool(result.reasons) == (strict == 0)
    return result


SINGLE = entry("single_object", [{"class": "bench", "count": 1}])
TWO = entry("two_object", [{"class": "bench", "count": 1}, {"class": "cow", "count": 1}])
THREE_COWS = entry("counting", [{"class": "cow", "count": 3}], [{"class": "cow", "count": 4}])
RED_COW = entry("colors", [{"class": "cow", "count": 1, "color": "red"}])
LEFT = entry("position", [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}])
ATTRIBUTES = entry(
    "color_attr",
    [{"class": "cow", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
)


# ---- one object and two objects


def test_single_object():
    check([obj("bench")], SINGLE, 1, 1, 1)


def test_single_object_missing():
    result = check([obj("cow")], SINGLE, 0, 0, 0)
    assert result.reasons == ("expected bench>=1, found 0",)


def test_single_object_twice_is_accurate_but_not_strict():
    check([obj("bench"), obj("bench", x=50)], SINGLE, 1, 0, 0)


def test_other_classes_do_not_matter_without_exclude():
    check([obj("bench"), obj("cow"), obj("dog")], SINGLE, 1, 1, 1)


def test_sixteen_found_for_one_stays_in_range():
    check([obj("bench", x=float(i)) for i in range(16)], SINGLE, 1, 0, 0)


def test_two_objects():
    check([obj("bench"), obj("cow")], TWO, 1, 1, 1)
    check([obj("bench")], TWO, 0, 0, 0.5)
    check([obj("bench"), obj("cow"), obj("cow")], TWO, 1, 0, 0.5)


# ---- counting


@pytest.mark.parametrize(
    ("found", "accuracy", "strict", "soft"),
    [
        (0, 0, 0, 0),
        (1, 0, 0, 1 / 3),
        (2, 0, 0, 2 / 3),
        (3, 1, 1, 1),
        (4, 0, 0, 2 / 3),
        (6, 0, 0, 0),
        (9, 0, 0, 0),
    ],
)
def test_counting(found, accuracy, strict, soft):
    check([obj("cow", x=float(i)) for i in range(found)], THREE_COWS, accuracy, strict, soft)


def test_counting_ignores_boxes_that_are_not_certain():
    certain = [obj("cow", score=0.91, x=float(i)) for i in range(3)]
    doubtful = [obj("cow", score=0.9, x=50.0), obj("cow", score=0.6, x=55.0)]
    check(certain + doubtful, THREE_COWS, 1, 1, 1)
    check(certain[:2] + doubtful, THREE_COWS, 0, 0, 2 / 3)


def test_threshold_of_other_tasks_is_exclusive():
    check([obj("bench", score=0.3)], SINGLE, 0, 0, 0)
    check([obj("bench", score=0.31)], SINGLE, 1, 1, 1)


def test_at_most_sixteen_of_a_class():
    sixteen = entry("counting", [{"class": "cow", "count": 16}], [{"class": "cow", "count": 17}])
    check([obj("cow", x=float(i)) for i in range(30)], sixteen, 1, 1, 1)


def test_the_sixteen_most_confident_are_kept():
    weak = [obj("cow", "blue", score=0.5, x=float(i)) for i in range(16)]
    all_red = entry("colors", [{"class": "cow", "count": 2, "color": "red"}])
    result = evaluate([*weak, obj("cow", "red", 0.9), obj("cow", "red", 0.9)], all_red)
    assert result.accuracy == 1


def test_exclude_of_another_class():
    without_dogs = entry("single_object", [{"class": "cow", "count": 1}], [{"class": "dog", "count": 2}])
    check([obj("cow"), obj("dog")], without_dogs, 1, 1, 1)
    result = check([obj("cow"), obj("dog"), obj("dog")], without_dogs, 0, 0, 1)
    assert result.reasons == ("expected dog<2, found 2",)


# ---- colours


def test_color():
    check([obj("cow", "red")], RED_COW, 1, 1, 1)
    check([obj("cow", "blue")], RED_COW, 0, 0, 0.5)
    check([obj("cow")], RED_COW, 0, 0, 0.5)
    check([], RED_COW, 0, 0, 0)


def test_color_of_the_most_confident_object_decides():
    check([obj("cow", "red", 0.8), obj("cow", "blue", 0.9)], RED_COW, 0, 0, 0.5)
    check([obj("cow", "red", 0.9), obj("cow", "blue", 0.8)], RED_COW, 1, 0, 0.5)


def test_color_tie_goes_to_the_first_given():
    red, blue = obj("cow", "red"), obj("cow", "blue")
    check([red, blue], RED_COW, 1, 0, 0.5)
    check([blue, red], RED_COW, 0, 0, 0.5)


def test_color_share_of_several():
    three_red = entry("counting", [{"class": "cow", "count": 3, "color": "red"}])
    check([obj("cow", c) for c in ("red", "red", "blue")], three_red, 0, 0, (1 + 2 / 3) / 2)
    check([obj("cow", c) for c in ("red", "red", "red")], three_red, 1, 1, 1)


def test_color_attribution():
    check([obj("cow", "red"), obj("dog", "blue")], ATTRIBUTES, 1, 1, 1)
    check([obj("cow", "blue"), obj("dog", "red")], ATTRIBUTES, 0, 0, 0.5)
    check([obj("cow", "red"), obj("dog", "red")], ATTRIBUTES, 0, 0, 0.75)


def test_color_is_asked_of_as_many_as_are_counted():
    two_red = entry("counting", [{"class": "cow", "count": 2, "color": "red"}], [{"class": "cow", "count": 3}])
    reds = [obj("cow", "red", 0.99), obj("cow", "red", 0.98)]
    check(reds, two_red, 1, 1, 1)
    check([*reds, obj("cow", "red", 0.97)], two_red, 0, 0, 0.75)
    check([obj("cow", "blue", 0.995), *reds], two_red, 0, 0, 0.75)


def test_entries_of_one_class_add_up():
    pair = entry("color_attr", [{"class": "cow", "count": 1}, {"class": "cow", "count": 1, "color": "red"}])
    check([obj("cow", "red"), obj("cow", "blue", 0.5)], pair, 1, 1, 1)
    check([obj("cow", "red")], pair, 1, 0, (0.5 + 0.5 + 1) / 3)


# ---- positions


def test_position():
    check([obj("cow", x=45), obj("dog", x=15)], LEFT, 1, 1, 1)


def test_wrong_position_gets_nothing_for_its_part():
    result = check([obj("cow", x=15), obj("dog", x=45)], LEFT, 0, 0, 2 / 3)
    assert result.reasons == ("expected dog left of cow",)


def test_position_without_target():
    check([obj("dog", x=15)], LEFT, 0, 0, 1 / 3)
    check([obj("cow", x=15)], LEFT, 0, 0, 1 / 3)


def test_every_pair_must_stand_in_the_relation():
    cows = entry("position", [{"class": "cow", "count": 2}, {"class": "dog", "count": 1, "position": ["left of", 0]}])
    check([obj("cow", x=45), obj("cow", x=55), obj("dog", x=15)], cows, 1, 1, 1)
    check([obj("cow", x=45), obj("cow", x=5), obj("dog", x=25)], cows, 0, 0, 2 / 3)


def test_position_is_asked_of_the_most_confident_objects():
    far = obj("dog", score=0.9, x=50)
    check([obj("cow", x=30), far, obj("dog", score=0.8, x=5)], LEFT, 0, 0, (1 + 0 + 0) / 3)
    check([obj("cow", x=30), far, obj("dog", score=0.95, x=5)], LEFT, 1, 0, (1 + 0 + 1) / 3)


def test_every_relation_holds_one_way_round():
    places = {"left of": (15, 32), "right of": (50, 32), "above": (32, 15), "below": (32, 50)}
    for relation in places:
        asked = entry(
            "position", [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]
        )
        for name, (x, y) in places.items():
            holds = float(name == relation)
            check([obj("cow"), obj("dog", x=x, y=y)], asked, holds, holds, (2 + holds) / 3)


def test_target_of_the_wrong_color_fails_the_position():
    red_target = entry(
        "position",
        [
            {"class": "cow", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
    )
    result = check([obj("cow", "blue", x=45), obj("dog", x=15)], red_target, 0, 0, 3 / 4)
    assert any("which is not there as asked" in reason for reason in result.reasons)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (at(-30, 0), {"left of"}),
        (at(30, 0), {"right of"}),
        (at(0, -30), {"above"}),
        (at(0, 30), {"below"}),
        (at(30, 30), {"right of", "below"}),  # (30 - 2) / 42.4 = 0.66 on both axes
        (at(-30, -30), {"left of", "above"}),
        (at(0, 0), set()),
        (at(2, 0), set()),  # within a tenth of the summed widths
        (at(3.9, 0), set()),  # (3.9 - 2) / 3.9 = 0.487
        (at(4.1, 0), {"right of"}),  # (4.1 - 2) / 4.1 = 0.512
        ((0.0009, 0.0, 0.0009, 0.0), set()),  # points less than a thousandth of a pixel apart
        ((0.0011, 0.0, 0.0011, 0.0), {"right of"}),
    ],
)
def test_relations(box, expected):
    other = at(0, 0) if box[0] < box[2] else (0.0, 0.0, 0.0, 0.0)
    assert relations(box, other) == expected


coordinate = st.floats(-100, 100, allow_nan=False).map(lambda v: round(v, 3))
boxes = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@given(boxes, boxes)
def test_relations_follow_the_formula(box, other):
    a, b = np.array(box).reshape(2, 2), np.array(other).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    shrunk = np.maximum(abs(offset) - 0.1 * ((a[1] - a[0]) + (b[1] - b[0])), 0) * np.sign(offset)
    x, y = shrunk / np.linalg.norm(offset) if abs(shrunk).max() >= 1e-3 else (0.0, 0.0)
    if min(abs(abs(x) - 0.5), abs(abs(y) - 0.5), abs(abs(shrunk).max() - 1e-3)) < 1e-9:
        return  # on a threshold rounding decides
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    assert relations(box, other) == {name for name, holds in names.items() if holds}


# ---- properties over random detections and entries

LABELS, COLORS = ("cow", "dog", "bench"), ("red", "blue", None)
detection = st.builds(
    Detection,
    st.sampled_from(LABELS),
    st.sampled_from((0.2, 0.5, 0.91, 1.0)),
    boxes,
    st.sampled_from(COLORS),
)


@st.composite
def entries(draw):
    include = []
    for index in range(draw(st.integers(1, 3))):
        part = {"class": draw(st.sampled_from(LABELS)), "count": draw(st.integers(1, 4))}
        if draw(st.booleans()):
            part["color"] = draw(st.sampled_from(("red", "blue")))
        if index and draw(st.booleans()):
            relation = draw(st.sampled_from(("left of", "right of", "above", "below")))
            part["position"] = [relation, draw(st.integers(0, index - 1))]
        include.append(part)
    exclude = draw(st.lists(st.fixed_dictionaries({"class": st.sampled_from(LABELS), "count": st.integers(1, 5)})))
    return entry(draw(st.sampled_from(("counting", "colors", "position"))), include, exclude)


@given(st.lists(detection, max_size=40), entries())
def test_scores_stay_in_range_and_agree(detections, metadata):
    result = evaluate(detections, metadata)
    assert 0 <= result.soft <= 1
    assert result.strict in (0, 1)
    assert result.accuracy in (0, 1)
    assert result.strict <= result.accuracy
    assert bool(result.reasons) == (result.strict == 0)
    distinct = len({part["class"] for part in metadata["include"]}) == len(metadata["include"])
    if distinct and result.strict:
        assert result.soft == pytest.approx(1)
    if distinct and not metadata.get("exclude") and result.soft == 1:
        assert result.strict == 1


def benchmark_verdict(detections, metadata):
    """The benchmark's accuracy for entries with counts and colours, by brute force over kept objects."""
    threshold = 0.9 if metadata["tag"] == "counting" else 0.3
    for part in metadata["include"]:
        kept = [d for d in detections if d.label == part["class"] and d.score > threshold]
        ranked = [d for _, _, d in sorted((-d.score, i, d) for i, d in enumerate(kept))][: part["count"]]
        if len(ranked) < part["count"]:
            return False
        if "color" in part and [d.color for d in ranked].count(part["color"]) < part["count"]:
            return False
    return all(
        min(16, sum(d.label == part["class"] and d.score > threshold for d in detections)) < part["count"]
        for part in metadata.get("exclude", [])
    )


@given(st.lists(detection, max_size=40), entries())
def test_accuracy_without_positions(detections, metadata):
    for part in metadata["include"]:
        part.pop("position", None)
    assert evaluate(detections, metadata).accuracy == benchmark_verdict(detections, metadata)


# ---- metadata


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "'include' is None"),
        ({"include": []}, "non-empty list"),
        ({"include": "cow"}, "non-empty list"),
        ({"include": ["cow"]}, r"include\[0\] is 'cow'"),
        ({"include": [{"count": 1}]}, "class"),
        ({"include": [{"class": "cow"}]}, "count is None"),
        ({"include": [{"class": "cow", "count": 0}]}, "at least 1"),
        ({"include": [{"class": "cow", "count": 1.5}]}, "whole number"),
        ({"include": [{"class": "cow", "count": True}]}, "whole number"),
        ({"include": [{"class": "cow", "count": 1, "colour": "red"}]}, "did you mean 'color'"),
        ({"include": [{"class": "cow", "count": 1, "color": 3}]}, "colour name"),
        ({"include": [{"class": "cow", "count": 1, "position": ["left of", 0]}]}, "earlier include entry"),
        (
            {"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["near", 0]}]},
            "near",
        ),
        (
            {"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": "above"}]},
            "relation",
        ),
        ({"include": [{"class": "a", "count": 1}], "exclude": [{"class": "b"}]}, r"exclude\[0\].count"),
        ({"include": [{"class": "a", "count": 1}], "exclude": "b"}, "'exclude' is 'b'"),
    ],
)
def test_wrong_metadata_is_refused(metadata, message):
    with pytest.raises(DataError, match=message):
        evaluate([], metadata)


@pytest.mark.parametrize(
    ("score", "box"),
    [
        (1.5, at(0, 0)),
        (math.nan, at(0, 0)),
        (0.5, (0.0, 0.0, math.nan, 1.0)),
        (0.5, (5.0, 0.0, 1.0, 1.0)),
        (0.5, (0.0, 5.0, 1.0, 1.0)),
        (0.5, (0.0, 0.0, 1.0)),
    ],
)
def test_wrong_detection_is_refused(score, box):
    with pytest.raises(RewardError, match="detection of 'cow'"):
        Detection("cow", score, box)


@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 2)])
def test_wrong_mask_is_refused(mask):
    box = (1.0, 1.0, 3.0, 4.0)
    Detection("cow", 0.5, box, mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(RewardError, match=r"detection of 'cow' has a .* mask of shape .* expected bool"):
        Detection("cow", 0.5, box, mask=mask)


def test_order_of_distinct_confidences_does_not_matter():
    objects = [obj("cow", "red", 0.5, x=10), obj("cow", "blue", 0.6, x=50), obj("dog", "red", 0.7, x=30)]
    results = {evaluate(order, LEFT) for order in itertools.permutations(objects)}
    assert len(results) == 1
