"""OCR scoring, and reading rendered words with the real engine."""

from __future__ import annotations

import builtins
import logging
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from crd_fast.errors import ConfigError, DataError, RewardError
from crd_fast.rewards import OcrReward, OcrSettings, RapidOcrReader, quoted_text
from crd_fast.rewards import ocr as ocr_module
from crd_fast.rewards.ocr import levenshtein, normalize, text_score

# ---- texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello World", "helloworld"),
        (" a\tb\u00a0c\u3000d\n", "abcd"),
        ("\uff21\uff22\uff11", "ab1"),  # full width
        ("\ufb01ne", "fine"),  # ligature
        ("it\u2019s", "it's"),
        ("\u201cHi\u201d", '"hi"'),
        ("cafe\u0301", "caf\u00e9"),  # combining accent
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "42"', "42"),
        ("a sign that says \u201cOpen Late\u201d in red", "Open Late"),
        ("a book titled \u201eIt's\"", "It's"),
        ('"X"', "X"),
    ],
)
def test_quoted_text(prompt, expected):
    assert quoted_text(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a sign", "has 0 double quotes"),
        ('a sign "42', "has 1 double quotes"),
        ('"a" and "b"', "has 4 double quotes"),
        ("a sign that says '42'", "has 0 double quotes"),
        ('a sign ""', "nothing between"),
        ('a sign " "', "nothing between"),
    ],
)
def test_wrong_quotes_are_refused(prompt, message):
    with pytest.raises(DataError, match=message):
        quoted_text(prompt)


def recursive_distance(a, b):
    @cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))


@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_levenshtein(a, b):
    assert levenshtein(a, b) == recursive_distance(a, b)


@pytest.mark.parametrize(
    ("target", "lines", "score", "exact"),
    [
        ("Hello", ["hello"], 1.0, True),
        ("Hello World", ["HELLO", "world"], 1.0, True),
        ("Hello", ["say hello there"], 1.0, False),  # contained
        ("Hello", ["hallo"], 0.8, False),
        ("Hello", [], 0.0, False),
        ("Hello", ["completely different and longer"], 0.0, False),  # distance capped at the target's length
        ("42", ["4"], 0.5, False),
        ("42", ["24"], 0.0, False),
        ("it\u2019s", ["it's"], 1.0, True),
    ],
)
def test_text_score(target, lines, score, exact):
    assert text_score(target, lines) == (pytest.approx(score), exact)


def test_empty_target_is_refused():
    with pytest.raises(DataError, match="empty"):
        text_score(" ", ["x"])


@given(st.text(min_size=1).filter(normalize), st.lists(st.text(), max_size=3))
def test_score_stays_in_range(target, lines):
    score, exact = text_score(target, lines)
    assert 0 <= score <= 1
    assert score == 1 or not exact
    assert text_score(target, [target]) == (1, True)


# ---- the reward with a reader made by hand

GREY = torch.full((2, 3, 8, 8), 0.5)


def test_reward_scores_what_the_reader_gives():
    result = OcrReward(lambda images: [["4"], ["no 17"]])(GREY, ['says "42"', 'says "17"'], [{}, {}])
    assert result["ocr"].tolist() == [0.5, 1.0]
    assert result["ocr_exact"].tolist() == [0.0, 0.0]
    assert result["ocr"].dtype == result["ocr_exact"].dtype == torch.float32


def test_reward_refuses_a_reader_of_wrong_length():
    with pytest.raises(RewardError, match="1 lists for 2 prompts"):
        OcrReward(lambda images: [["4"]])(GREY, ['"42"', '"17"'], [{}, {}])


def test_reward_refuses_a_prompt_without_quotes():
    with pytest.raises(DataError, match="'a cow' has 0 double quotes"):
        OcrReward(lambda images: [[], []])(GREY, ['"42"', "a cow"], [{}, {}])


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "auto"},
        {"min_side": 0},
        {"detection_side": 8},
        {"workers": -1},
        {"min_confidence": 1.5},
        {"mode": "line", "band": (0.5, 0.5)},
        {"mode": "line", "band": (0.5, 1.5)},
        {"mode": "detect", "band": (0.2, 0.8)},
    ],
)
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        OcrSettings(**arguments)


# ---- the real engine

WORDS = (
    *("42", "07", "163", "985", "B7", "KLM", "HAT", "XY", "SUN", "90"),
    *(
        "Open",
        "coffee",
        "Fresh Bread",
        "Library",
        "Exit 12",
        "Summer Sale",
        "Welcome",
        "taxi",
        "Platform 9",
        "STOP",
    ),
)


def sign(text, side):
    """A light panel with dark text on a dark ground, float (3, side, side) in [0, 1]."""
    image = Image.new("RGB", (side, side), (24, 26, 32))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=22 if side <= 64 else side // 9)
    width, height = draw.textbbox((0, 0), text, font=font, anchor="lt")[2:]
    center, pad = side / 2, side * 0.06
    panel = (
        center - width / 2 - pad,
        center - height / 2 - pad,
        center + width / 2 + pad,
        center + height / 2 + pad,
    )
    draw.rectangle(panel, fill=(232, 230, 222))
    draw.text((center, center), text, fill=(22, 22, 26), font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


SMALL = torch.stack([sign(word, 64) for word in WORDS[:10]])  # (10, 3, 64, 64)
LARGE = torch.stack([sign(word, 256) for word in WORDS[10:]])  # (10, 3, 256, 256)


@pytest.fixture(scope="module")
def reader():
    return RapidOcrReader()


def test_reads_small_signs_and_large_words(reader):
    reward = OcrReward(reader)
    for images, words in ((SMALL, WORDS[:10]), (LARGE, WORDS[10:])):
        result = reward(images, [f'a sign that says "{word}"' for word in words], [{}] * 10)
        assert result["ocr_exact"].tolist() == [1] * 10
        assert result["ocr"].tolist() == [1] * 10


def test_wrong_word_scores_low(reader):
    result = OcrReward(reader)(SMALL[:2], ['a sign that says "KQW"', 'a sign that says "42"'], [{}, {}])
    assert result["ocr"].tolist() == [0, 0]


@pytest.mark.parametrize("mode", ["detect", "line"])
@pytest.mark.parametrize("value", [0.02, 0.5, 1.0])
def test_blank_image_scores_zero(mode, value):
    reward = OcrReward(RapidOcrReader(OcrSettings(mode=mode)))
    result = reward(torch.full((1, 3, 64, 64), value), ['a sign that says "42"'], [{}])
    assert result["ocr"].tolist() == [0]
    assert result["ocr_exact"].tolist() == [0]


def test_line_mode_reads_a_band():
    reader = RapidOcrReader(OcrSettings(mode="line", band=(0.2, 0.8)))
    assert [normalize("".join(lines)) for lines in reader(SMALL)] == [normalize(word) for word in WORDS[:10]]


def test_workers_keep_the_order(reader):
    images = torch.cat([SMALL, torch.full((1, 3, 64, 64), 0.5), SMALL.flip(0)])
    assert RapidOcrReader(OcrSettings(workers=3))(images) == reader(images)


def test_text_does_not_depend_on_the_batch(reader):
    assert [reader(image[None])[0] for image in SMALL[:4]] == reader(SMALL[:4])


def test_tiny_images_are_enlarged(reader):
    half = torch.nn.functional.interpolate(SMALL[:1], scale_factor=0.5, mode="area")
    assert reader._prepare(half).shape == (1, 64, 64, 3)
    assert reader._prepare(SMALL[:1]).shape == (1, 64, 64, 3)
    assert reader._prepare(LARGE[:1]).shape == (1, 256, 256, 3)


def test_channels_are_blue_first():
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1
    assert RapidOcrReader()._prepare(red)[0, 0, 0].tolist() == [0, 0, 255]


def test_weak_lines_are_dropped():
    reader = RapidOcrReader(OcrSettings(mode="line", min_confidence=0.6))
    reader._engines.put(lambda image: SimpleNamespace(txts=("A", "B", " "), scores=(0.59, 0.6, 0.9)))
    assert reader._read(np.zeros((64, 64, 3), np.uint8)) == ["B"]


def test_engine_failure_is_raised_and_does_not_block():
    def fail(image):
        raise OSError("engine broke")

    reader = RapidOcrReader()
    reader._engines.put(fail)
    for _ in range(2):  # the engine goes back to the queue, so a second call does not wait for ever
        with pytest.raises(OSError, match="engine broke"):
            reader._read(np.zeros((64, 64, 3), np.uint8))


def test_loading_and_reading_print_nothing(capfd):
    RapidOcrReader()(torch.cat([SMALL[:1], torch.full((1, 3, 64, 64), 0.5)]))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert logging.getLogger("RapidOCR").level == logging.CRITICAL


def test_loading_downloads_nothing(monkeypatch):
    import requests

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(requests.Session, "request", refuse)
    assert RapidOcrReader()(SMALL[:1]) == [["42"]]


def test_missing_package_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "rapidocr":
            raise ImportError("No module named 'rapidocr'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RewardError, match=r'pip install "crd-fast\[rewards\]"'):
        RapidOcrReader()(SMALL[:1])


def test_old_package_is_refused(monkeypatch):
    monkeypatch.setattr(ocr_module.distributions, "version", lambda name: "3.9.1")
    with pytest.raises(RewardError, match="found 3.9.1"):
        RapidOcrReader()(SMALL[:1])


def test_missing_model_is_refused(monkeypatch, tmp_path):
    import rapidocr

    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(RewardError, match="PP-OCRv6_det_small.onnx"):
        RapidOcrReader()(SMALL[:1])
