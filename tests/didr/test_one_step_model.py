"""`models/shapes-one-step`, the committed start of recipes/shapes_didr.yaml, and the script that makes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crd_fast.backbones.base import Backbone
from crd_fast.data.prompts import PromptSet, load_prompts
from crd_fast.didr.recipe import load_recipe
from crd_fast.evaluation import shapes_suite
from crd_fast.evaluation.pictures import as_stored
from crd_fast.rollout import initial_noise
from crd_fast.training.models import load_backbone, load_generator

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "shapes-one-step"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distil", ROOT / "examples" / "shapes" / "distil.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distil"] = module
    spec.loader.exec_module(module)
    return module


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 6e6


@torch.no_grad()
def test_it_draws_in_one_step_what_the_base_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("recipes/shapes_didr.yaml")
    base = load_backbone(recipe.model, "fp32", torch.device("cpu"))
    everything = load_prompts(recipe.data.test_prompts)
    shapes = [i for i, entry in enumerate(everything.metadata) if entry["tag"] != "text"]
    test = PromptSet(
        tuple(everything.prompts[i] for i in shapes), tuple(everything.metadata[i] for i in shapes), everything.name
    )
    chosen = shapes_suite.choose_prompts(test, 40)
    start = initial_noise(base, torch.arange(len(chosen)), 3)
    prompts = base.encode_prompts([test.prompts[i] for i in chosen])
    distilled = load_generator(str(recipe.generator.path), base, recipe.model, "fp32")

    def strict(model: Backbone) -> float:
        images = []
        for rows in torch.arange(len(chosen)).split(60):
            latents = start[rows] - model.velocity(start[rows], torch.ones(len(rows)), prompts[rows])
            images.append(as_stored(base.decode(latents)))
        return float(shapes_suite.score(torch.cat(images), test, images=40, seed=0).summary["geneval_strict"])

    assert strict(base) < 0.1
    assert strict(distilled) > 0.25


def test_the_script_makes_one(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out, run = tmp_path / "model", tmp_path / "run"
    short = ["train.epochs=1", "train.steps=1", "train.ta_warmup=0", "train.batch=4", "train.micro_batch=4"]
    arguments = ["--out", str(out), "--run-dir", str(run), *short, "evaluation.images=2"]
    assert script.main(arguments) == 0
    recipe = load_recipe("recipes/shapes_distil_didr.yaml")
    base = load_backbone(recipe.model, "fp32", torch.device("cpu"))
    made = load_generator(str(out), base, recipe.model, "fp32").transformer.state_dict()
    assert any(not torch.equal(tensor, made[name]) for name, tensor in base.transformer.state_dict().items())
    assert (run / "report.html").exists()
    assert script.main(arguments) == 2, "what is there is not overwritten"
