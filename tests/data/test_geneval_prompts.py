"""GenEval-style training prompts: proportions, wording, metadata that the rules accept, nothing that is held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from crd_fast.data.geneval_prompts import COLORED, RATIO, geneval_prompts, main, meaning, shares
from crd_fast.data.prompts import assert_disjoint, load_prompts
from crd_fast.errors import DataError
from crd_fast.rewards.geneval import check_metadata
from crd_fast.rewards.geneval_detector import CLASSES, COLORS

COMMITTED = Path(__file__).parents[2] / "recipes" / "prompts" / "geneval_train.jsonl"


def entry(prompt: str, *include: dict, **more: object) -> dict:
    return {"include": list(include), "prompt": prompt, **more}


def thing(label: str, count: int = 1, **more: object) -> dict:
    return {"class": label, "count": count, **more}


def test_tasks_stand_in_their_proportions() -> None:
    entries = geneval_prompts(340)
    assert Counter(e["tag"] for e in entries) == {
        "position": 140,
        "counting": 100,
        "color_attr": 60,
        "colors": 20,
        "two_object": 20,
    }
    first = [e["tag"] for e in entries[:34]]
    assert len(set(first)) >= 4, "the tasks come one after another"


@pytest.mark.parametrize("count", [1, 2, 5, 16, 18, 100, 1001])
def test_shares_are_the_nearest_whole_numbers(count: int) -> None:
    numbers = shares(count)
    assert sum(numbers.values()) == count
    for task, number in numbers.items():
        assert abs(number - count * RATIO[task] / 17) < 1


def test_every_entry_is_what_the_rules_take() -> None:
    for e in geneval_prompts(500, seed=3):
        check_metadata(e)
        assert set(e) == {"tag", "include", "prompt"} | ({"exclude"} if e["tag"] == "counting" else set())
        labels = [part["class"] for part in e["include"]]
        assert set(labels) <= set(CLASSES) and len(set(labels)) == len(labels)
        if e["tag"].startswith("color"):
            colors = [part["color"] for part in e["include"]]
            assert set(colors) <= set(COLORS) and len(set(colors)) == len(colors)
            assert set(labels) <= set(COLORED) and "person" not in COLORED
        else:
            assert not any("color" in part for part in e["include"])


def test_prompts_say_what_their_metadata_say() -> None:
    """Every entry is read back from its own prompt by a small grammar of the benchmark's wording."""
    numbers = {"two": 2, "three": 3, "four": 4}

    def noun(words: str) -> dict:
        first, _, rest = words.partition(" ")
        assert first == ("an" if rest[0] in "aeiou" else "a"), words
        color, _, label = rest.partition(" ")
        return thing(label, color=color) if color in COLORS and label in CLASSES else thing(rest)

    for e in geneval_prompts(800, seed=1):
        assert e["prompt"].startswith("a photo of ")
        words = e["prompt"].removeprefix("a photo of ")
        relation = next((r for r in ("left of", "right of", "above", "below") if f" {r} " in words), None)
        if e["tag"] == "counting":
            number, _, many = words.partition(" ")
            (label,) = [known for known in CLASSES if many in (f"{known}s", f"{known}es")]
            expected = [thing(label, numbers[number])]
            assert e["exclude"] == [thing(label, numbers[number] + 1)]
        elif relation:
            subject, target = words.split(f" {relation} ")
            expected = [noun(target), noun(subject) | {"position": [relation, 0]}]
        else:
            expected = [noun(part) for part in words.split(" and ")]
        assert e["include"] == expected, e["prompt"]
        assert e["tag"] != "two_object" or len(expected) == 2


@pytest.mark.parametrize(
    ("label", "count", "prompt"),
    [("bus", 3, "three buses"), ("wine glass", 2, "two wine glasses"), ("knife", 4, "four knifes")],
)
def test_plurals_are_the_benchmarks(label: str, count: int, prompt: str) -> None:
    counted = {e["prompt"]: e for e in geneval_prompts(17 * 240 // 5) if e["tag"] == "counting"}
    assert len(counted) == 240  # every class with every number, none twice
    assert counted[f"a photo of {prompt}"]["include"] == [thing(label, count)]


def test_the_same_image_has_one_meaning_however_it_is_asked_for() -> None:
    left = entry("", thing("cow"), thing("dog", position=["left of", 0]))
    assert meaning(left) == meaning(entry("", thing("dog"), thing("cow", position=["right of", 0])))
    assert meaning(left) != meaning(entry("", thing("dog"), thing("cow", position=["left of", 0])))
    assert meaning(left) != meaning(entry("", thing("cow"), thing("dog")))
    above = entry("", thing("cow"), thing("dog", position=["above", 0]))
    assert meaning(above) == meaning(entry("", thing("dog"), thing("cow", position=["below", 0])))
    assert meaning(above) not in (meaning(left), meaning(entry("", thing("cow"), thing("dog", position=["below", 0]))))
    pair = entry("", thing("cow", color="red"), thing("dog", color="blue"))
    assert meaning(pair) == meaning(entry("", thing("dog", color="blue"), thing("cow", color="red")))
    assert meaning(pair) != meaning(entry("", thing("cow", color="blue"), thing("dog", color="red")))
    assert meaning(entry("", thing("cow", 2))) != meaning(entry("", thing("cow", 3)))


def test_nothing_held_out_is_asked_for_in_any_order(tmp_path: Path) -> None:
    held_out = geneval_prompts(200, seed=9)
    avoided = {meaning(e) for e in held_out}
    hits = [e for e in geneval_prompts(4000, seed=4) if meaning(e) in avoided]
    assert hits, "nothing to avoid: the test proves nothing"
    entries = geneval_prompts(4000, seed=4, exclude=held_out)
    assert not [e for e in entries if meaning(e) in avoided]
    assert Counter(e["tag"] for e in entries) == shares(4000)


def test_prompts_of_a_task_repeat_only_after_all_have_come() -> None:
    counting = [e["prompt"] for e in geneval_prompts(17 * 300 // 5) if e["tag"] == "counting"]
    times = Counter(Counter(counting).values())
    assert len(counting) == 300 and times == {1: 180, 2: 60}


def test_the_command_writes_what_the_function_gives(tmp_path: Path) -> None:
    test, out = tmp_path / "test.jsonl", tmp_path / "new folder" / "train.jsonl"
    assert main(["--count", "60", "--seed", "5", "--out", str(test)]) == 0
    assert main(["--count", "300", "--seed", "6", "--exclude", str(test), "--out", str(out)]) == 0
    held_out, train = load_prompts(test), load_prompts(out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == geneval_prompts(300, 6, held_out.metadata)
    assert_disjoint(train, held_out)
    train.require(["include"])
    first = out.read_bytes()
    assert main(["--count", "300", "--seed", "6", "--exclude", str(test), "--out", str(out)]) == 0
    assert out.read_bytes() == first
    assert main(["--count", "300", "--seed", "7", "--exclude", str(test), "--out", str(out)]) == 0
    assert out.read_bytes() != first


def test_the_command_says_when_nothing_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--count", "3", "--out", str(tmp_path / "train.jsonl")])
    assert "no --exclude" in capsys.readouterr().err
    main(["--count", "3", "--exclude", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "more.jsonl")])
    assert capsys.readouterr().err == ""


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(DataError, match="0 prompts: expected at least 1"):
        geneval_prompts(0)
    every = [entry("", thing(label, count)) for label in CLASSES for count in (2, 3, 4)]
    with pytest.raises(DataError, match="every prompt of the task 'counting' is held out"):
        geneval_prompts(17, exclude=every)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--count", "0"], "0 prompts: expected at least 1"),
        (["--seed", "-1"], "seed is -1: expected 0 or more"),
        (["--exclude", "{folder}/nope.jsonl"], "nope.jsonl does not exist"),
        (["--exclude", "{folder}/plain.jsonl"], "plain.jsonl:1: "),
        (["--out", "{folder}/plain.jsonl/train.jsonl"], "plain.jsonl"),
    ],
)
def test_the_command_exits_2_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    (tmp_path / "plain.jsonl").write_text('{"prompt": "a cow"}\n')
    given = [word.format(folder=tmp_path) for word in more]
    assert main(["--count", "3", "--out", str(tmp_path / "train.jsonl"), *given]) == 2
    error = capsys.readouterr().err
    assert "geneval_prompts: " in error and message in error
    assert not (tmp_path / "train.jsonl").exists()


def test_committed_prompts_load_and_have_the_proportions() -> None:
    train = load_prompts(COMMITTED)
    train.require(["include"])
    assert Counter(e["tag"] for e in train.metadata) == shares(1700)
    # among the 240 counting prompts those of the benchmark are missing, and nothing else is
    counted = {e["prompt"] for e in train.metadata if e["tag"] == "counting"}
    assert len(counted) == 160
