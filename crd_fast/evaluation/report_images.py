"""A report's images: the same prompts and the same noise on several sides of a run, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from crd_fast.evaluation.pictures import data_uri
from crd_fast.evaluation.plots import finite, score
from crd_fast.evaluation.report_page import change
from crd_fast.evaluation.report_tasks import entry, task_key, task_name
from crd_fast.evaluation.run_files import Row, Run

SETS_PER_TASK = 6


@dataclass(frozen=True)
class Gallery:
    """How images are shown.

    sides: folders of samples/, left to right; the first two are the ones whose scores a task's title compares. title,
    note: of the section, HTML; `{shown}` in the note is how many there are of a task. in_total: sets of images at
    most. grid: CSS classes of a set. between: what stands between the marks in a caption. marks: whether an image has
    passed or not; else its score is told.
    """

    sides: tuple[str, ...]
    title: str
    note: str
    in_total: int
    grid: str
    between: str
    marks: bool = True


def images_section(run: Run, gallery: Gallery) -> str:
    """The first images that were recorded of each task."""
    title = f'<section id="images"><h2>{gallery.title}</h2>'
    if not run.samples:
        return title + '<p class="none">No samples recorded.</p></section>'
    groups: dict[str, list[Row]] = {}
    for row in run.samples:
        groups.setdefault(str(row.get("tag") or "samples"), []).append(row)
    shown = max(1, min(SETS_PER_TASK, gallery.in_total // len(groups)))
    parts = [title, f'<p class="note">{gallery.note.format(shown=shown)}</p>']
    for task in sorted(groups, key=task_key)[: gallery.in_total]:
        means = {side: entry(run.side(side), task, "strict").get("mean") for side in gallery.sides[:2]}
        compared = change(means) if None not in map(finite, means.values()) else ""
        parts.append(f'<h3>{task_name(task)} <span class="num">{compared}</span></h3><div class="pairs">')
        parts += [_set(run, row, gallery) for row in groups[task][:shown]]
        parts.append("</div>")
    return "".join(parts) + "</section>"


def _set(run: Run, row: Row, gallery: Gallery) -> str:
    """All images of one prompt and seed; the marks stand in the caption, where they hide nothing."""
    prompt = escape(str(row["prompt"]))
    shots, marks = [], []
    for side in gallery.sides:
        path = run.directory / "samples" / side / row["file_name"]
        image = f'<img src="{data_uri(path)}" alt="{side}: {prompt}">' if path.is_file() else "n/a"
        shots.append(f'<div class="shot">{image}</div>')
        value = finite(row.get(side))
        if value is not None:
            marks.append(_mark(side, value) if gallery.marks else f'<i class="{side}">{score(value)}</i>')
    seed = f' title="seed {escape(str(row["seed"]))}"' if row.get("seed") is not None else ""
    return (
        f'<figure class="pair"{seed}><div class="{gallery.grid}">{"".join(shots)}</div>'
        f"<figcaption>{gallery.between.join(marks)} {prompt}</figcaption></figure>"
    )


def _mark(side: str, value: float) -> str:
    kind, sign = ("pass", "✓") if value >= 1 - 1e-6 else ("fail", "✗")
    return f'<i class="mark {kind}" title="{side}: score {score(value)}">{sign}</i>'
