"""What a run leaves to be read: summary.json, timing.json, and which sample images are which."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from crd_fast.data.prompts import PromptSet
from crd_fast.evaluation.run_files import read_object
from crd_fast.training.config import Recipe
from crd_fast.training.memory import peak_gigabytes
from crd_fast.training.run_directory import RunDirectory
from crd_fast.whole_files import write_json, write_text

# Images of each task that are kept as PNG, the same ones before and after.
KEPT_PER_TASK = 12
# Of a run's evaluations: the model before, the base with guidance, or in many steps, and the model after.
SIDES = ("before", "guided", "reference", "after")


def kept_indices(count: int, images: int) -> list[int]:
    """Which of `count` evaluated images, `images` a task, are kept."""
    return [i for i in range(count) if i % images < KEPT_PER_TASK]


def summarize(directory: RunDirectory, recipe: Recipe, epochs: int, test_prompts: PromptSet | None) -> float:
    """Write the files; returns the minutes of training.

    summary.json holds nothing that differs between equal runs; wall time goes to timing.json.
    """
    train, sides = recipe.train, read_sides(directory)
    summary = {
        "name": recipe.name,
        "seed": recipe.run.seed,
        "model": recipe.model.path,
        "minutes": train.max_minutes,
        "epochs": epochs,
        "samples": epochs * train.groups * train.group_size,
        **{side: kept["summary"] for side, kept in sides.items()},
    }
    write_json(directory / "summary.json", summary)
    if "before" in sides and "after" in sides and test_prompts is not None:
        kept = kept_indices(len(sides["after"]["prompt_ids"]), recipe.evaluation.images)
        write_sample_index(directory, test_prompts, kept, {side: sides[side] for side in ("before", "after")})
    return write_timing(directory)


def read_sides(directory: RunDirectory) -> dict[str, Any]:
    """The run's evaluations by side, in the order in which they are told. Raises DataError for a damaged file."""
    files = {side: directory / f"evaluation_{side}.json" for side in SIDES}
    return {side: read_object(file) for side, file in files.items() if file.exists()}


def write_timing(directory: RunDirectory) -> float:
    """Write timing.json; returns the minutes of training."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    minutes = rows[-1]["elapsed_seconds"] / 60 if rows else 0.0
    write_json(directory / "timing.json", {"train_minutes": minutes, "peak_gigabytes": peak_gigabytes()})
    return minutes


def write_sample_index(
    directory: RunDirectory, prompts: PromptSet, kept: Sequence[int], sides: Mapping[str, Mapping[str, Any]]
) -> None:
    """samples/metadata.jsonl: a row for each image that was kept, which are the same ones on all sides.

    sides: evaluations of the same prompts by the name of their folder in samples/; at least one.
    """
    prompt_ids = next(iter(sides.values()))["prompt_ids"]
    lines = []
    for number, index in enumerate(kept):
        prompt_id = prompt_ids[index]
        tag = prompts.metadata[prompt_id].get("tag")
        entry = {
            "file_name": f"{number:05d}.png",
            "prompt": prompts.prompts[prompt_id],
            **({} if tag is None else {"tag": tag}),
            "seed": index,
            **{side: evaluated["passed"][index] for side, evaluated in sides.items()},
        }
        lines.append(json.dumps(entry))
    write_text(directory / "samples" / "metadata.jsonl", "\n".join(lines) + "\n")
