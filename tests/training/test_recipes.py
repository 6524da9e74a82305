"""Every recipe of a real family, run by the command itself on a tiny pipeline of the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from crd_fast import cli
from tests.pipelines import NAMES, family

ROOT = Path(__file__).parents[2]
# recipe -> family of its model, and overrides that its tiny pipeline needs
RECIPES: dict[str, tuple[str, list[str]]] = {
    "flux1": ("flux1", ["model.max_sequence_length=12"]),
    "flux2": ("flux2", ["model.max_sequence_length=12"]),
    "qwen_image": ("qwen_image", ["model.max_sequence_length=24"]),
    "sd35m_geneval": ("sd3", ["model.max_sequence_length=1"]),
    "sd35m_ocr": ("sd3", ["model.max_sequence_length=1"]),
    "sdxl": ("sdxl", []),
    "wan": ("wan", ["model.max_sequence_length=12", "model.frames=5"]),
    "z_image": ("z_image", []),
}
SMALL = [
    "model.resolution=64",
    "rewards={jpeg_compressibility: {weight: 1}}",  # an OCR engine sees nothing in random images
    "rollout.steps=2",
    "lora.rank=2",
    "train.epochs=1",
    "train.groups=2",
    "train.group_size=2",
    "train.micro_batch=2",
    "train.updates=2",
    "train.timesteps=1",
    "precision.dtype=fp32",
    "acceleration.compile=false",
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: family(name).save(tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first prompts of the recipes' own file: encoding all of them takes long."""
    path = tmp_path_factory.mktemp("prompts") / "few.txt"
    lines = (ROOT / "recipes" / "prompts" / "ocr_train.txt").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    return path


def train(recipe: str, pipeline: Path | str, *overrides: str) -> int:
    return cli.main(["train", str(ROOT / "recipes" / f"{recipe}.yaml"), f"model.path={pipeline}", *overrides])


def test_every_recipe_with_a_model_of_its_own_is_here() -> None:
    stems = {path.stem for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.endswith("_didr")}
    real = {stem for stem in stems if not stem.startswith("shapes")}
    assert real == set(RECIPES)
    assert {name for name, _ in RECIPES.values()} == set(NAMES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_its_family(recipe: str, pipelines: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    name, own = RECIPES[recipe]
    overrides = [*SMALL, *own, f"data.prompts={prompts}", f"run.dir={tmp_path / 'run'}"]
    assert train(recipe, pipelines[name], *overrides) == 0
    adapter = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    ups = [tensor for key, tensor in adapter.items() if "lora_B" in key or "lora.up" in key]
    assert ups and any(tensor.abs().sum() > 0 for tensor in ups), "nothing was trained"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_cannot_be_fetched_is_named(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it has read the environment already
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    path = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["model"]["path"]
    assert train(recipe, path, f"run.dir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert f"model_index.json of {path} could not be fetched" in error and "local folder" in error


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_of_another_family_is_refused(
    recipe: str, pipelines: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "sdxl" if RECIPES[recipe][0] != "sdxl" else "sd3"
    overrides = [*SMALL, f"data.prompts={prompts}", f"run.dir={tmp_path / 'run'}"]
    assert train(recipe, pipelines[other], *overrides) == 2
    assert f"set model.family to '{other}'" in capsys.readouterr().err
