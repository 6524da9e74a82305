"""Without a reward a run distils its reference into one step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from crd_fast import cli
from crd_fast.didr.recipe import dump_recipe, load_recipe
from crd_fast.lora_file import read_adapter
from tests.didr.tiny import didr, make_world, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_no_reward_is_the_distilling_part_of_a_run_with_one(world: Path, tmp_path: Path) -> None:
    distilled, begun = tmp_path / "distilled", tmp_path / "begun"
    didr(world / "sd3.yaml", f"run.dir={distilled}", "reward=null")
    didr(world / "sd3.yaml", f"run.dir={begun}", "train.distil=4")
    got, want = (read_adapter(str(run / "lora")) for run in (distilled, begun))
    assert got.keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
    assert all("reward" not in row and row["gap"] > 0 for row in rows(distilled))
    assert not (distilled / "beta.json").exists()
    summary = json.loads((distilled / "summary.json").read_text())
    assert summary["after"] == {"n": 4}
    page = (distilled / "report.html").read_text()
    assert "clipscore" not in page and "TA loss" in page


def test_the_recipe_says_so_itself(world: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((world / "sd3.yaml").read_text())
    recipe = load_recipe(world / "sd3.yaml", ["reward=null"])
    assert recipe.reward is None
    again = tmp_path / "sd3.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    del tree["reward"]
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["didr", str(tmp_path / "without.yaml"), f"run.dir={tmp_path / 'run'}"]) == 2


def test_a_sweep_needs_a_reward(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"run.dir={tmp_path / 'run'}", "reward=null", "--beta", "0.5", "1"]
    assert cli.main(["didr", str(world / "sd3.yaml"), *arguments]) == 2
    assert "reward" in capsys.readouterr().err
