"""The pages of settings name every key of a recipe, with the default that it has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from crd_fast import settings
from crd_fast.didr import recipe as didr
from crd_fast.rewards.aggregate import RewardSpec
from crd_fast.training import config

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "settings.md": {
        "model": config.ModelSettings,
        "data": config.DataSettings,
        "rewards": RewardSpec,
        "algorithm": config.AlgorithmSettings,
        "snapshots": config.SnapshotSettings,
        "lora": config.LoraSettings,
        "rollout": config.RolloutSettings,
        "train": config.TrainSettings,
        "precision": config.PrecisionSettings,
        "acceleration": config.AccelerationSettings,
        "evaluation": config.EvaluationSettings,
        "run": config.RunSettings,
    },
    "didr_settings.md": {
        "reward": didr.RewardSettings,
        "algorithm": didr.AlgorithmSettings,
        "generator": didr.GeneratorSettings,
        "lora": didr.LoraSettings,
        "train": didr.TrainSettings,
        "decode": didr.DecodeSettings,
        "precision": didr.PrecisionSettings,
        "evaluation": didr.EvaluationSettings,
    },
}
SECTIONS = [(page, section) for page, sections in PAGES.items() for section in sections]


def rows(page: str, section: str) -> dict[str, str]:
    """Key -> default, as the page has them."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("page", "recipe", "elsewhere"),
    [
        ("settings.md", config.Recipe, set()),
        ("didr_settings.md", didr.DIDRRecipe, {"model", "data", "acceleration", "run"}),
    ],
)
def test_every_section_has_its_heading(page: str, recipe: Any, elsewhere: set[str]) -> None:
    assert set(PAGES[page]) == {f.name for f in dataclasses.fields(recipe)} - {"name"} - elsewhere
    text = (DOCS / page).read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(PAGES[page])


@pytest.mark.parametrize(("page", "section"), SECTIONS)
def test_every_key_is_there_with_its_default(page: str, section: str) -> None:
    known, shown = dataclasses.fields(PAGES[page][section]), rows(page, section)
    assert set(shown) == {f.name for f in known}
    for field in known:
        if field.default is dataclasses.MISSING:
            assert shown[field.name] == "-", field.name
            continue
        default: Any = field.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            default = dataclasses.asdict(default)
        found = yaml.safe_load(shown[field.name])
        found = settings._number(found, field.name) if isinstance(default, float) else found
        found = tuple(found) if isinstance(default, tuple) else found
        assert found == default and isinstance(found, type(default)), field.name
