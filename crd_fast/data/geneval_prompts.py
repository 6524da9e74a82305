"""Training prompts in the manner of GenEval, none of which asks for the same image as a prompt that is held out.

    python -m crd_fast.data.geneval_prompts --count 1700 --exclude evaluation_metadata.jsonl \\
        --out recipes/prompts/geneval_train.jsonl

--exclude names the benchmark's own prompts (Ghosh et al., arXiv 2310.11513), or any file in their format. Prompts are
worded as the benchmark words them, plurals such as "knifes" included. Tasks stand in the proportions of `RATIO`, as in
Flow-GRPO (arXiv 2505.05470); the prompts of a task repeat only after all of them have come. The same seed and the same
held-out prompts give the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crd_fast.data.prompts import load_prompts
from crd_fast.errors import CrdFastError, DataError
from crd_fast.rewards.base import Metadata
from crd_fast.rewards.geneval import RELATIONS
from crd_fast.rewards.geneval_detector import CLASSES, COLORS

RATIO = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
COUNTS = {2: "two", 3: "three", 4: "four"}
COLORED = tuple(label for label in CLASSES if label != "person")  # the benchmark asks for no person of a colour
_MIRRORED = {"right of": "left of", "below": "above"}


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(label: str) -> str:
    return f"{label}es" if label.endswith("s") else f"{label}s"


def meaning(entry: Metadata) -> tuple[Any, ...]:
    """What an entry asks for, equal for entries that ask for the same image.

    The order in which things are named does not matter, and "a left of b" is "b right of a".
    """
    things = [(part["class"], part["count"], part.get("color", "")) for part in entry["include"]]
    places = []
    for thing, part in zip(things, entry["include"], strict=True):
        if "position" in part:
            relation, target = part["position"]
            mirrored = _MIRRORED.get(relation)
            places.append((mirrored, things[target], thing) if mirrored else (relation, thing, things[target]))
    return tuple(sorted(things)), tuple(sorted(places))


@dataclass(frozen=True)
class _Task:
    """All prompts of a task, by number: `choices` sizes, and an entry without its tag from one choice of each."""

    choices: tuple[int, ...]
    entry: Callable[..., dict[str, Any]]

    @property
    def size(self) -> int:
        return int(np.prod(self.choices))

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.entry(*(int(choice) for choice in np.unravel_index(number, self.choices)))


def _other(first: int, second: int) -> int:
    """The choice of a second one out of n, other than the first, from a number below n - 1."""
    return second + (second >= first)


def _position(first: int, second: int, relation: int) -> dict[str, Any]:
    a, b, where = CLASSES[first], CLASSES[_other(first, second)], RELATIONS[relation]
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [where, 0]}]
    return {"include": include, "prompt": f"a photo of {article(a)} {where} {article(b)}"}


def _counting(label: int, number: int) -> dict[str, Any]:
    a, count = CLASSES[label], list(COUNTS)[number]
    return {
        "include": [{"class": a, "count": count}],
        "exclude": [{"class": a, "count": count + 1}],
        "prompt": f"a photo of {COUNTS[count]} {plural(a)}",
    }


def _color_attr(first: int, second: int, first_color: int, second_color: int) -> dict[str, Any]:
    a, b = COLORED[first], COLORED[_other(first, second)]
    x, y = COLORS[first_color], COLORS[_other(first_color, second_color)]
    include = [{"class": a, "count": 1, "color": x}, {"class": b, "count": 1, "color": y}]
    return {"include": include, "prompt": f"a photo of {article(x)} {a} and {article(y)} {b}"}


def _colors(label: int, color: int) -> dict[str, Any]:
    a, x = COLORED[label], COLORS[color]
    return {"include": [{"class": a, "count": 1, "color": x}], "prompt": f"a photo of {article(x)} {a}"}


def _two_object(first: int, second: int) -> dict[str, Any]:
    a, b = CLASSES[first], CLASSES[_other(first, second)]
    include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    return {"include": include, "prompt": f"a photo of {article(a)} and {article(b)}"}


_TASKS = {
    "position": _Task((len(CLASSES), len(CLASSES) - 1, len(RELATIONS)), _position),
    "counting": _Task((len(CLASSES), len(COUNTS)), _counting),
    "color_attr": _Task((len(COLORED), len(COLORED) - 1, len(COLORS), len(COLORS) - 1), _color_attr),
    "colors": _Task((len(COLORED), len(COLORS)), _colors),
    "two_object": _Task((len(CLASSES), len(CLASSES) - 1), _two_object),
}


def shares(count: int) -> dict[str, int]:
    """How many of `count` prompts each task has: the nearest whole numbers to `RATIO` that sum to it."""
    total = sum(RATIO.values())
    numbers = {task: count * part // total for task, part in RATIO.items()}
    by_remainder = sorted(RATIO, key=lambda task: -(count * RATIO[task] % total))
    for task in by_remainder[: count - sum(numbers.values())]:
        numbers[task] += 1
    return numbers


def geneval_prompts(count: int, seed: int = 0, exclude: Iterable[Metadata] = ()) -> list[dict[str, Any]]:
    """`count` entries {tag, include, exclude?, prompt} in random order; none means what one of `exclude` does.

    Raises DataError for a count below 1, a seed below 0, and when `exclude` leaves nothing of a task.
    """
    if count < 1:
        raise DataError(f"{count} prompts: expected at least 1")
    if seed < 0:
        raise DataError(f"seed is {seed}: expected 0 or more")
    held_out = {meaning(entry) for entry in exclude}
    rng = np.random.default_rng(seed)
    entries: list[dict[str, Any]] = []
    for task, number in shares(count).items():
        entries += _draw(task, number, held_out, rng)
    return [entries[i] for i in rng.permutation(len(entries))]


def _draw(task: str, number: int, held_out: set[tuple[Any, ...]], rng: np.random.Generator) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    while len(drawn) < number:
        before = len(drawn)
        for index in rng.permutation(_TASKS[task].size):
            entry = _TASKS[task][index]
            if meaning(entry) not in held_out:
                drawn.append({"tag": task, **entry})
                if len(drawn) == number:
                    break
        if len(drawn) == before:
            raise DataError(f"every prompt of the task {task!r} is held out: exclude fewer")
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exclude", type=Path, help="a .jsonl of prompts that are held out, such as the benchmark's")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        _write(given)
    except (CrdFastError, OSError) as error:
        print(f"geneval_prompts: {error}", file=sys.stderr)
        return 2
    return 0


def _write(given: argparse.Namespace) -> None:
    held_out: tuple[Metadata, ...] = ()
    if given.exclude is None:
        print("no --exclude: prompts that the benchmark tests may be among these", file=sys.stderr)
    else:
        excluded = load_prompts(given.exclude)
        excluded.require(["include"])
        held_out = excluded.metadata
    entries = geneval_prompts(given.count, given.seed, held_out)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
