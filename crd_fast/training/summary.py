"""What a run leaves to be read: summary.json, timing.json, and which sample images are which."""

from __future__ import annotations

import json
from typing import Any

from crd_fast.data.prompts import PromptSet
from crd_fast.training.config import Recipe
from crd_fast.training.memory import peak_gigabytes
from crd_fast.training.run_directory import RunDirectory
from crd_fast.whole_files import write_json, write_text

# Images of each task that are kept as PNG, the same ones before and after.
KEPT_PER_TASK = 12


def kept_indices(count: int, images: int) -> list[int]:
    """Which of `count` evaluated images, `images` a task, are kept."""
    return [i for i in range(count) if i % images < KEPT_PER_TASK]


def summarize(directory: RunDirectory, recipe: Recipe, epochs: int, test_prompts: PromptSet | None) -> float:
    """Write the files; returns the minutes of training.

    summary.json holds nothing that differs between equal runs; wall time goes to timing.json.
    """
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    sides = {}
    for side in ("before", "guided", "after"):
        file = directory / f"evaluation_{side}.json"
        if file.exists():
            sides[side] = json.loads(file.read_text())
    train = recipe.train
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
    minutes = rows[-1]["elapsed_seconds"] / 60 if rows else 0.0
    write_json(directory / "timing.json", {"train_minutes": minutes, "peak_gigabytes": peak_gigabytes()})
    if "before" in sides and "after" in sides and test_prompts is not None:
        _write_sample_index(directory, test_prompts, recipe.evaluation.images, sides["before"], sides["after"])
    return minutes


def _write_sample_index(
    directory: RunDirectory, test_prompts: PromptSet, images: int, before: dict[str, Any], after: dict[str, Any]
) -> None:
    lines = []
    for number, index in enumerate(kept_indices(len(after["prompt_ids"]), images)):
        prompt_id = after["prompt_ids"][index]
        entry = {
            "file_name": f"{number:05d}.png",
            "prompt": test_prompts.prompts[prompt_id],
            "tag": test_prompts.metadata[prompt_id]["tag"],
            "seed": index,
            "before": before["passed"][index],
            "after": after["passed"][index],
        }
        lines.append(json.dumps(entry))
    write_text(directory / "samples" / "metadata.jsonl", "\n".join(lines) + "\n")
