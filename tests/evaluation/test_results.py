"""From raw scores to columns: macro and micro means, intervals over prompts, columns that fail as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crd_fast.data.prompts import PromptSet
from crd_fast.errors import ConfigError, RewardError
from crd_fast.evaluation.intervals import clustered_bootstrap
from crd_fast.evaluation.pictures import to_pixels, write_png
from crd_fast.evaluation.results import columns, value_of
from crd_fast.evaluation.scoring import Scores, build_options, score_files
from crd_fast.evaluation.suites import SUITES, Item
from crd_fast.evaluation.tables import column_order
from crd_fast.rewards.base import PartialRewardError
from crd_fast.settings import read_sections


class Brightness:
    """A reward with the faults that rewards have: `faults` maps an item of the batch to what goes wrong there."""

    name, differentiable, requires, range = "brightness", False, frozenset[str](), None

    def __init__(self, faults: dict[int, str]) -> None:
        self.faults = faults
        self.batches = 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> dict[str, Tensor]:
        self.batches += 1
        scores = {"brightness": images.mean((1, 2, 3)), "red": images[:, 0].mean((1, 2))}
        for item, fault in self.faults.items():
            if fault == "nan":
                scores["brightness"][item] = torch.nan
            elif fault == "partial":
                scores["brightness"][item] = torch.nan
                raise PartialRewardError(self.name, {item: "the server said 503"}, scores)
            elif fault == "raise":
                raise RewardError("no model: download it")
        return scores


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        write_png(path, to_pixels(torch.full((1, 3, 8, 8), (i + 1) / 5))[0])
    return paths


def scored(files: list[Path], faults: dict[int, str], batch: int = 4) -> Scores:
    return score_files(Brightness(faults), files, ["p"] * 4, [{}] * 4, batch)


PROMPTS = PromptSet(("one", "two"), ({"tag": "a"}, {"tag": "b"}), "set")
ITEMS = [Item(0, 0, 0), Item(0, 1, 1), Item(0, 2, 2), Item(1, 0, 3)]


def test_macro_is_over_tasks_and_micro_over_images(files: list[Path]) -> None:
    made = columns(PROMPTS, ITEMS, {"brightness": scored(files, {})})
    assert list(made) == ["brightness", "brightness/red"]
    column = made["brightness"]
    assert column["tasks"]["a"]["mean"] == pytest.approx(0.4) and column["tasks"]["b"]["mean"] == pytest.approx(0.8)
    assert column["macro"]["mean"] == pytest.approx(0.6) and column["micro"]["mean"] == pytest.approx(0.5)
    assert column["n"] == 4 and column["reason"] is None
    assert value_of(column) == column["macro"]
    values = [i / 5 for i in (1, 2, 3, 4)]
    expected = clustered_bootstrap(values, [0, 0, 0, 1])
    assert [column["micro"][key] for key in ("low", "high")] == pytest.approx([expected.low, expected.high])


def test_prompts_without_tasks_have_no_macro_mean(files: list[Path]) -> None:
    plain = PromptSet(("one", "two"), ({}, {}), "set")
    column = columns(plain, ITEMS, {"brightness": scored(files, {})})["brightness"]
    assert column["macro"] is None and column["tasks"] == {} and value_of(column) == column["micro"]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_nan_fails_its_column(files: list[Path], batch: int) -> None:
    found = scored(files, {0: "nan"} if batch == 4 else {}, batch)
    if batch == 1:  # a diagnostic may be whole where the score is not
        found.values["brightness"][2] = None
        found.failures[2] = "gave nan"
    made = columns(PROMPTS, ITEMS, {"brightness": found})
    assert value_of(made["brightness"]) is None
    assert "nan" in made["brightness"]["reason"]
    if batch == 1:
        assert made["brightness"]["reason"].startswith("1 of 4 images have no score, the first 00000/samples/00002.png")
        assert made["brightness/red"]["reason"] is None


def test_one_failed_item_keeps_the_scores_of_the_others(files: list[Path]) -> None:
    found = scored(files, {1: "partial"})
    assert found.values["brightness"] == [pytest.approx(0.2), None, pytest.approx(0.6), pytest.approx(0.8)]
    assert found.failures == {1: "the server said 503"} and found.reason is None
    column = columns(PROMPTS, ITEMS, {"brightness": found})["brightness"]
    assert column["macro"] is None and "503" in column["reason"]


def test_a_reward_that_cannot_be_used_is_tried_once(files: list[Path]) -> None:
    reward = Brightness({0: "raise"})
    found = score_files(reward, files, ["p"] * 4, [{}] * 4, 1)
    assert found.reason == "no model: download it" and reward.batches == 1
    assert columns(PROMPTS, ITEMS, {"brightness": found})["brightness"]["reason"] == "no model: download it"


def test_files_that_are_no_image_or_black_fail_by_themselves(files: list[Path]) -> None:
    files[0].write_bytes(files[0].read_bytes()[:-20])
    write_png(files[2], to_pixels(torch.zeros(1, 3, 8, 8))[0])
    found = scored(files, {})
    assert set(found.failures) == {0, 2}
    assert "no whole image" in found.failures[0] and "exactly black" in found.failures[2]
    assert found.values["brightness"] == [None, pytest.approx(0.4), None, pytest.approx(0.8)]


def test_images_of_different_sizes_are_scored(files: list[Path]) -> None:
    write_png(files[1], to_pixels(torch.full((1, 3, 16, 12), 0.4))[0])
    assert scored(files, {}).values["brightness"] == [pytest.approx(i / 5, abs=2e-3) for i in (1, 2, 3, 4)]


def test_options_are_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("ocr: {mode: line, band: [0.5, 1]}\n")
    options = build_options("ocr", read_sections(file, "options file")["ocr"])
    assert options.mode == "line" and options.band == (0.5, 1)
    with pytest.raises(ConfigError, match=r"unknown key ocr\.moed; did you mean 'mode'"):
        build_options("ocr", {"moed": "line"})
    with pytest.raises(ConfigError, match=r"ocr\.min_side is '64': expected a whole number"):
        build_options("ocr", {"min_side": "64"})
    with pytest.raises(ConfigError, match="unknown reward 'orc'"):
        build_options("orc", {})
    file.write_text("- ocr\n")
    with pytest.raises(ConfigError, match="holds a list: expected sections"):
        read_sections(file, "options file")


@pytest.mark.parametrize(("score", "shown"), [("soft", "geneval/accuracy"), ("accuracy", "geneval/soft")])
def test_the_diagnostic_that_genevals_column_repeats_is_left_out(score: str, shown: str) -> None:
    names = ("geneval", "geneval/accuracy", "geneval/soft", "pickscore")
    summary = {
        "columns": {name: {} for name in names},
        "versions": {"geneval": {"options": {"score": score}}, "pickscore": {"options": {}}},
    }
    assert column_order(SUITES["drawbench"], [summary]) == ["pickscore", "geneval", shown]
    assert column_order(SUITES["geneval"], [summary])[:2] == ["geneval", "geneval/soft"]
