"""Write the shapes world's prompt files, GenEval jsonl, to a folder.

    python examples/shapes/write_prompts.py recipes/prompts

Training sets repeat the prompts of small tasks, so that an epoch draws every task about as often.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from crd_fast.shapes import world

FILES = {
    "shapes_train.jsonl": ("train", world.GENEVAL_TASKS),
    "shapes_ocr_train.jsonl": ("train", ("text",)),
    "shapes_test.jsonl": ("test", world.TASKS),
}


def lines(split: str, tasks: tuple[str, ...]) -> str:
    by_task = {task: world.prompts(split, [task]) for task in tasks}
    most = max(map(len, by_task.values()))
    repeats = {task: round(most / len(entries)) if split == "train" else 1 for task, entries in by_task.items()}
    entries = [entry for task in tasks for entry in by_task[task] * repeats[task]]
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/shapes/write_prompts.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (split, tasks) in FILES.items():
        (folder / name).write_text(lines(split, tasks))


if __name__ == "__main__":
    main()
