"""The rules of the GenEval benchmark, applied to detections from any detector.

Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", arXiv 2310.11513.
The engine knows no class or colour names: it compares the labels of detections with those of the metadata.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from crd_fast.errors import ConfigError, DataError, RewardError, nearest
from crd_fast.rewards.base import Metadata

THRESHOLD = 0.3  # a detection counts above this confidence,
COUNTING_THRESHOLD = 0.9  # or above this one in the counting task, where doubtful boxes would be counted
MAX_OBJECTS = 16  # the most confident detections kept per class
POSITION_MARGIN = 0.1  # offsets shrink by this share of the two boxes' summed extent
POSITION_COMPONENT = 0.5  # a relation holds when its component of the unit offset exceeds this
MIN_OFFSET = 1e-3  # pixels; boxes whose shrunk offset is below it on both axes stand in no relation
RELATIONS = ("left of", "right of", "above", "below")
SCORES = ("accuracy", "strict", "soft", "strict+soft")


@dataclass(frozen=True)
class Detection:
    """A found object: class label, confidence in [0, 1], box (x0, y0, x1, y1) in pixels, colour if known.

    mask: its pixels, bool (y1 - y0, x1 - x0), if known; such a box lies on whole pixels.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None
    mask: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise RewardError(f"detection of {self.label!r} has score {self.score}: expected a number in [0, 1]")
        if len(self.box) != 4 or not all(map(math.isfinite, self.box)):
            raise RewardError(f"detection of {self.label!r} has box {self.box}: expected four finite pixel positions")
        if self.box[2] < self.box[0] or self.box[3] < self.box[1]:
            raise RewardError(
                f"detection of {self.label!r} has box {self.box}: expected (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1"
            )
        if self.mask is not None:
            x0, y0, x1, y1 = self.box
            if self.mask.dtype != torch.bool or tuple(self.mask.shape) != (y1 - y0, x1 - x0):
                raise RewardError(
                    f"detection of {self.label!r} has a {self.mask.dtype} mask of shape {tuple(self.mask.shape)}: "
                    f"expected bool of the size of its box {self.box}"
                )


@dataclass(frozen=True)
class GenEvalScore:
    """Scores of one image in [0, 1]; `reasons` says what keeps `strict` from being 1."""

    accuracy: float
    strict: float
    soft: float
    reasons: tuple[str, ...]


def check_metadata(metadata: Metadata) -> None:
    """Raises DataError unless `metadata` holds a scorable GenEval entry.

    include: non-empty list of {class, count, color?, position?: [relation, index of an earlier include
    entry]}; exclude, optional: list of {class, count}.
    """
    include = metadata.get("include")
    if not isinstance(include, Sequence) or isinstance(include, str) or not include:
        raise DataError(
            f"'include' is {include!r}: expected a non-empty list of {{class, count, color?, position?}}, "
            "or no GenEval reward for this prompt"
        )
    for index, part in enumerate(include):
        _check_part(part, f"include[{index}]", {"class", "count", "color", "position"})
        if "color" in part and not isinstance(part["color"], str):
            raise DataError(f"include[{index}].color is {part['color']!r}: expected a colour name")
        if "position" in part:
            _check_position(part["position"], index)
    exclude = metadata.get("exclude", [])
    if not isinstance(exclude, Sequence) or isinstance(exclude, str):
        raise DataError(f"'exclude' is {exclude!r}: expected a list of {{class, count}}")
    for index, part in enumerate(exclude):
        _check_part(part, f"exclude[{index}]", {"class", "count"})


def _check_part(part: Any, where: str, allowed: set[str]) -> None:
    if not isinstance(part, Mapping):
        raise DataError(f"{where} is {part!r}: expected an object with {sorted(allowed)}")
    for key in part:
        if key not in allowed:
            raise DataError(f"{where} has the unknown key {key!r}{nearest(str(key), allowed)}")
    if not isinstance(part.get("class"), str):
        raise DataError(f"{where}.class is {part.get('class')!r}: expected a class name")
    count = part.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise DataError(f"{where}.count is {count!r}: expected a whole number of at least 1")


def _check_position(position: Any, index: int) -> None:
    if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
        raise DataError(f"include[{index}].position is {position!r}: expected [relation, index of an include entry]")
    relation, target = position
    if relation not in RELATIONS:
        raise DataError(f"include[{index}].position is {position!r}: the relation must be one of {RELATIONS}")
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        raise DataError(
            f"include[{index}].position is {position!r}: the second value must be the index of an earlier include entry"
        )


@dataclass(frozen=True)
class Vocabulary:
    """What a detector can find: names of classes, and of their colours."""

    classes: tuple[str, ...]
    colors: tuple[str, ...]

    def check(self, metadata: Metadata) -> None:
        """Raises DataError for a GenEval entry that asks for what is never found, and would score 0 whatever it shows.

        An entry of `exclude` that is never found would never count.
        """
        for kind in ("include", "exclude"):
            for index, part in enumerate(metadata.get(kind, [])):
                for key, known in (("class", self.classes), ("color", self.colors)):
                    if key in part and part[key] not in known:
                        raise DataError(
                            f"{kind}[{index}].{key} is {part[key]!r}, which the detector does not know"
                            f"{nearest(part[key], known)}"
                        )


def relations(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> frozenset[str]:
    """The relations of `box` to `other`, (x0, y0, x1, y1) in pixels with y downwards; none when too close.

    Per axis the offset d of the centres shrinks by a tenth of the summed extents; the relation holds when the
    shrunk offset divided by the length of the whole offset exceeds 0.5.
    """
    dx = (box[0] + box[2] - other[0] - other[2]) / 2
    dy = (box[1] + box[3] - other[1] - other[3]) / 2
    margin_x = POSITION_MARGIN * (box[2] - box[0] + other[2] - other[0])
    margin_y = POSITION_MARGIN * (box[3] - box[1] + other[3] - other[1])
    shrunk_x, shrunk_y = max(abs(dx) - margin_x, 0.0), max(abs(dy) - margin_y, 0.0)
    if max(shrunk_x, shrunk_y) < MIN_OFFSET:
        return frozenset()
    length = math.hypot(dx, dy)
    along_x, along_y = math.copysign(shrunk_x, dx) / length, math.copysign(shrunk_y, dy) / length
    held = (
        along_x < -POSITION_COMPONENT,
        along_x > POSITION_COMPONENT,
        along_y < -POSITION_COMPONENT,
        along_y > POSITION_COMPONENT,
    )
    return frozenset(name for name, holds in zip(RELATIONS, held, strict=True) if holds)


def evaluate(detections: Sequence[Detection], metadata: Metadata) -> GenEvalScore:
    """Scores one image's detections against one GenEval entry.

    Of every class the 16 most confident detections above the threshold (0.3; 0.9 when metadata["tag"] is
    "counting") are kept, equal confidences in the order given.

    - accuracy, the benchmark's rule: each include entry needs at least `count` objects; its `count` most
      confident ones must all have its colour, and each must stand in the asked relation to each object that
      satisfied the target entry. An exclude entry fails when at least `count` objects are found.
    - strict: accuracy, and exactly the asked number of every included class; the counts of entries of one
      class add up.
    - soft: mean over what is asked, clipped to [0, 1]: 1 - |n - found| / n for each count, the share of the n
      asked objects that have the colour, 1 or 0 for a relation. Exclude entries do not enter.

    Raises DataError for metadata that is not a GenEval entry.
    """
    check_metadata(metadata)
    found = _confident(detections, metadata)
    include = metadata["include"]
    asked: Counter[str] = Counter()
    for part in include:
        asked[part["class"]] += part["count"]

    reasons: list[str] = []
    parts: list[float] = []
    groups = [found.get(part["class"], [])[: part["count"]] for part in include]
    satisfied: list[bool] = []
    missing: set[str] = set()
    for part, group in zip(include, groups, strict=True):
        label, n, color = part["class"], part["count"], part.get("color")
        objects = found.get(label, [])
        total = asked[label]
        parts.append(min(max(1 - abs(total - len(objects)) / total, 0.0), 1.0))
        matches = len(group) == n
        if not matches:
            missing.add(label)
            reasons.append(f"expected {label}>={n}, found {len(group)}")
        if color is not None:
            parts.append(min(sum(d.color == color for d in objects), n) / n)
            if matches and any(d.color != color for d in group):
                matches = False
                reasons.append(f"expected {n} {color} {label}, found {', '.join(str(d.color) for d in group)}")
        if "position" in part:
            relation, target = part["position"]
            holds = _all_stand(relation, group, groups[target])
            parts.append(float(holds))
            if matches and not (satisfied[target] and holds):
                matches = False
                reasons.append(
                    f"expected {label} {relation} {include[target]['class']}"
                    + ("" if satisfied[target] else ", which is not there as asked")
                )
        satisfied.append(matches)

    excluded = [p for p in metadata.get("exclude", []) if len(found.get(p["class"], [])) >= p["count"]]
    reasons += [f"expected {p['class']}<{p['count']}, found {len(found[p['class']])}" for p in excluded]
    accurate = all(satisfied) and not excluded
    miscounted = {label for label, n in asked.items() if len(found.get(label, [])) != n}
    reasons += [f"expected {label}={asked[label]}, found {len(found[label])}" for label in sorted(miscounted - missing)]
    strict = accurate and not miscounted
    return GenEvalScore(float(accurate), float(strict), sum(parts) / len(parts), tuple(reasons))


def asks_color(detections: Sequence[Detection], metadata: Metadata) -> list[int]:
    """Indices of the detections whose colour `evaluate` looks at: the kept ones of classes with a colour asked."""
    classes = {part["class"] for part in metadata["include"] if "color" in part}
    return sorted(index for index in _kept(detections, metadata) if detections[index].label in classes)


def _kept(detections: Sequence[Detection], metadata: Metadata) -> list[int]:
    """Indices of the detections that count, the most confident first, equal ones in the order given."""
    threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    kept: list[int] = []
    of_class: Counter[str] = Counter()
    for index in sorted(range(len(detections)), key=lambda i: -detections[i].score):
        label = detections[index].label
        if detections[index].score > threshold and of_class[label] < MAX_OBJECTS:
            of_class[label] += 1
            kept.append(index)
    return kept


def _confident(detections: Sequence[Detection], metadata: Metadata) -> dict[str, list[Detection]]:
    found: dict[str, list[Detection]] = {}
    for index in _kept(detections, metadata):
        found.setdefault(detections[index].label, []).append(detections[index])
    return found


def _all_stand(relation: str, objects: Sequence[Detection], targets: Sequence[Detection]) -> bool:
    """Whether there are objects and targets, and each object stands in `relation` to each target."""
    pairs = [(a, b) for a in objects for b in targets]
    return bool(pairs) and all(relation in relations(a.box, b.box) for a, b in pairs)


class GenEvalReward:
    """GenEval as a reward: `detector` maps images (B, 3, H, W) in [0, 1] to B lists of detections.

    `colors` names the colours of N found objects, given the images and N pairs of an image's index and a detection.
    It is asked about the objects whose colour counts, and not needed where the detector itself sees colours.
    `score` chooses what is trained on: "soft" is dense but keeps paying part for a wrong image, "strict" is
    the target but is often 0 for a whole group, "strict+soft" is the mean of the two, "accuracy" is the
    benchmark's rule. `vocabulary` is what the detector can find; None takes any names.
    """

    differentiable = False

    def __init__(
        self,
        detector: Callable[[Tensor], Sequence[Sequence[Detection]]],
        score: str = "soft",
        name: str = "geneval",
        colors: Callable[[Tensor, Sequence[tuple[int, Detection]]], Sequence[str]] | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        if score not in SCORES:
            raise ConfigError(f"GenEval score is {score!r}{nearest(score, SCORES)}")
        if name in SCORES:
            raise ConfigError(f"reward name {name!r} is also the name of one of its diagnostics: choose another")
        self.detector, self.colors, self.vocabulary = detector, colors, vocabulary
        self.score = score
        self.name = name
        self.requires: frozenset[str] = frozenset({"include"})
        self.range: tuple[float, float] | None = (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """float32 (B,) CPU tensors: the chosen score under `name`, and accuracy, strict and soft.

        Raises RewardError for an item without "include" or with names that the detector does not know, and when the
        detector does not return one list an image or `colors` not one name an object.
        """
        for index, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True)):
            if "include" not in entry:
                raise RewardError(
                    f"reward {self.name!r}: item {index}, prompt {prompt!r}, has metadata keys "
                    f"{sorted(entry)}: expected 'include'; use a GenEval prompt set"
                )
            try:
                self.check_prompt(prompt, entry)
            except DataError as error:
                raise RewardError(f"reward {self.name!r}: item {index}, prompt {prompt!r}: {error}") from error
        found = self.detector(images)
        if len(found) != len(metadata):
            raise RewardError(
                f"reward {self.name!r}: the detector returned {len(found)} lists for {len(metadata)} images"
            )
        if self.colors is not None:
            found = self._with_colors(self.colors, images, found, metadata)
        results = [evaluate(boxes, entry) for boxes, entry in zip(found, metadata, strict=True)]
        scores = {
            key: torch.tensor([getattr(result, key) for result in results], dtype=torch.float32, device="cpu")
            for key in ("accuracy", "strict", "soft")
        }
        chosen = (scores["strict"] + scores["soft"]) / 2 if self.score == "strict+soft" else scores[self.score]
        return {self.name: chosen.clone()} | scores

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Raises DataError for names that the detector does not know."""
        if self.vocabulary is not None:
            self.vocabulary.check(metadata)

    def _with_colors(
        self,
        name_colors: Callable[[Tensor, Sequence[tuple[int, Detection]]], Sequence[str]],
        images: Tensor,
        found: Sequence[Sequence[Detection]],
        metadata: Sequence[Metadata],
    ) -> list[list[Detection]]:
        colored = [list(boxes) for boxes in found]
        asked = [(i, j) for i, entry in enumerate(metadata) for j in asks_color(colored[i], entry)]
        if asked:
            names = name_colors(images, [(i, colored[i][j]) for i, j in asked])
            if len(names) != len(asked):
                raise RewardError(f"reward {self.name!r}: {len(names)} colours were named for {len(asked)} objects")
            for (i, j), color in zip(asked, names, strict=True):
                colored[i][j] = replace(colored[i][j], color=color)
        return colored


@dataclass(frozen=True)
class BenchmarkSummary:
    """The benchmark's numbers, all in [0, 1].

    tasks: share of correct images of each task, in the order of the entries; overall: their mean, the number that
    papers quote; images: share of correct images; prompts: share of prompts with at least one correct image.
    """

    tasks: dict[str, float]
    overall: float
    images: float
    prompts: float
    image_count: int
    prompt_count: int


def summarize(entries: Sequence[Metadata], accuracy: Sequence[Sequence[float]]) -> BenchmarkSummary:
    """The benchmark's summary: `accuracy[i]` has a 0 or 1 for each image of `entries[i]`, as `evaluate` gives.

    Every entry has a "tag", its task; equal entries are one prompt. Raises DataError for an entry without a tag or
    without images, and for anything but 0 and 1.
    """
    if not entries or len(entries) != len(accuracy):
        raise DataError(f"{len(accuracy)} lists of results for {len(entries)} entries: expected one for each")
    by_task: dict[str, list[float]] = {}
    by_prompt: dict[str, list[float]] = {}
    for index, (entry, values) in enumerate(zip(entries, accuracy, strict=True)):
        tag = entry.get("tag")
        if not isinstance(tag, str):
            raise DataError(f"entry {index} has tag {tag!r}: expected the name of its task")
        if not values or any(value not in (0, 1) for value in values):
            raise DataError(f"entry {index} has results {list(values)}: expected a 0 or 1 for each of its images")
        by_task.setdefault(tag, []).extend(values)
        by_prompt.setdefault(json.dumps(entry, sort_keys=True), []).extend(values)
    tasks = {tag: sum(values) / len(values) for tag, values in by_task.items()}
    count = sum(map(len, by_task.values()))
    return BenchmarkSummary(
        tasks=tasks,
        overall=sum(tasks.values()) / len(tasks),
        images=sum(map(sum, by_task.values())) / count,
        prompts=sum(map(any, by_prompt.values())) / len(by_prompt),
        image_count=count,
        prompt_count=len(by_prompt),
    )
