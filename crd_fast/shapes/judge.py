"""A small network that reads scenes of the shapes world, so that gradients of GenEval's strict rule reach the pixels.

It says how likely each outcome of twelve questions is: how many there are of each shape (0 to 4, or more), which colour
all of a shape have (one of four, or mixed) where there is one, and how the single ones of two shapes stand to each
other, across and down. Whether an image is right for an entry is then a product: of the totals, of the colours given
that the shape is there, of the places given that there is one of each.

`examples/shapes/train_judge.py` makes the weights; the exact detector labels what it learns from.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crd_fast.errors import CheckpointError, DataError
from crd_fast.shapes.world import COLORS, SHAPES, SIZE

WEIGHTS = "judge.safetensors"
MOST = 4  # totals above it are one outcome
LOGIT_CAP = 6.0  # logits stay in (-6, 6), which bounds every log-probability and its gradient
PAIRS = tuple(itertools.combinations(range(len(SHAPES)), 2))

# The twelve questions, each with its outcomes: totals, colours, then places across and down.
ACROSS = ("left of", "neither", "right of")
DOWN = ("above", "neither", "below")
GROUPS = (
    *[(f"{shape}s", tuple(str(n) if n <= MOST else f"over {MOST}" for n in range(MOST + 2))) for shape in SHAPES],
    *[(f"colour of {shape}s", (*COLORS, "mixed")) for shape in SHAPES],
    *[(f"{SHAPES[a]} {SHAPES[b]} across", ACROSS) for a, b in PAIRS],
    *[(f"{SHAPES[a]} {SHAPES[b]} down", DOWN) for a, b in PAIRS],
)
SIZES = tuple(len(outcomes) for _, outcomes in GROUPS)
OUTCOMES = sum(SIZES)
_FIRST = dict(zip((name for name, _ in GROUPS), itertools.accumulate(SIZES, initial=0), strict=False))
_MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# A fact: the outcomes of one question, as columns of `Judge`'s output, that an entry allows.
Fact = tuple[int, ...]


class _Block(nn.Module):
    """Two convolutions beside the identity; the second starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.BatchNorm2d(width)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.layers(x))


def _shrink(width_in: int, width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, kernel, stride=2, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """Log-probabilities (B, OUTCOMES) of images (B, 3, 64, 64) in [0, 1], in float32; the outcomes of each question
    sum to 1.

    Everything is smooth: SiLU, and in evaluation fixed statistics instead of a norm, so that a flat image has a
    gradient of ordinary size. Sums over places, weighted by what is there, count objects wherever they are; two
    channels with the coordinates keep where. Raises ValueError for anything but such images.
    """

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        near, far, maps, parts = 48, 72, 12, 24
        self.trunk = nn.Sequential(
            _shrink(3, 24, 5),
            _shrink(24, near, 3),
            _Block(near),
            _Block(near),
            _shrink(near, far, 3),
            _Block(far),
        )
        self.maps = nn.Conv2d(far + 2, maps, 1)
        self.parts = nn.Conv2d(far + 2, parts, 1)
        self.head = nn.Sequential(
            nn.BatchNorm1d(maps * parts),
            nn.Linear(maps * parts, 128),
            nn.SiLU(),
            nn.Linear(128, OUTCOMES),
        )
        places = (torch.arange(SIZE // 8, dtype=torch.float32) + 0.5) * (16 / SIZE) - 1
        self.register_buffer("places", torch.stack(torch.meshgrid(places, places, indexing="xy")), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return log_probabilities(self.read(images))

    def read(self, images: Tensor) -> Tensor:
        """What `log_probabilities` takes, (B, OUTCOMES)."""
        check_pictures(images)
        # leaves autocast, which would round what the gradient needs
        with torch.autocast(images.device.type, enabled=False):
            features = self.trunk(images.float() * 2 - 1)  # (B, C, 8, 8)
            features = torch.cat([features, self.places.expand(len(images), -1, -1, -1)], 1)
            maps = self.maps(features).sigmoid().flatten(2)  # (B, M, 64)
            parts = self.parts(features).flatten(2)  # (B, D, 64)
            return self.head((maps @ parts.mT).flatten(1))


def log_probabilities(read: Tensor) -> Tensor:
    """Log-probabilities (B, OUTCOMES) of what a judge has read: the softmax of each question's logits, capped softly.

    Two outcomes far beyond the cap look alike and have no gradient, so training keeps them near it.
    """
    logits = LOGIT_CAP * torch.tanh(read / LOGIT_CAP)
    return torch.cat([group.log_softmax(-1) for group in logits.split(SIZES, -1)], -1)


def check_pictures(images: Tensor) -> None:
    """Raises ValueError unless `images` is floating point (B, 3, 64, 64)."""
    if not images.is_floating_point() or images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}: the judge of the shapes world takes floating point "
            f"(B, 3, {SIZE}, {SIZE}) in [0, 1]"
        )


def facts(entry: Mapping[str, Any]) -> list[Fact]:
    """What GenEval's strict rule asks of an image: it holds when each of the facts does.

    The total of every class that is named, the colour of every class that has one, every place. Raises DataError for
    an entry that the judge's questions do not cover, such as one with a text.
    """
    asked: Counter[str] = Counter()
    for part in entry.get("include", ()):
        if part["class"] not in SHAPES:
            raise DataError(f"the class {part['class']!r} is not one of the judge's, {', '.join(SHAPES)}")
        asked[part["class"]] += part["count"]
    if not asked:
        raise DataError(f"no shapes are asked for (keys {sorted(entry)}): the judge reads shapes, and no texts")
    found = [_total(shape, n, entry) for shape, n in asked.items()]
    for shape in sorted({part["class"] for part in entry.get("exclude", ())} - set(asked)):
        found.append(_total(shape, None, entry))
    for part in entry["include"]:
        shape = part["class"]
        if "color" in part:
            found.append(_color(shape, part, asked[shape]))
        if "position" in part:
            found.append(_place(part, entry["include"], asked))
    return found


def _total(shape: str, count: int | None, entry: Mapping[str, Any]) -> Fact:
    """Allowed totals of a shape: the asked one, or without it all that are not excluded."""
    if shape not in SHAPES:
        raise DataError(f"the class {shape!r} is not one of the judge's, {', '.join(SHAPES)}")
    limits = [part["count"] for part in entry.get("exclude", ()) if part["class"] == shape]
    limit = min(limits, default=MOST + 1)
    if limit > MOST + 1 or (count is not None and count > MOST):
        raise DataError(f"{shape}: {max(limit - 1, count or 0)} of them are asked for, the judge counts to {MOST}")
    if count is not None and count >= limit:
        raise DataError(f"{shape}: {count} are asked for and {limit} are excluded, which no image can show")
    first = _FIRST[f"{shape}s"]
    return (first + count,) if count is not None else tuple(range(first, first + limit))


def _color(shape: str, part: Mapping[str, Any], total: int) -> Fact:
    if part["color"] not in COLORS:
        raise DataError(f"the colour {part['color']!r} is not one of the judge's, {', '.join(COLORS)}")
    if part["count"] != total:
        raise DataError(f"{part['count']} of {total} {shape}s have a colour: the judge knows the colour of all of them")
    return (_FIRST[f"colour of {shape}s"] + list(COLORS).index(part["color"]),)


def _place(part: Mapping[str, Any], include: Sequence[Mapping[str, Any]], asked: Mapping[str, int]) -> Fact:
    relation, target = part["position"]
    shape, other = part["class"], include[target]["class"]
    if shape == other or asked[shape] != 1 or asked[other] != 1:
        raise DataError(
            f"{asked[shape]} {shape} {relation} {asked[other]} {other}: the judge knows how one shape stands to one "
            "of another kind"
        )
    if SHAPES.index(shape) > SHAPES.index(other):
        shape, other, relation = other, shape, _MIRRORED[relation]
    name, outcomes = ("across", ACROSS) if relation in ACROSS else ("down", DOWN)
    return (_FIRST[f"{shape} {other} {name}"] + outcomes.index(relation),)


def fact_scores(log_probs: Tensor, asked: Sequence[Sequence[Fact]]) -> tuple[Tensor, Tensor]:
    """Mean over an image's facts of their log-probabilities, and log-probability that all hold; both (B,).

    log_probs (B, OUTCOMES) of `Judge`; asked: the facts of each image. The second is the sum of what the first is the
    mean of: colours and places are conditional on the totals, and facts about different shapes count as independent.
    """
    counts = torch.tensor([len(own) for own in asked])
    allowed = torch.zeros(int(counts.sum()), OUTCOMES, dtype=torch.bool)
    for row, fact in enumerate(fact for own in asked for fact in own):
        allowed[row, list(fact)] = True
    owners = torch.arange(len(asked)).repeat_interleave(counts).to(log_probs.device)
    each = log_probs[owners].masked_fill(~allowed.to(log_probs.device), -torch.inf).logsumexp(-1)  # (facts,)
    joint = log_probs.new_zeros(len(asked)).index_add(0, owners, each)
    return joint / counts.to(log_probs), joint


def load_judge(folder: str | Path) -> Judge:
    """The judge with the weights in `folder`, on the CPU, frozen and in evaluation mode.

    Raises CheckpointError for weights that are missing, unreadable or of another network.
    """
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise CheckpointError(
            f"the judge of the shapes world {str(file)!r} is missing: give the folder models/shapes-judge of this "
            "repository, or make it with examples/shapes/train_judge.py"
        )
    judge = Judge()
    try:
        judge.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"the judge of the shapes world {str(file)!r} cannot be loaded ({error}): make it again with "
            "examples/shapes/train_judge.py"
        ) from error
    return judge.eval().requires_grad_(False)
