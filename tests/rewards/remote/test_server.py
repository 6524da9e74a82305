"""The server: what it answers, what it refuses, and that hostile input costs the item or the request alone."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import OcrReward, registry
from crd_fast.rewards.base import PartialRewardError, score_batch
from crd_fast.rewards.jpeg import JpegSettings
from crd_fast.rewards.remote.client import RemoteOptions, RemoteReward
from crd_fast.rewards.remote.png import encode_png
from tests.rewards.remote.servers import TOKEN, Served, pictures, question

JPEG = "jpeg_compressibility"


def remote(server: Served, reward: str = JPEG, name: str = "remote", **options: object) -> RemoteReward:
    return RemoteReward(RemoteOptions(server.url, reward, token_env="TEST_REWARD_TOKEN", **options), name)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def test_scores_are_those_of_the_reward_here_in_order(served):
    images = pictures(21)
    local = score_batch(registry.build(JPEG, JpegSettings()), images, [""] * 21, [{}] * 21)[JPEG]
    assert len(set(local.tolist())) > 5  # else order would not show
    scores = score_batch(remote(served, batch=4, concurrency=5), images, [""] * 21, [{}] * 21)
    assert scores.keys() == {"remote"}
    assert torch.equal(scores["remote"], local)


def test_the_registry_builds_several(served, monkeypatch):
    name = "remote:size"
    options = registry.options_type(name)(served.url, JPEG, token_env="TEST_REWARD_TOKEN")
    reward = registry.build(name, options)
    assert reward.name == name and registry.placement(name, options).kind == "thread"
    assert score_batch(reward, pictures(1), [""], [{}]).keys() == {name}
    with pytest.raises(ConfigError, match="unknown reward 'jpeg_compressibility:size'"):
        registry.options_type(f"{JPEG}:size")


def test_images_are_rounded_to_eight_bits_and_no_further(served):
    images = pictures(4)
    nudged = images + 0.4 / 255 * torch.where(images < 0.5, 1.0, -1.0)
    arguments = [""] * 4, [{}] * 4
    assert torch.equal(
        score_batch(remote(served), nudged, *arguments)["remote"],
        score_batch(remote(served), images, *arguments)["remote"],
    )


def test_reading_text_with_its_diagnostics_and_one_prompt_without_a_text(served):
    sign = Image.new("RGB", (128, 64), "white")
    ImageDraw.Draw(sign).text((8, 16), "OPEN", fill="black", font=ImageFont.load_default(32))
    image = torch.from_numpy(np.array(sign)).permute(2, 0, 1).float() / 255
    reward = remote(served, "ocr")
    assert reward.requires == OcrReward(lambda _: []).requires and reward.range == (0.0, 1.0)
    with pytest.raises(PartialRewardError) as raised:
        score_batch(reward, torch.stack([image] * 3), ['a "OPEN"', "a sign", 'a "OPEX"'], [{}] * 3)
    assert raised.value.failures.keys() == {1} and "has 0 double quotes" in raised.value.failures[1]
    nan = float("nan")
    torch.testing.assert_close(
        raised.value.scores,
        {"remote": torch.tensor([1.0, nan, 0.75]), "ocr_exact": torch.tensor([1.0, nan, 0.0])},
        equal_nan=True,
    )


def test_health_says_what_is_served(served):
    status, tree, _ = served.ask("GET", "/health")
    assert status == 200 and tree["version"] == 1
    assert tree["rewards"] == {
        JPEG: {"requires": [], "range": None},
        "ocr": {"requires": ["quoted_text"], "range": [0.0, 1.0]},
    }
    assert tree["load"] == {"admitted": 0, "scoring": 0, "workers": 1, "queue": 119}
    assert tree["limits"] == {"body_bytes": 4 * 2**20, "pixels": 2**18, "items": 256}


def test_several_rewards_in_one_request(served):
    tree = question(pictures(2), rewards=[JPEG, "ocr"])
    tree["items"][0]["prompt"] = 'a "B"'
    status, answer, _ = served.score(tree)
    assert status == 200 and answer["request_id"] == "r" and answer["version"] == 1
    assert answer["scores"].keys() == {JPEG, "ocr", "ocr/ocr_exact"}
    assert answer["scores"]["ocr"] == [0.0, None] and answer["errors"].keys() == {"ocr"}
    assert all(score < 0 for score in answer["scores"][JPEG])


def test_images_of_different_sizes_keep_their_places(served):
    images = [pictures(1, side, side)[0] for side in (8, 16, 8, 8, 24)]
    _, answer, _ = served.score(question(images))
    alone = [served.score(question([image]))[1]["scores"][JPEG][0] for image in images]
    assert answer["scores"][JPEG] == alone and len(set(alone)) > 2


@pytest.mark.parametrize("token", ["wrong", "", TOKEN + "x", TOKEN[:-1]])
def test_a_wrong_token_is_refused_everywhere(served, token, monkeypatch):
    sent = {"Authorization": f"Bearer {token}"}
    assert served.ask("GET", "/health", headers=sent)[0] == 401
    status, answer, _ = served.ask("POST", "/v1/score", json.dumps(question(pictures(1))).encode(), sent)
    assert status == 401 and "scores" not in answer


def test_the_client_says_that_its_token_is_wrong_or_missing(served, monkeypatch):
    monkeypatch.setenv("TEST_REWARD_TOKEN", "wrong")
    with pytest.raises(RewardError, match=rf"reward 'remote' .* at {served.url}\): status 401: expected the server's"):
        remote(served)
    with pytest.raises(RewardError, match="status 401"):
        RemoteReward(RemoteOptions(served.url, JPEG))
    monkeypatch.delenv("TEST_REWARD_TOKEN")
    with pytest.raises(ConfigError, match="token_env is 'TEST_REWARD_TOKEN': expected a variable that is set"):
        remote(served)


BAD_REQUESTS = {
    "version": ({"version": 2}, "version 2, expected 1"),
    "version as a truth": ({"version": True}, "version True, expected 1"),
    "unknown reward": ({"rewards": ["ocrr"]}, "no reward 'ocrr' is served; did you mean 'ocr'"),
    "no reward": ({"rewards": []}, "expected a list of names"),
    "reward twice": ({"rewards": [JPEG, JPEG]}, "expected every name once"),
    "no id": ({"request_id": None}, "request_id is None"),
    "no items": ({"items": []}, "expected a list of 1 to 256"),
    "too many items": ({"items": [{}] * 257}, "items is 257"),
    "item": ({"items": [3]}, r"items[0] is 3: expected an object"),
    "prompt": ({"items": [{"prompt": 3, "metadata": {}, "image_b64": ""}]}, "items[0].prompt is 3: expected a text"),
    "metadata": ({"items": [{"prompt": "", "metadata": [], "image_b64": ""}]}, "items[0].metadata is []"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_reason(served, case):
    changes, reason = BAD_REQUESTS[case]
    status, answer, _ = served.score(question(pictures(1), **changes))
    assert status == 400 and reason in answer["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"version": NaN}', b"\xff\xfe", b"[" * 10**6])
def test_a_body_that_is_no_request_is_refused(served, body):
    status, answer, _ = served.ask("POST", "/v1/score", body)
    assert status == 400 and "the message" in answer["error"]


def test_only_json_is_taken(served):
    # what a web page can make a browser send
    body = json.dumps(question(pictures(1))).encode()
    assert served.ask("POST", "/v1/score", body, {"Content-Type": "text/plain"})[0] == 415


def bad_images() -> dict[str, tuple[bytes, str]]:
    pixels = zlib.compress(bytes(8 * (1 + 8 * 3)))
    good = encode_png(pictures(1)[0])
    return {
        "bomb": (png(header(60000, 60000), chunk(b"IDAT", pixels)), "is 60000x60000: expected 1 to 262144 pixels"),
        "just too large": (encode_png(torch.rand(3, 513, 512)), "is 512x513"),
        "second header": (png(header(8, 8), header(9000, 9000), chunk(b"IDAT", pixels)), "not what its header says"),
        "bomb of text": (
            png(header(8, 8), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))), chunk(b"IDAT", pixels)),
            "cannot be decoded",
        ),
        "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "no PNG"),
        "empty": (b"", "no PNG"),
        "truncated": (good[: len(good) // 2], "cannot be decoded"),
        "grey": (png(header(8, 8, color=0), chunk(b"IDAT", pixels)), "colour type 0"),
        "deep": (png(header(8, 8, depth=16), chunk(b"IDAT", pixels)), "bit depth 16"),
        "no pixels": (png(header(0, 8), chunk(b"IDAT", pixels)), "is 0x8"),
        "black": (png(header(8, 8), chunk(b"IDAT", pixels)), "exactly black"),
    }


def test_a_bad_image_is_the_fault_of_its_item(served):
    bad, good = bad_images(), pictures(2)
    tree = question(good[:1])
    entries = [{"prompt": "", "metadata": {}, "image_b64": base64.b64encode(data).decode()} for data, _ in bad.values()]
    broken = {"prompt": "", "metadata": {}, "image_b64": "no base64!"}
    tree["items"] += [*entries, broken, *question(good[1:])["items"]]
    status, answer, _ = served.score(tree)
    assert status == 200
    scores, errors = answer["scores"][JPEG], answer["errors"][JPEG]
    expected = [served.score(question(good[i : i + 1]))[1]["scores"][JPEG][0] for i in range(2)]
    assert [scores[0], scores[-1]] == expected and scores[1:-1] == [None] * (len(bad) + 1)
    assert errors.keys() == {str(i) for i in range(1, len(bad) + 2)}
    for position, (name, (_, reason)) in enumerate(bad.items(), start=1):
        assert reason in errors[str(position)], (name, errors[str(position)])
    assert "not base64" in errors[str(len(bad) + 1)]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_cap_is_refused_whether_it_says_so_or_not(served, declared):
    body = b" " * (5 * 2**20)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        # an iterable travels in chunks, without a length
        connection.request("POST", "/v1/score", body if declared else (body[i::5] for i in range(5)), headers)
        response = connection.getresponse()
        assert response.status == 413 and b"larger than 4194304 bytes" in response.read()


def test_the_client_stops_at_a_413(served):
    with pytest.raises(RewardError, match="items 0 to 7 of 8: status 413: .*send fewer images in one request"):
        score_batch(remote(served), pictures(8, 512), [""] * 8, [{}] * 8)


def partial_request(server: Served, length: int = 100) -> socket.socket:
    """A connection whose request has begun, with half of its body still to come."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + b" " * (length // 2))
    return connection


def test_a_body_that_does_not_come_is_waited_for_so_long(served):
    began = time.monotonic()
    with partial_request(served) as connection:
        # meanwhile others are served
        assert len(score_batch(remote(served), pictures(3), [""] * 3, [{}] * 3)["remote"]) == 3
        assert time.monotonic() - began < 1.5
        assert b" 408 " in connection.recv(100)
    assert 1.5 < time.monotonic() - began < 4


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_head_in_pieces_is_waited_for_so_long(served, before):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.settimeout(0.2)
        connection.sendall(before)
        with pytest.raises(OSError, match="(?i)reset|broken pipe|aborted"):
            while True:
                connection.sendall(b"P" if b"P" not in before else b"O")
                with contextlib.suppress(TimeoutError):
                    while connection.recv(1000):
                        pass
                    raise ConnectionResetError("reset: the end was read")
                assert time.monotonic() - began < 5
    assert 1.5 < time.monotonic() - began


def test_full_is_503_with_retry_after_and_the_client_waits_for_its_place(served):
    with contextlib.ExitStack() as stack:
        for _ in range(120):  # one worker and the queue
            stack.enter_context(partial_request(served))
        deadline = time.monotonic() + 1.5
        while served.ask("GET", "/health")[1]["load"]["admitted"] < 120:
            assert time.monotonic() < deadline
        status, answer, headers = served.score(question(pictures(1)))
        assert status == 503 and "all 120 places are taken" in answer["error"]
        assert 1 <= int(headers["retry-after"]) <= 60
        # the places are free again once the bodies are overdue
        assert len(score_batch(remote(served), pictures(2), [""] * 2, [{}] * 2)["remote"]) == 2
    assert served.ask("GET", "/health")[1]["load"]["admitted"] == 0


def test_a_client_that_leaves_gives_its_place_back(served):
    for _ in range(3):
        partial_request(served).close()
    end = time.monotonic() + 1.5
    while served.ask("GET", "/health")[1]["load"]["admitted"] > 0:
        assert time.monotonic() < end
    assert len(score_batch(remote(served), pictures(2), [""] * 2, [{}] * 2)["remote"]) == 2


def test_unknown_routes_and_methods(served):
    assert served.ask("GET", "/v1/score")[0] == 405
    assert served.ask("GET", "/docs")[0] == 404
    assert served.ask("GET", "/openapi.json")[0] == 404
