"""docs/settings.md names every key of a training recipe, with the default that it has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from crd_fast import settings
from crd_fast.rewards.aggregate import RewardSpec
from crd_fast.training import config

PAGE = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
SECTIONS = {
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
}


def rows(section: str) -> dict[str, str]:
    """Key -> default, as the page has them."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))


def test_every_section_has_its_heading() -> None:
    fields = {f.name for f in dataclasses.fields(config.Recipe)} - {"name"}
    assert set(SECTIONS) == fields
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_there_with_its_default(section: str) -> None:
    known = dataclasses.fields(SECTIONS[section])
    page = rows(section)
    assert set(page) == {f.name for f in known}
    for field in known:
        shown = page[field.name]
        if field.default is dataclasses.MISSING:
            assert shown == "-", field.name
            continue
        default: Any = field.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            default = dataclasses.asdict(default)
        found = yaml.safe_load(shown)
        if isinstance(default, float):
            found = settings._number(found, field.name)
        assert found == default and isinstance(found, type(default)), field.name
