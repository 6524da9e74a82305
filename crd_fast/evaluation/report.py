"""`report.html` of a run directory: one self-contained page with the result, images, tables and curves."""

from __future__ import annotations

from html import escape
from pathlib import Path

from crd_fast.evaluation.plots import finite, interval_bars, number, score
from crd_fast.evaluation.report_curves import training_curves
from crd_fast.evaluation.report_images import SETS_PER_TASK, Gallery, images_section
from crd_fast.evaluation.report_page import (
    PAGE,
    about_run,
    big,
    change,
    config_section,
    environment_footer,
    header,
    last_epoch,
    note_of,
    on_images,
    speed_tiles,
    tiles_section,
    time_and_place,
    time_section,
    unfinished_banner,
    write_document,
)
from crd_fast.evaluation.report_tasks import OCR_TASK, entry, macro, tasks_section
from crd_fast.evaluation.run_files import Run, read_run

PAIRS_PER_TASK = SETS_PER_TASK
SIDES = ("before", "after")
PAIRS = Gallery(
    sides=SIDES,
    title="Before and after",
    note='Each pair is one prompt and one seed: <b class="before">before</b> training on the left, '
    '<b class="after">after</b> on the right. The first {shown} recorded per task, not picked. '
    "✓ satisfies its prompt, ✗ does not; before → after.",
    in_total=48,  # with pictures.EMBED_BYTES this keeps a page under 3 MB
    grid="duo",
    between=" → ",
)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files the trainer left there, finished or not.

    Reads config.yaml, metrics.jsonl, summary.json, environment.json, samples/metadata.jsonl and the images
    beside it; each may be missing. The page is complete in itself and depends on these files only, so a
    second call writes the same bytes. It is written aside and renamed: a reader never sees half a page.

    Returns:
        Path of the page.

    Raises:
        DataError: no such directory, or a file that is not what it should be; names the file and the line.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    sections = [
        header(f"crd-fast run · {run.name}", _headline(run), about_run(run), unfinished_banner(run)),
        _tiles(run),
        images_section(run, PAIRS),
        tasks_section(run, SIDES),
        training_curves(run),
        time_section(run),
        config_section(run),
        environment_footer(run),
    ]
    return write_document(run_dir / PAGE, f"{run.name} · crd-fast run", sections)


def _headline(run: Run) -> str:
    """The result in one sentence."""
    time, where = time_and_place(run)
    if not run.finished:
        return f"Unfinished{_reward_so_far(run)} after {last_epoch(run)}{where}"
    after = run.side("after")
    for key, label, n in (
        ("geneval_strict", "Strict score", macro(after, "strict")["n"]),
        ("ocr", "OCR score", entry(after, OCR_TASK, "soft").get("n")),
        ("geneval_soft", "Soft score", macro(after, "soft")["n"]),
    ):
        values = {side: run.side(side).get(key) for side in SIDES}
        if None not in map(finite, values.values()):
            return f"{label} {change(values)}{on_images(n)}{time}{where}"
    return f"Trained{time}{where}; no score was evaluated before and after"


def _reward_so_far(run: Run) -> str:
    """`: geneval reward .634 → .881`, the first reward in the first and last epoch; empty without rewards."""
    for name in run.epochs[0].get("reward") or {} if run.epochs else {}:
        first, last = ((run.epochs[i].get("reward") or {}).get(name) for i in (0, -1))
        return f": {escape(name)} reward {number(first)} → {number(last)}"
    return ""


def _tiles(run: Run) -> str:
    before, after = run.side("before"), run.side("after")
    start, end = finite(before.get("geneval_strict")), finite(after.get("geneval_strict"))

    def note(key: str, text: str) -> str:
        return note_of(run, key, SIDES, text)

    def compared(label: str, key: str, text: str) -> tuple[str, str, str]:
        return label, change({side: run.side(side).get(key) for side in SIDES}), note(key, text)

    lead = (
        f"<span>Strict score, mean of tasks</span>{change(dict(zip(SIDES, (start, end), strict=True)))}"
        f"{interval_bars(macro(before, 'strict'), macro(after, 'strict'))}"
        f"<small>{note('geneval_strict', '0 to 1; bars are 95% intervals')}</small>"
    )
    reduction = None if start is None or end is None or start >= 1 else 1 - (1 - end) / (1 - start)
    error = f"{score(1 - start)} → {score(1 - end)}" if start is not None and end is not None else ""
    frechet = [finite(side.get("frechet")) for side in (before, after)]
    ratio = frechet[1] / frechet[0] if frechet[0] and frechet[1] is not None else None
    tiles = [
        ("Strict error reduction", big(reduction, "{:.0%}"), error or note("geneval_strict", "")),
        *_guided_tile(run),
        compared("Soft score", "geneval_soft", "partial credit, mean of tasks"),
        compared("OCR score", "ocr", "quoted text, read back"),
        (
            "Fréchet ratio",
            big(ratio, "{:.2f}×"),
            note("frechet", f"{number(frechet[0])} → {number(frechet[1])}, lower is better"),
        ),
        compared("Cleanliness", "clean", "image explained by valid objects"),
        *speed_tiles(run),
    ]
    return tiles_section(lead, tiles)


def _guided_tile(run: Run) -> list[tuple[str, str, str]]:
    """What guidance alone makes of the base: the yardstick that training is measured against."""
    guided = finite(run.side("guided").get("geneval_strict"))
    return [] if guided is None else [("Base with guidance", big(guided, "{:.2f}"), "strict score, untrained")]
