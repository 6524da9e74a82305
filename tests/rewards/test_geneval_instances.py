"""What Mask2Former says about queries, as objects: mmdetection's formulas on logits made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crd_fast.errors import RewardError
from crd_fast.rewards.geneval_detector import CLASSES, COLORS, instances

COW, DOG, CUP = (CLASSES.index(label) for label in ("cow", "dog", "cup"))
SIZE = (12, 16)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def class_logits(*queries: dict[int, float]) -> Tensor:
    """(Q, 81) of queries that give some classes a probability, and the rest of it to no object."""
    probabilities = torch.full((len(queries), 81), 1e-9)
    for row, query in zip(probabilities, queries, strict=True):
        for label, probability in query.items():
            row[label] = probability
        row[80] = max(1 - sum(query.values()), 1e-9)
    return probabilities.log()


def blocks(*rectangles: tuple[int, int, int, int], height: int = 12, width: int = 16, inside: float = 0.8) -> Tensor:
    """(Q, H, W) mask logits, sigmoid `inside` in (x0, y0, x1, y1) and 0.4 around it."""
    masks = torch.full((len(rectangles), height, width), logit(0.4))
    for mask, (x0, y0, x1, y1) in zip(masks, rectangles, strict=True):
        mask[y0:y1, x0:x1] = logit(inside)
    return masks


def test_classes_are_cocos_in_its_order() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    places = {0: "person", 9: "traffic light", 24: "backpack", 39: "bottle", 57: "couch", 58: "potted plant"}
    places |= {60: "dining table", 62: "tv", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    places |= {67: "cell phone", 73: "book", 78: "hair drier", 79: "toothbrush"}
    assert {index: CLASSES[index] for index in places} == places
    assert len(COLORS) == 10


def test_score_is_class_probability_times_certainty_of_the_mask() -> None:
    (found,) = instances(class_logits({COW: 0.9}), blocks((3, 2, 7, 5)), SIZE, SIZE)
    assert found.label == "cow" and found.color is None
    assert found.score == pytest.approx(0.9 * 0.8, rel=1e-5)
    assert found.box == (3, 2, 7, 5)  # right and bottom are exclusive
    assert found.mask is not None and found.mask.shape == (3, 4) and found.mask.all()


def test_certainty_is_the_mean_over_the_objects_own_pixels() -> None:
    masks = blocks((3, 2, 7, 5))
    masks[0, 9, 12] = logit(0.6)  # one pixel far away
    (found,) = instances(class_logits({COW: 0.9}), masks, SIZE, SIZE)
    assert found.score == pytest.approx(0.9 * (12 * 0.8 + 0.6) / 13, rel=1e-5)
    assert found.box == (3, 2, 13, 10)
    assert found.mask is not None and int(found.mask.sum()) == 13 and bool(found.mask[7, 9])


def test_an_uncertain_mask_and_an_empty_one_are_no_objects() -> None:
    uncertain = instances(class_logits({COW: 0.5}), blocks((3, 2, 7, 5), inside=0.59), SIZE, SIZE)
    assert uncertain == []  # 0.295
    certain = instances(class_logits({COW: 0.5}), blocks((3, 2, 7, 5), inside=0.61), SIZE, SIZE)
    assert [found.score for found in certain] == [pytest.approx(0.305, rel=1e-4)]
    assert instances(class_logits({COW: 0.99}), torch.full((1, *SIZE), -1.0), SIZE, SIZE) == []
    assert instances(class_logits({}), blocks((3, 2, 7, 5)), SIZE, SIZE) == []


def test_overlapping_and_equal_objects_are_all_kept() -> None:
    logits = class_logits({COW: 0.9}, {COW: 0.8}, {DOG: 0.7})
    found = instances(logits, blocks((3, 2, 9, 8), (3, 2, 9, 8), (5, 4, 12, 10)), SIZE, SIZE)
    assert [(d.label, d.box) for d in found] == [
        ("cow", (3, 2, 9, 8)),
        ("cow", (3, 2, 9, 8)),
        ("dog", (5, 4, 12, 10)),
    ]
    assert all(d.mask is not None and d.mask.all() for d in found)


def test_a_query_may_be_two_objects() -> None:
    found = instances(class_logits({COW: 0.45, CUP: 0.5}), blocks((3, 2, 7, 5)), SIZE, SIZE)
    assert [(d.label, pytest.approx(d.score, rel=1e-5)) for d in found] == [("cup", 0.4), ("cow", 0.36)]


def test_the_hundred_most_probable_pairs_are_looked_at() -> None:
    queries = [{COW: 0.40 + i / 2000, DOG: 0.45 + i / 2000} for i in range(60)]
    found = instances(class_logits(*queries), blocks(*[(3, 2, 7, 5)] * 60, inside=0.99), SIZE, SIZE)
    assert [d.label for d in found].count("dog") == 60
    assert sorted(d.score for d in found if d.label == "cow")[0] == pytest.approx(0.99 * (0.40 + 20 / 2000), rel=1e-4)
    assert len(found) == 100


def test_objects_are_found_by_the_formula_at_the_images_size() -> None:
    """By loops over all pairs: probability, enlarging in two steps, threshold, mean, outermost pixels."""
    generator = torch.Generator().manual_seed(3)
    classes = torch.randn(7, 81, generator=generator)
    classes[torch.arange(7), torch.randint(80, (7,), generator=generator)] += 6
    masks = torch.randn(7, 5, 6, generator=generator) * 3
    seen, size = (20, 24), (33, 27)
    expected = []
    for query in range(7):
        odds = [math.exp(value) for value in classes[query].tolist()]
        enlarged = F.interpolate(masks[query][None, None], size=seen, mode="bilinear", align_corners=False)
        enlarged = F.interpolate(enlarged, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
        inside = enlarged > 0
        certainty = (1 / (1 + np.exp(-enlarged[inside].astype(np.float64)))).mean()
        ys, xs = np.nonzero(inside)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        for label in range(80):
            score = odds[label] / sum(odds) * certainty
            if score > 0.3:
                expected.append((CLASSES[label], pytest.approx(score, rel=1e-5), box, int(inside.sum())))
    found = instances(classes, masks, seen, size)
    assert len(expected) >= 4
    key = lambda item: (item[0], item[2])  # noqa: E731
    got = [(d.label, d.score, d.box, int(d.mask.sum()) if d.mask is not None else 0) for d in found]
    assert sorted(got, key=key) == sorted(expected, key=key)


def test_logits_of_other_classes_are_refused() -> None:
    with pytest.raises(RewardError, match=r"class logits \(1, 134\)"):
        instances(torch.zeros(1, 134), torch.zeros(1, 4, 4), SIZE, SIZE)
