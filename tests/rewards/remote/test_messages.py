"""What travels: both ends agree, and images lose nothing but what 8 bits cannot hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.errors import ConfigError
from crd_fast.rewards.remote.client import RemoteOptions
from crd_fast.rewards.remote.legacy import LegacyOptions
from crd_fast.rewards.remote.png import decode_png, encode_png
from crd_fast.rewards.remote.protocol import Item, ProtocolError, ScoreAnswer, ScoreRequest, decode_error, finite
from crd_fast.training.config import build_recipe, dump_recipe, load_recipe
from tests.rewards.remote.servers import pictures


def test_every_level_survives_and_others_go_to_the_nearest():
    levels = torch.arange(256).float() / 255
    image = levels.view(1, 16, 16).expand(3, 16, 16) * torch.tensor([1.0, 0.5, 1.0]).view(3, 1, 1)
    back = decode_png(encode_png(image), 256)
    assert torch.equal(back[0], image[0]) and torch.equal(back[2], image[2])
    assert (back - image).abs().max() <= 0.5 / 255 + 1e-7
    assert back.dtype == torch.float32 and back.is_contiguous()
    assert torch.equal(decode_png(encode_png(back), 256), back)


def test_height_and_width_are_not_swapped():
    image = pictures(1, 16)[0][:, :4]
    assert torch.equal(decode_png(encode_png(image), 64), image)
    with pytest.raises(ProtocolError, match="the PNG is 16x4: expected 1 to 63 pixels"):
        decode_png(encode_png(image), 63)


@given(st.text(), st.dictionaries(st.text(), st.none() | st.lists(st.integers() | st.text())))
def test_a_request_comes_back_as_it_was(prompt, metadata):
    request = ScoreRequest("id", ("a", "b"), (Item(prompt, metadata, "aGk="), Item("", {}, "")))
    assert ScoreRequest.decode(request.encode()) == request
    assert request.items[0].png() == b"hi"


def test_an_answer_comes_back_as_it_was():
    answer = ScoreAnswer("id", {"a": [1.5, None, -0.1], "a/more": [0.0, None, 1e38]}, {"a": {1: "why"}})
    assert ScoreAnswer.decode(answer.encode(), 3) == answer


@given(st.floats() | st.integers())
def test_only_numbers_that_float32_holds_are_finite(value):
    try:
        expected = bool(torch.tensor(float(value), dtype=torch.float64).to(torch.float32).isfinite())
    except OverflowError:
        expected = False
    if expected:
        assert finite(value, "x") == float(value)
    else:
        with pytest.raises(ProtocolError, match="x is .*: expected a finite number"):
            finite(value, "x")


@pytest.mark.parametrize("value", [2**128, -(2**128), 10**400, float("nan"), 2.0**128 - 2.0**103, True, "1", None])
def test_what_is_no_finite_float32_is_refused(value):
    with pytest.raises(ProtocolError):
        finite(value, "x")
    assert finite(torch.finfo(torch.float32).max, "x") == torch.finfo(torch.float32).max


def test_nan_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        ScoreAnswer("id", {"a": [float("nan")]}, {}).encode()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (json.dumps({"error": "so\nit is"}).encode(), "so it is"),
        (b"<html> no\n json", "<html> no json"),
        (b"[1]", "[1]"),
        (b"\xff" * 1000, "\ufffd" * 500),
        (b"[" * 10**6, "[" * 500),
        (b"", "(empty)"),
    ],
)
def test_an_error_answer_is_shown_in_one_short_line(body, text):
    assert decode_error(body) == text


@pytest.mark.parametrize("kind", ["remote", "legacy_remote"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "127.0.0.1:8000"}, r"url is '127.0.0.1:8000': expected an address"),
        ({"url": "ftp://host"}, "url is"),
        ({"url": "http://user:secret@host"}, "without a password"),
        ({"url": "http://host:port"}, "url is"),
        ({"url": "http://host/?x=1"}, "url is"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds is nan"),
        ({"attempts": 4}, "attempts is 4: expected 1 to 3"),
        ({"attempts": 0}, "attempts is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 257}, "batch is 257"),
        ({"concurrency": 0}, "concurrency is 0"),
    ],
)
def test_wrong_options_are_refused(kind, changes, message):
    with pytest.raises(ConfigError, match=f"rewards.{kind}.*{message}"):
        if kind == "remote":
            RemoteOptions(**{"url": "http://host", "reward": "ocr"} | changes)
        else:
            LegacyOptions(**{"url": "http://host", "server": "deqa"} | changes)


def test_the_documented_messages_are_messages():
    blocks = re.findall(r"```json\n(.*?)```", Path("docs/remote_rewards.md").read_text(encoding="utf-8"), re.DOTALL)
    request, answer = (block.encode() for block in blocks)
    assert ScoreRequest.decode(request).rewards == ("ocr",)
    decoded = ScoreAnswer.decode(answer, len(ScoreRequest.decode(request).items))
    assert decoded.scores == {"ocr": [0.75, None], "ocr/ocr_exact": [0.0, None]} and decoded.errors["ocr"].keys() == {1}


def test_a_recipe_can_have_several_remote_rewards():
    section = "{url: 'http://127.0.0.1:8000', reward: ocr, weight: 2}"
    recipe = load_recipe("recipes/shapes.yaml", [f"rewards={{remote:text: {section}, remote:size: {section}}}"])
    assert recipe.rewards.keys() == {"remote:text", "remote:size"}
    settings = recipe.rewards["remote:text"]
    assert settings.options == RemoteOptions("http://127.0.0.1:8000", "ocr") and settings.spec.weight == 2
    assert build_recipe(yaml.safe_load(dump_recipe(recipe)), recipe.name) == recipe


def test_a_list_that_shares_its_parts_is_told_in_a_line_at_once():
    shared: list[object] = []
    for _ in range(200):
        shared = [shared, shared]
    with pytest.raises(ProtocolError, match=r"scores\[0\] is \[\[\[.*: expected") as raised:
        finite(shared, "scores[0]")
    assert len(str(raised.value)) < 300
