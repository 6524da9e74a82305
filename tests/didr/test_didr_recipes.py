"""The committed DIDR recipes, run by the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.didr.tiny import ADAPTER, didr, make_world, rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "train.epochs=1",
    "train.steps=3",
    "train.batch=2",
    "train.micro_batch=2",
    "train.ta_ratio=1",
    "train.ta_warmup=1",
    "train.distil=1",
    "algorithm.beta_prompts=2",
    "algorithm.beta_images=2",
    "lora.rank=2",
    "precision.dtype=fp32",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*_didr.yaml")} == {
        "sdxl_didr",
        "shapes_didr",
        "shapes_distil_didr",
        "z_image_didr",
    }


@pytest.mark.parametrize("family", ["sdxl", "z_image"])
def test_a_recipe_trains_its_family(family: str, world: Path, tmp_path: Path) -> None:
    """With the tiny pipeline in place of both models, and of the reward's a tiny one."""
    run, pipeline = tmp_path / "run", world / family
    overrides = [f"model.path={pipeline}", f"generator.path={pipeline}", "model.resolution=64"]
    overrides += [f"data.prompts={world / 'prompts.txt'}", "evaluation.images=2", "evaluation.steps=2"]
    overrides += [f"reward={{name: clipscore, options: {{model: {world / 'clip'}}}}}"]
    didr(ROOT / "recipes" / f"{family}_didr.yaml", f"run.dir={run}", *SMALL, *overrides)
    (row,) = rows(run)
    assert (row["step"], row["ta_step"]) == (2, 3) and row["nonfinite"] == 0
    assert any(tensor.abs().sum() > 0 for name, tensor in load_file(run / ADAPTER).items() if "lora_B" in name)


def test_the_shapes_recipe_scores_its_suite(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the base itself: one-step images beside the reference's, and beta is measured where none is set."""
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    few = [*SMALL, "evaluation.images=2", "generator.path=null", "algorithm.beta=null", "train.cooldown=0"]
    didr(ROOT / "recipes" / "shapes_didr.yaml", f"run.dir={run}", *few)
    summary = json.loads((run / "summary.json").read_text())
    for side in ("before", "reference", "after"):
        assert summary[side]["n"] == 14 and 0 <= summary[side]["geneval_soft"] <= 1
        assert len(list((run / "samples" / side).glob("*.png"))) == 14
    assert summary["reference"]["clean"] > summary["before"]["clean"], "eight steps draw better than one"
    entries = [json.loads(line) for line in (run / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert len(entries) == 14 and {"tag", "before", "after"} <= entries[0].keys()
    measured = json.loads((run / "beta.json").read_text())
    assert measured["images"] == 4 and measured["beta"] == pytest.approx(measured["deviation"] / 2)

    didr(ROOT / "recipes" / "shapes_didr.yaml", f"run.dir={run}", *few, "train.epochs=2", "--resume")
    assert "measuring" in capsys.readouterr().out.partition("resumed from")[0]
    assert json.loads((run / "beta.json").read_text()) == measured and len(rows(run)) == 2
