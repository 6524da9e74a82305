"""GenEval's summary, by its definitions: shares of images and prompts, and the mean over tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crd_fast.data.prompts import load_prompts
from crd_fast.errors import DataError
from crd_fast.rewards.geneval import Detection, evaluate, summarize

COW = {"class": "cow", "count": 1}
DOG = {"class": "dog", "count": 1}
ENTRIES = [
    {"tag": "single_object", "include": [COW], "prompt": "a photo of a cow"},
    {"tag": "two_object", "include": [COW, DOG], "prompt": "a photo of a cow and a dog"},
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
    {"tag": "colors", "include": [{**COW, "color": "red"}], "prompt": "a photo of a red cow"},
    {
        "tag": "position",
        "include": [COW, {**DOG, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a cow",
    },
    {
        "tag": "color_attr",
        "include": [{**COW, "color": "red"}, {**DOG, "color": "blue"}],
        "prompt": "a photo of a red cow and a blue dog",
    },
    {"tag": "single_object", "include": [DOG], "prompt": "a photo of a dog"},
]


def test_summary_of_a_file_in_the_benchmarks_format(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    accuracy = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    summary = summarize(load_prompts(path).metadata, accuracy)
    assert list(summary.tasks) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert summary.tasks == pytest.approx(
        {
            "single_object": 5 / 8,
            "two_object": 0,
            "counting": 1,
            "colors": 1 / 4,
            "position": 1 / 2,
            "color_attr": 1 / 4,
        }
    )
    assert summary.overall == pytest.approx(
        (5 / 8 + 0 + 1 + 1 / 4 + 1 / 2 + 1 / 4) / 6
    )  # of tasks, however many images
    assert summary.images == pytest.approx(13 / 28)
    assert summary.prompts == pytest.approx(6 / 7)  # all but the two objects were right once
    assert (summary.image_count, summary.prompt_count) == (28, 7)


def test_prompts_may_have_different_numbers_of_images() -> None:
    summary = summarize(ENTRIES[:2], [[1.0], [1.0, 0.0, 0.0]])
    assert summary.tasks == {"single_object": 1, "two_object": pytest.approx(1 / 3)}
    assert summary.overall == pytest.approx(2 / 3)
    assert (summary.images, summary.prompts) == (0.5, 1)


def test_equal_entries_are_one_prompt() -> None:
    again = dict(reversed(ENTRIES[0].items()))
    summary = summarize([ENTRIES[0], again, ENTRIES[1]], [[0], [1], [0]])
    assert (summary.prompts, summary.prompt_count, summary.image_count) == (0.5, 2, 3)


def test_it_takes_what_the_rules_give() -> None:
    def cow(x: float) -> Detection:
        return Detection("cow", 0.95, (x, 0.0, x + 8, 8.0), "red")

    images = [[cow(0)], [cow(0), cow(10)], [cow(0), cow(10), cow(20)]]
    accuracy = [[evaluate(found, entry).accuracy for found in images] for entry in (ENTRIES[0], ENTRIES[2], ENTRIES[3])]
    summary = summarize([ENTRIES[0], ENTRIES[2], ENTRIES[3]], accuracy)
    # two cows more are no fault where one is asked for, but a third one is where two are counted
    assert summary.tasks == {"single_object": 1, "counting": pytest.approx(1 / 3), "colors": 1}


@pytest.mark.parametrize(
    ("entries", "accuracy", "message"),
    [
        ([], [], "0 lists of results for 0 entries"),
        (ENTRIES[:2], [[1]], "1 lists of results for 2 entries"),
        (ENTRIES[:2], [[1], []], r"entry 1 has results \[\]"),
        (ENTRIES[:1], [[0.5]], r"entry 0 has results \[0.5\]"),
        (ENTRIES[:1], [[float("nan")]], "entry 0 has results"),
        ([{"include": [COW]}], [[1]], "entry 0 has tag None"),
    ],
)
def test_results_that_are_not_whole_are_refused(entries: list, accuracy: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarize(entries, accuracy)
