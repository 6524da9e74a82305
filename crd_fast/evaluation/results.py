"""From raw scores to numbers: macro and micro means with intervals, and columns that fail as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crd_fast.data.prompts import PromptSet
from crd_fast.evaluation.intervals import Interval, clustered_bootstrap, macro_interval
from crd_fast.evaluation.plots import finite
from crd_fast.evaluation.scoring import Scores
from crd_fast.evaluation.shapes_suite import Evaluated
from crd_fast.evaluation.suites import Item

Row = dict[str, Any]


def column_name(reward: str, key: str) -> str:
    """A reward's score stands under its name, its diagnostics under `<reward>/<key>`."""
    return reward if key == reward else f"{reward}/{key}"


def reward_of(column: str) -> str:
    """The reward that a column comes from."""
    return column.partition("/")[0]


def columns(prompts: PromptSet, items: Sequence[Item], scores: Mapping[str, Scores]) -> dict[str, Row]:
    """Every column's numbers: `macro`, the mean over tasks where prompts have a tag, `micro`, the mean over images,
    and `tasks`, each an interval; n images.

    A column with an image that has no score has no numbers either, and `reason` says why: a mean over the rest would
    look better than the model is.
    """
    made: dict[str, Row] = {}
    for reward, scored in scores.items():
        if scored.reason is not None:
            made[reward] = _empty(scored.reason)
        for key in sorted(scored.values, key=lambda key: (key != reward, key)):
            made[column_name(reward, key)] = _column(prompts, items, scored.values[key], scored.failures)
    return made


def _empty(reason: str) -> Row:
    return {"macro": None, "micro": None, "tasks": {}, "n": 0, "reason": reason}


def _column(
    prompts: PromptSet, items: Sequence[Item], values: Sequence[float | None], failures: Mapping[int, str]
) -> Row:
    missing = [index for index, value in enumerate(values) if finite(value) is None]
    if missing:
        first = missing[0]
        why = failures.get(first, "not a finite number")
        return _empty(
            f"{len(missing)} of {len(values)} images have no score, the first {items[first].file_name}: {why}"
        )
    numbers = [float(value) for value in values if value is not None]
    tags = [prompts.metadata[item.prompt].get("tag") for item in items]
    tasks: dict[str, tuple[list[float], list[int]]] = {}
    for item, tag, value in zip(items, tags, numbers, strict=True):
        if tag is not None:
            group = tasks.setdefault(str(tag), ([], []))
            group[0].append(value)
            group[1].append(item.prompt)
    tagged = None not in tags
    return {
        "macro": macro_interval(tasks).as_dict() if tagged else None,
        "micro": clustered_bootstrap(numbers, [item.prompt for item in items]).as_dict(),
        "tasks": {task: clustered_bootstrap(*group).as_dict() for task, group in sorted(tasks.items())},
        "n": len(numbers),
        "reason": None,
    }


def shapes_columns(result: Evaluated) -> dict[str, Row]:
    """The shapes suite's own summary in the form of `columns`; Fréchet distance and cleanliness have no interval."""
    side = result.summary
    reasons = side.get("reasons") or {}
    made: dict[str, Row] = {}
    for kind in ("strict", "soft"):
        tasks = {task: entry[kind] for task, entry in side["tasks"].items() if task != "text"}
        if tasks:
            low, high = side[f"geneval_{kind}_interval"]
            n = sum(entry["n"] for entry in tasks.values())
            macro = Interval(side[f"geneval_{kind}"], low, high, n).as_dict()
            values = [row[kind] for row in result.scores if kind in row]
            ids = [prompt for prompt, row in zip(result.prompt_ids, result.scores, strict=True) if kind in row]
            micro = clustered_bootstrap(values, ids).as_dict()
            made[f"geneval/{kind}"] = {"macro": macro, "micro": micro, "tasks": tasks, "n": n, "reason": None}
    if "ocr" in side:
        text = side["tasks"].get("text", {}).get("soft")
        made["ocr"] = (
            {"macro": None, "micro": text, "tasks": {"text": text}, "n": text["n"], "reason": None}
            if text
            else _empty(str(reasons.get("ocr")))
        )
    for key in ("frechet", "clean"):
        if side.get(key) is not None:
            n = sum("clean" in row for row in result.scores)
            mean = {"mean": side[key], "low": None, "high": None, "n": n}
            made[key] = {"macro": None, "micro": mean, "tasks": {}, "n": n, "reason": None}
        elif key in side:
            made[key] = _empty(str(reasons.get(key)))
    return made


def result_rows(
    prompts: PromptSet, items: Sequence[Item], scores: Sequence[Mapping[str, float | None]], failures: Sequence[Row]
) -> list[Row]:
    """One row an image, with its raw scores by column; None where it has none."""
    failed: dict[str, Row] = {}
    for failure in failures:
        failed.setdefault(str(failure["file_name"]), {})[failure["reward"]] = failure["reason"]
    rows = []
    for item, values in zip(items, scores, strict=True):
        row: Row = {"file_name": item.file_name, "prompt_id": item.prompt, "k": item.k}
        row |= {"prompt": prompts.prompts[item.prompt], "tag": prompts.metadata[item.prompt].get("tag")}
        rows.append(row | {"scores": dict(values), "failures": failed.get(item.file_name, {})})
    return rows


def value_of(column: Row | None) -> Row | None:
    """The number that stands for a column: its macro mean where there is one, else the mean over images."""
    return None if column is None else column["macro"] or column["micro"]
