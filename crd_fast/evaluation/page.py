"""The files that people read of an evaluation: `table.md`, and `report.html`, one self-contained page."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from crd_fast.evaluation.checkpoints_plot import changes, write_plot
from crd_fast.evaluation.pictures import data_uri
from crd_fast.evaluation.plots import STYLE, finite, score
from crd_fast.evaluation.results import Row
from crd_fast.evaluation.settings import Evaluation
from crd_fast.evaluation.tables import TRAINED_MARK, as_html, as_markdown, column_order, scores_table, tasks_table
from crd_fast.whole_files import write_json, write_text

PROMPTS_PER_TASK = 4
PROMPTS_IN_TOTAL = 24
MODELS_IN_GRID = 6
_GRID_STYLE = """
.wall {
  display: grid; gap: 16px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, max(150px, var(--across) * 92px)), 1fr));
}
.wall .row { display: grid; grid-template-columns: repeat(var(--across), 1fr); gap: 3px; }
.wall .shot { border-radius: 4px; overflow: hidden; }
.plot img { max-width: 100%; background: #fff; border-radius: 8px; }
ul.plain { padding-left: 18px; margin: 8px 0; }
"""


def write_page(evaluation: Evaluation, summaries: Sequence[Row], page: Path) -> None:
    """Write table.md, checkpoints.png where there are several states of a run, summary.json over several candidates,
    and the page. summaries: of the candidates, in their order.
    """
    suite, out = evaluation.suite, page.parent
    out.mkdir(parents=True, exist_ok=True)
    tables = [table for table in (scores_table(suite, summaries), tasks_table(suite, summaries)) if table is not None]
    write_text(out / "table.md", "\n\n".join(as_markdown(table).rstrip() for table in tables) + "\n")
    if len(summaries) > 1:
        together = {"suite": suite.name, "candidates": {summary["label"]: summary for summary in summaries}}
        write_json(out / "summary.json", together)
    plot = out / "checkpoints.png"
    drawn = write_plot(plot, suite, summaries, evaluation.run)
    body = [
        f'<header><p class="eyebrow">crd-fast eval · {escape(suite.title)}</p>'
        f"<h1>{escape(_headline(evaluation, summaries))}</h1>"
        f'<p class="meta">{escape(_settings(evaluation))}</p></header>',
        '<section id="scores"><h2>Scores</h2>' + as_html(tables[0]) + "</section>",
        *(f'<section id="tasks"><h2>By task</h2>{as_html(table)}</section>' for table in tables[1:]),
        _hacking(evaluation, summaries, plot if drawn else None),
        _images(evaluation, summaries),
        _failures(summaries),
        _versions(summaries),
    ]
    title = escape(f"{suite.name} · crd-fast eval")
    content = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>\n<style>{STYLE}{_GRID_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(filter(None, body))}\n</main></body></html>\n"
    )
    write_text(page, content)


def _headline(evaluation: Evaluation, summaries: Sequence[Row]) -> str:
    table = scores_table(evaluation.suite, summaries)
    values = [f"{label} {cells[0][0]}" for label, cells in table.rows[: len(summaries)]]
    shown = values if len(values) <= 3 else [values[0], "…", values[-1]]
    return f"{table.headers[1].rstrip(f' {TRAINED_MARK}')}: {', '.join(shown)}"


def _settings(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    guidance = "no guidance" if settings.guidance_scale is None else f"guidance {settings.guidance_scale:g}"
    size = f"{settings.resolution} pixels" if settings.resolution else "the model's own size"
    model = f"{settings.model} with {settings.transformer}" if settings.transformer else settings.model
    steps = f"{settings.steps} steps · {guidance}"
    if settings.start_share is not None:
        steps = "one step" if settings.start_share == 1 else f"one step from {settings.start_share:g}"
    return f"{model} · {steps} · {size} · {settings.dtype} · seed {settings.seed}"


def _hacking(evaluation: Evaluation, summaries: Sequence[Row], plot: Path | None) -> str:
    if plot is None:
        return ""
    encoded = base64.b64encode(plot.read_bytes()).decode("ascii")
    lines = "".join(f"<li>{escape(line)}</li>" for line in changes(evaluation.suite, summaries))
    return (
        '<section id="hacking"><h2>Trained reward against held-out metrics</h2><p class="note">Where the trained '
        "reward rises while what was not trained on gets worse, the model learns the scorer and not the task.</p>"
        '<div class="plot"><img alt="trained reward against held-out metrics" '
        f'src="data:image/png;base64,{encoded}"></div>'
        f'<ul class="plain">{lines}</ul></section>'
    )


def _images(evaluation: Evaluation, summaries: Sequence[Row]) -> str:
    candidates = list(evaluation.candidates)
    if len(candidates) > MODELS_IN_GRID:  # the first, the last, and evenly between
        last = len(candidates) - 1
        candidates = [candidates[round(i * last / (MODELS_IN_GRID - 1))] for i in range(MODELS_IN_GRID)]
    names = column_order(evaluation.suite, summaries)
    scores = {c.label: _scores(c.folder / "results.jsonl", names) for c in candidates}
    groups: dict[str, list[str]] = {}
    for file in next(iter(scores.values())):
        prompt = int(file.split("/")[0])
        tag = str(evaluation.prompts.metadata[prompt].get("tag") or "")
        members = groups.setdefault(tag, [])
        # one candidate shows several images of a prompt, several candidates show the first
        if len(candidates) == 1 or all(other.split("/")[0] != file.split("/")[0] for other in members):
            members.append(file)
    each = max(1, min(PROMPTS_PER_TASK if len(groups) > 1 else PROMPTS_IN_TOTAL, PROMPTS_IN_TOTAL // len(groups)))
    labels = ", ".join(candidate.label for candidate in candidates)
    across = len(candidates)
    parts = [
        f'<section id="images"><h2>Images</h2><p class="note">From left to right: {escape(labels)}; the first of each '
        "kind, not picked. Numbers: the first column of the table that there is for an image.</p>"
    ]
    for tag, files in groups.items():
        parts.append(
            (f"<h3>{escape(tag.replace('_', ' '))}</h3>" if tag else "")
            + f'<div class="wall" style="--across:{across}">'
        )
        for file in files[:each]:
            text = evaluation.prompts.prompts[int(file.split("/")[0])]
            shots = "".join(
                f'<div class="shot"><img src="{data_uri(c.folder / file)}" alt="{escape(c.label)}"></div>'
                for c in candidates
            )
            values = " → ".join(score(scores[c.label].get(file)) for c in candidates)
            parts.append(
                f'<figure class="pair"><div class="row">{shots}</div>'
                f'<figcaption>{escape(text)} <span class="num">{values}</span></figcaption></figure>'
            )
        parts.append("</div>")
    return "".join(parts) + "</section>"


def _scores(file: Path, columns: Sequence[str]) -> dict[str, float | None]:
    """Image file -> its score in the first of the columns that it has one in."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    found = {}
    for row in rows:
        numbers = (finite(row["scores"].get(column)) for column in columns)
        found[row["file_name"]] = next((number for number in numbers if number is not None), None)
    return found


def _failures(summaries: Sequence[Row]) -> str:
    lines = [
        f"<li>{escape(summary['label'])}: {escape(failure['reward'])} at {escape(failure['file_name'])}: "
        f"{escape(failure['reason'])}</li>"
        for summary in summaries
        for failure in summary["failures"][:10]
    ]
    if not lines:
        return ""
    count = sum(len(summary["failures"]) for summary in summaries)
    return f'<section id="failures"><h2>{count} failures</h2><ul class="plain">{"".join(lines)}</ul></section>'


def _versions(summaries: Sequence[Row]) -> str:
    rows = [
        (f"{summary['label']}, adapter", summary["checkpoint"]["lora"] or "none") for summary in summaries
    ]  # fmt: skip
    rows.append(("Model", summaries[0]["checkpoint"]["model"]))
    for name, version in summaries[0]["versions"].items():
        packages = ", ".join(f"{package} {number}" for package, number in version["packages"].items())
        rows.append((name, f"{packages}; options {json.dumps(version['options'])}"))
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows)
    return f'<footer id="versions"><dl>{items}</dl></footer>'
