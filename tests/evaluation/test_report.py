"""The run report: every section, honest gaps, escaped text, nothing from outside the page."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crd_fast.errors import DataError
from crd_fast.evaluation.report import PAIRS_PER_TASK, write_report
from tests.evaluation.report_text import visible_text

TASKS = {"counting": (0.38, 0.81), "position": (0.17, 0.74), "color_attr": (0.41, 0.86)}


def _side(index: int) -> dict[str, Any]:
    tasks = {
        task: {
            "strict": {"mean": means[index], "low": means[index] - 0.1, "high": means[index] + 0.1, "n": 60},
            "soft": {"mean": means[index] + 0.05, "low": means[index], "high": means[index] + 0.1, "n": 60},
        }
        for task, means in TASKS.items()
    }
    return {
        "geneval_strict": (0.52, 0.87)[index],
        "geneval_soft": (0.71, 0.92)[index],
        "ocr": (0.61, 0.84)[index],
        "frechet": (0.02, 0.023)[index],
        "clean": (0.91, 0.95)[index],
        "tasks": tasks,
        "geneval_strict_interval": [(0.48, 0.83)[index], (0.56, 0.91)[index]],
        "n": 420,
    }


def _epoch(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 2 * epoch,
        "loss": 0.02,
        "policy_loss": 0.015,
        "kl_loss": 0.005,
        "kl": 0.001 * epoch,
        "reward": {"geneval": 0.5 + 0.01 * epoch},
        "reward_std": {"geneval": 0.3},
        "reward_diagnostics": {"geneval/strict": 0.4 + 0.01 * epoch},
        "implicit_reward_std": 0.2,
        "old_decay": 0.02 * epoch,
        "sampling_decay": 0.01 * epoch,
        "grad_norm": 0.7,
        "lr": 5e-4,
        "seconds": {"rollout": 3.0, "train": 6.0, "reward": 1.0},
        "samples_per_second": 30.0 + epoch,
        "elapsed_seconds": 10.0 * epoch,
        "skipped_steps": 0,
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    rng = np.random.default_rng(0)
    rows = []
    for side in ("before", "after"):
        (run / "samples" / side).mkdir(parents=True)
    for i in range(24):
        task = list(TASKS)[i % 3]
        row = {"file_name": f"{i:05d}.png", "prompt": f"prompt {i} of {task}", "tag": task, "seed": 100 + i}
        rows.append({**row, "before": 0.0, "after": 1.0})
        for side in ("before", "after"):
            pixels = rng.integers(0, 40, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(run / "samples" / side / row["file_name"])
    rows[0]["prompt"] = 'a sign that says "<script>alert(1)</script>" & more'
    _write_lines(run / "samples" / "metadata.jsonl", rows)
    _write_lines(run / "metrics.jsonl", [_epoch(e) for e in range(1, 11)])
    summary = {"before": _side(0), "after": _side(1), "minutes": 6.13, "samples": 13056, "seed": 3}
    summary |= {"model": "models/shapes-sd3", "name": "shapes-geneval"}
    (run / "summary.json").write_text(json.dumps(summary))
    environment = {"versions": {"torch": "2.6.0", "diffusers": "0.42.1"}, "device": "cpu", "threads": 2}
    environment |= {"commit": "a1b2c3d", "command": "crd-fast train recipes/shapes.yaml"}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "config.yaml").write_text("algorithm:\n  kl_weight: 0.05  # <fixed>\n")
    return run


def _edit_summary(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    edit(summary)
    (run / "summary.json").write_text(json.dumps(summary))


def _render(run: Path) -> tuple[str, str]:
    """The page and its visible text."""
    page = write_report(run).read_text(encoding="utf-8")
    return page, visible_text(page)


def test_the_page_is_the_run_directorys_and_has_every_section(run_dir: Path) -> None:
    assert write_report(run_dir) == run_dir / "report.html"
    page, text = _render(run_dir)
    ids = re.findall(r'<(?:section|footer) id="(\w+)"', page)
    assert ids == ["result", "images", "tasks", "curves", "time", "recipe", "environment"]
    for card in (
        "Reward: geneval",
        "Implicit reward",
        "KL to the reference",
        "Snapshot decay",
        "Loss",
        "Gradient norm",
    ):
        assert card in text
    assert page.count('<svg class="chart"') == 8
    assert not (run_dir / "report.html.tmp").exists()


def test_the_headline_says_the_result_in_one_sentence(run_dir: Path) -> None:
    _, text = _render(run_dir)
    sentence = "Strict score .52 → .87 on 180 held-out images in 6.1 minutes on 2 CPU threads"
    assert sentence in text
    assert "Model models/shapes-sd3 · seed 3" in text


def test_the_tiles_show_the_numbers(run_dir: Path) -> None:
    _, text = _render(run_dir)
    for tile in (
        "Strict error reduction 73% .48 → .13",
        "Soft score .71 → .92",
        "OCR score .61 → .84",
        "Fréchet ratio 1.15× .0200 → .0230, lower is better",
        "Cleanliness .91 → .95",
        "Samples per second 36 median epoch, 13,056 samples",
        "Minutes 6.1 10 epochs",
    ):
        assert tile in text


def test_the_task_table_has_means_intervals_and_changes_in_order(run_dir: Path) -> None:
    page, text = _render(run_dir)
    assert "Counting 60 .38 [.28, .48] .81 [.71, .91] +.43" in text
    assert "Colour attribution 60 .41 [.31, .51] .86 [.76, .96] +.45" in text
    assert "Mean of tasks 180 .52 [.48, .56] .87 [.83, .91] +.35" in text
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    assert re.findall(r"<tr[^>]*><td>([^<]+)", table) == [
        "Counting",
        "Position",
        "Colour attribution",
        "Mean of tasks",
    ]


def test_signs_stand_below_the_mean_they_are_not_part_of(run_dir: Path) -> None:
    def read_signs(summary: dict[str, Any]) -> None:
        for side in ("before", "after"):
            entry = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 40}
            summary[side]["tasks"]["text"] = {"strict": entry, "soft": entry}

    _edit_summary(run_dir, read_signs)
    _, text = _render(run_dir)
    assert "on 180 held-out images" in text
    assert 0 < text.index("Mean of tasks 180") < text.index("Text on a sign 40 .50 [.40, .60]")


def test_a_run_on_signs_alone_is_about_reading(run_dir: Path) -> None:
    def only_signs(summary: dict[str, Any]) -> None:
        for side, mean in (("before", 0.61), ("after", 0.84)):
            entry = {"mean": mean, "low": 0.4, "high": 0.9, "n": 40}
            summary[side] = {"n": 40, "ocr": mean, "tasks": {"text": {"strict": entry, "soft": entry}}}

    _edit_summary(run_dir, only_signs)
    _, text = _render(run_dir)
    assert "OCR score .61 → .84 on 40 held-out images in 6.1 minutes" in text
    assert "Text on a sign 40 .61" in text and "Mean of tasks 40" not in text


def test_a_falling_score_has_a_minus(run_dir: Path) -> None:
    def worse(summary: dict[str, Any]) -> None:
        summary["after"]["tasks"]["counting"]["strict"]["mean"] = 0.3
        summary["after"]["geneval_strict"] = 0.4

    _edit_summary(run_dir, worse)
    _, text = _render(run_dir)
    assert "−.08" in text and "Strict error reduction -25%" in text


def test_pairs_are_grouped_by_task_and_marked(run_dir: Path) -> None:
    page, _ = _render(run_dir)
    assert page.count('<figure class="pair"') == len(TASKS) * PAIRS_PER_TASK
    assert page.count('class="mark fail"') == page.count('class="mark pass"') == len(TASKS) * PAIRS_PER_TASK
    order = [page.index(f"<h3>{name}") for name in ("Counting", "Position", "Colour attribution")]
    assert order == sorted(order)
    first, second = page.index("prompt 3 of counting"), page.index("prompt 6 of counting")
    assert order[0] < first < second < order[1]


def test_images_are_the_files_in_the_page(run_dir: Path) -> None:
    page, _ = _render(run_dir)
    sources = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(sources[0]) == (run_dir / "samples" / "before" / "00000.png").read_bytes()
    assert base64.b64decode(sources[1]) == (run_dir / "samples" / "after" / "00000.png").read_bytes()


def test_large_images_become_previews_and_the_page_stays_small(run_dir: Path) -> None:
    rng = np.random.default_rng(1)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(buffer, format="PNG")
    for path in run_dir.glob("samples/*/*.png"):
        path.write_bytes(buffer.getvalue())
    page, _ = _render(run_dir)
    assert len(page) < 3_000_000
    source = re.search(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    assert source is not None
    assert Image.open(io.BytesIO(base64.b64decode(source[1]))).size == (160, 160)


def test_text_is_escaped(run_dir: Path) -> None:
    page, text = _render(run_dir)
    assert "<script" not in page.lower()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot; &amp; more" in page
    assert 'a sign that says "<script>alert(1)</script>" & more' in text
    assert "kl_weight: 0.05 # <fixed>" in text


def test_nothing_is_loaded_from_outside(run_dir: Path) -> None:
    page, _ = _render(run_dir)
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|href=", page)
    assert set(re.findall(r'src="([^:]+):', page)) == {"data"}


def test_the_footer_names_the_environment(run_dir: Path) -> None:
    _, text = _render(run_dir)
    for part in ("crd-fast train recipes/shapes.yaml", "a1b2c3d", "diffusers 0.42.1, torch 2.6.0"):
        assert part in text


def test_the_time_is_split_by_phase(run_dir: Path) -> None:
    _, text = _render(run_dir)
    assert "train 60% 60.0 s rollout 30% 30.0 s reward 10% 10.0 s" in text


def test_missing_metrics_are_not_available_with_their_reason(run_dir: Path) -> None:
    def drop(summary: dict[str, Any]) -> None:
        for side in ("before", "after"):
            summary[side]["ocr"] = None
            summary[side]["reasons"] = {"ocr": "rapidocr is <not> installed"}
            del summary[side]["clean"]
        summary["after"]["frechet"] = None
        summary["after"]["reasons"]["frechet"] = "40 images, 65 needed"
        del summary["after"]["tasks"]["position"]

    _edit_summary(run_dir, drop)
    _, text = _render(run_dir)
    assert "OCR score n/a → n/a rapidocr is <not> installed" in text
    assert "Cleanliness n/a → n/a not evaluated" in text
    assert "Fréchet ratio n/a after: 40 images, 65 needed" in text
    assert "Position 60 .17 [.07, .27] n/a n/a" in text


def test_a_metric_that_is_not_finite_is_not_shown_as_a_number(run_dir: Path) -> None:
    _edit_summary(run_dir, lambda summary: summary["after"].update(geneval_strict=float("nan")))
    page, text = _render(run_dir)
    assert "OCR score .61 → .84 in 6.1 minutes" in text
    assert "Strict error reduction n/a" in text
    assert not re.search(r"\bnan\b", text)


def test_a_base_without_errors_has_no_error_reduction(run_dir: Path) -> None:
    _edit_summary(run_dir, lambda summary: summary["before"].update(geneval_strict=1.0))
    assert "Strict error reduction n/a" in _render(run_dir)[1]


@pytest.mark.parametrize("lacking", ["summary", "after"])
def test_an_unfinished_run_says_so(run_dir: Path, lacking: str) -> None:
    if lacking == "summary":
        (run_dir / "summary.json").unlink()
    else:
        _edit_summary(run_dir, lambda summary: summary.pop("after"))
    for image in (run_dir / "samples" / "after").iterdir():
        image.unlink()
    page, text = _render(run_dir)
    assert "Unfinished: geneval reward .510 → .600 after epoch 10 on 2 CPU threads" in text
    assert "Unfinished run." in text
    assert page.count("<img") == len(TASKS) * PAIRS_PER_TASK
    assert "Strict error reduction n/a" in text
    assert ("Strict score, mean of tasks .52 → n/a" in text) == (lacking == "after")


def test_an_empty_run_directory_has_a_report(tmp_path: Path) -> None:
    page, text = _render(tmp_path)
    assert "Unfinished after the start, before a first epoch" in text
    for line in (
        "No samples recorded.",
        "No task was evaluated.",
        "No epoch recorded yet.",
        "No time recorded.",
        "No config.yaml recorded.",
        "No environment.json recorded.",
    ):
        assert line in text
    assert "<img" not in page


def test_gaps_and_changes_in_metrics_are_drawn(run_dir: Path) -> None:
    rows = [_epoch(e) for e in range(1, 6)]
    rows[2]["kl"] = float("nan")
    rows[3].pop("implicit_reward_std")
    rows[4] |= {"lr": 1e-4, "skipped_steps": 2, "reward": None}
    _write_lines(run_dir / "metrics.jsonl", rows)
    page, text = _render(run_dir)
    assert page.count('<svg class="chart"') == 10
    assert "Learning rate" in text and "Skipped steps" in text


def test_a_separator_inside_a_prompt_is_not_a_new_line(run_dir: Path) -> None:
    row = {"file_name": "00000.png", "prompt": "two\u2028lines", "tag": "text"}
    path = run_dir / "samples" / "metadata.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "two\u2028lines" in _render(run_dir)[0]


def test_a_second_report_is_the_same_bytes(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"epoch": 3, "loss"', r"metrics\.jsonl, line 3: not JSON"),
        ("[1, 2]", r"metrics\.jsonl, line 3: expected a JSON object, found list"),
        ('{"step": 3}', r"metrics\.jsonl, line 3: no 'epoch'"),
        ('{"epoch": "three"}', r"metrics\.jsonl, line 3: epoch is 'three', expected a number"),
        ('{"epoch": 3, "reward": 0.5}', r"metrics\.jsonl, line 3: reward is 0\.5, expected an object"),
    ],
)
def test_a_corrupt_metrics_line_is_named(run_dir: Path, line: str, message: str) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_other_corrupt_files_are_named(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: not JSON"):
        write_report(run_dir)
    (run_dir / "summary.json").unlink()
    (run_dir / "samples" / "before" / "00000.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"00000\.png is not a PNG file"):
        write_report(run_dir)
    (run_dir / "samples" / "metadata.jsonl").write_text('{"file_name": "../../secret.png", "prompt": "x"}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: file_name is '../../secret\.png'"):
        write_report(run_dir)
    with pytest.raises(DataError, match="is not a directory"):
        write_report(run_dir / "nowhere")
