"""Prompts with a text to read: what the recipes hold is what the module writes, and no text is in both sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from crd_fast.data.prompts import assert_disjoint, load_prompts
from crd_fast.data.sign_prompts import SCENES, main, sign_prompts, texts
from crd_fast.rewards.base import QUOTED_TEXT
from crd_fast.rewards.ocr import normalize, quoted_text

RECIPES = Path(__file__).parents[2] / "recipes" / "prompts"


def test_committed_prompts_are_what_the_module_writes(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ocr_test.txt", "ocr_train.txt"]
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (RECIPES / file.name).read_bytes(), file.name


def test_prompts_load_and_no_text_is_in_both_sets() -> None:
    train, test = (load_prompts(RECIPES / f"ocr_{name}.txt") for name in ("train", "test"))
    assert (len(train), len(test)) == (2000, 200)
    assert_disjoint(train, test)
    known = set(texts())
    quoted = [[quoted_text(prompt) for prompt in split.prompts] for split in (train, test)]
    assert {text for split in quoted for text in split} <= known
    compared = [normalize(text) for split in quoted for text in split]  # as the reward compares them
    assert len(set(compared)) == 2200
    for split in (train, test):
        split.require([QUOTED_TEXT])


def test_the_command_takes_numbers_seed_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    assert main(["--train", "7", "--test", "3", "--seed", "5", "--out", str(folder)]) == 0
    train, test = sign_prompts(7, 3, 5)
    assert list(load_prompts(folder / "ocr_train.txt").prompts) == train and len(train) == 7
    assert list(load_prompts(folder / "ocr_test.txt").prompts) == test and len(test) == 3


def test_the_same_seed_gives_the_same_prompts_and_another_others() -> None:
    assert sign_prompts(50, 20, 1) == sign_prompts(50, 20, 1)
    assert sign_prompts(50, 20, 1) != sign_prompts(50, 20, 2)


def test_every_text_can_be_used_once() -> None:
    known = texts()
    assert len({normalize(text) for text in known}) == len(known)
    train, test = sign_prompts(len(known) - 1, 1)
    assert sorted(quoted_text(prompt) for prompt in train + test) == sorted(known)


def test_half_of_the_texts_are_short_and_every_scene_is_there() -> None:
    train, test = sign_prompts(900, 100)
    lengths = [len(quoted_text(prompt).split()) for prompt in train + test]
    assert sum(length < 3 for length in lengths) == 500 and set(lengths) == {1, 2, 3}
    scenes = {prompt.replace(quoted_text(prompt), "{}") for prompt in train}
    assert scenes == set(SCENES)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train", "0"], "0 + 200 prompts: expected at least 1"),
        (["--seed", "-1"], "seed is -1: expected 0 or more"),
        (["--out", "{folder}/file/below"], "file"),
    ],
)
def test_the_command_exits_2_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    given = [word.format(folder=tmp_path) for word in more]
    assert main(["--out", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sign_prompts: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("train", "test"), [(0, 5), (5, 0), (-1, 5), (len(texts()), 1)])
def test_impossible_numbers_are_refused(train: int, test: int) -> None:
    with pytest.raises(ValueError, match=rf"{train} \+ {test} prompts: expected at least 1.*{len(texts())} together"):
        sign_prompts(train, test)
