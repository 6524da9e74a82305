"""Which images a suite makes, and from which noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from crd_fast.data.prompts import PromptSet, load_prompts
from crd_fast.errors import ConfigError, DataError
from crd_fast.evaluation import shapes_suite
from crd_fast.evaluation.suites import SUITES, plan, suite_named, suite_prompts

ROOT = Path(__file__).parents[2]
PLAIN = PromptSet(tuple("abc"), ({},) * 3, "set")


def test_noise_depends_on_seed_prompt_and_number_alone() -> None:
    suite = SUITES["drawbench"]
    items = plan(suite, PLAIN, 4, seed=0)
    assert [(item.prompt, item.k) for item in items] == [(p, k) for p in range(3) for k in range(4)]
    assert items[5].file_name == "00001/samples/00001.png"
    ids = {(item.prompt, item.k): item.sample_id for item in items}
    assert len(set(ids.values())) == 12 and all(2**40 < value < 2**62 for value in ids.values())
    fewer = plan(suite, PromptSet(tuple("ab"), ({},) * 2, "set"), 2, seed=0)
    assert all(ids[item.prompt, item.k] == item.sample_id for item in fewer)
    assert not set(ids.values()) & {item.sample_id for item in plan(suite, PLAIN, 4, seed=1)}


def test_shapes_images_are_those_of_a_training_run() -> None:
    test = load_prompts(ROOT / "recipes/prompts/shapes_test.jsonl")
    items = plan(SUITES["shapes"], test, 60, seed=0)
    assert [item.prompt for item in items] == shapes_suite.choose_prompts(test, 60)
    assert [item.sample_id - shapes_suite.FIRST_SAMPLE_ID for item in items] == list(range(len(items)))
    assert len({item.file_name for item in items}) == len(items)


def test_a_missing_prompt_file_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("geneval", "ocr", "drawbench"):
        with pytest.raises(ConfigError, match=r"give --prompts FILE; get .*github\.com"):
            suite_prompts(SUITES[name], None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"shapes_test\.jsonl is not here"):
        suite_prompts(SUITES["shapes"], None)
    with pytest.raises(ConfigError, match="did you mean 'geneval'"):
        suite_named("genval")


def test_prompts_must_have_what_the_suite_scores(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cow\n")
    with pytest.raises(DataError, match="double quotes"):
        suite_prompts(SUITES["ocr"], str(file))
    with pytest.raises(DataError, match="'include'"):
        suite_prompts(SUITES["geneval"], str(file))
    assert len(suite_prompts(SUITES["drawbench"], str(file))) == 1
