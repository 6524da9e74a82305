"""`crd-fast eval --run` of a real run on the shapes pipeline: the run's own numbers, its checkpoints, the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from crd_fast import cli
from crd_fast.evaluation.pictures import read_image

ROOT = Path(__file__).parents[2]
SMALL = "epochs=2 groups=2 group_size=2 micro_batch=4 updates=1 checkpoint_every=1 warmup=0 cooldown=0".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short epochs, then eval of the base, the checkpoints and the final LoRA."""
    run = tmp_path_factory.mktemp("runs") / "shapes"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(ROOT)
    overrides = [f"train.{word}" for word in SMALL]
    overrides += ["evaluation.images=12", "evaluation.steps=2", "evaluation.reference_guidance=null"]
    assert cli.main(["train", "recipes/shapes.yaml", f"run.dir={run}", "run.device=cpu", *overrides]) == 0
    assert cli.main(["eval", "--run", str(run), "--suite", "shapes", "--checkpoints", "all", "--device", "cpu"]) == 0
    monkeypatch.undo()
    return run


def summary(run: Path, label: str) -> dict:
    return json.loads((run / "eval-shapes" / label / "summary.json").read_text())


@pytest.mark.parametrize(("side", "label"), [("before", "base"), ("after", "final")])
def test_it_repeats_the_runs_own_numbers(run: Path, side: str, label: str) -> None:
    expected = json.loads((run / f"evaluation_{side}.json").read_text())
    found = summary(run, label)
    assert found["summary"] == expected["summary"]
    assert found["summary"]["frechet"] > 0 and found["summary"]["n"] == 84
    strict = found["columns"]["geneval/strict"]
    assert strict["macro"]["mean"] == expected["summary"]["geneval_strict"]
    rows = [json.loads(row) for row in (run / "eval-shapes" / label / "results.jsonl").read_text().splitlines()]
    passed = [row["scores"].get("geneval/strict", row["scores"].get("ocr/ocr_exact")) for row in rows]
    assert passed == expected["passed"] and [row["prompt_id"] for row in rows] == expected["prompt_ids"]


def test_training_changed_the_images(run: Path) -> None:
    base, final = (
        (run / "eval-shapes" / label / "00000" / "samples" / "00000.png").read_bytes() for label in ("base", "final")
    )
    assert base != final
    assert summary(run, "final")["checkpoint"]["lora"] != summary(run, "epoch-000001")["checkpoint"]["lora"]


def test_checkpoints_are_listed_once(run: Path) -> None:
    together = json.loads((run / "eval-shapes" / "summary.json").read_text())["candidates"]
    assert {label: entry["epoch"] for label, entry in together.items()} == {
        "base": 0,
        "epoch-000001": 1,
        "final": 2,
    }


def test_trained_columns_are_marked(run: Path) -> None:
    table = (run / "eval-shapes" / "table.md").read_text()
    assert table.startswith("| model | strict † | soft † | OCR | Fréchet ↓ | clean |")
    assert "† Trained on this reward" in table
    assert [line.split(" |")[0] for line in table.splitlines()[2:5]] == ["| base", "| epoch-000001", "| final"]


class _Page(HTMLParser):
    """Checks that elements close where they opened, and collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_the_plot_and_the_images(run: Path) -> None:
    page = _Page()
    page.feed((run / "eval-shapes" / "report.html").read_text())
    assert page.open == [] and page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "Trained reward against held-out metrics" in page.text
    assert "Fréchet (held out): " in page.text and "strict (trained): " in page.text
    assert read_image(run / "eval-shapes" / "checkpoints.png").std() > 0.05, "a plot, not an empty sheet"


def test_the_lora_by_itself_gives_the_same_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["eval", "--suite", "shapes", "--model", "models/shapes-sd3", "--lora", str(run), "--out", str(tmp_path)]
    words += ["--images-per-task", "12", "--steps", "2", "--device", "cpu", "--dtype", "fp32"]
    assert cli.main(words) == 0
    own = json.loads((tmp_path / "summary.json").read_text())
    assert own["summary"] == summary(run, "final")["summary"]
    assert own["trained_on"] == ["geneval"], "known from the config.yaml above the LoRA"


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--run", str(tmp_path), "--suite", "shapes"]) == 2
    assert "is no run directory (no config.yaml)" in capsys.readouterr().err
