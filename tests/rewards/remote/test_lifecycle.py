"""A server's start, its end, and the loss of the process that scores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from crd_fast import cli
from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import registry
from crd_fast.rewards.base import BrokenRewardError, score_batch
from crd_fast.rewards.remote.client import RemoteOptions, RemoteReward
from crd_fast.rewards.remote.serve_settings import ServeSettings
from tests.rewards.remote.servers import NEEDS_PROC, Served, pictures, reward_server, until

PROMPT = 'a sign that says "OPEN"'


class Background(threading.Thread):
    """Reads `count` noisy images, far more than a moment's work, in one request."""

    def __init__(self, server: Served, count: int, **options: object) -> None:
        super().__init__(daemon=True)
        self.reward = RemoteReward(RemoteOptions(server.url, "ocr", batch=count, **options))
        self.count = count
        self.scores: torch.Tensor | None = None
        self.error: RewardError | None = None

    def run(self) -> None:
        try:
            images = pictures(self.count, 128)
            self.scores = score_batch(self.reward, images, [PROMPT] * self.count, [{}] * self.count)["remote"]
        except RewardError as error:
            self.error = error


def start(server: Served, count: int, **options: object) -> Background:
    thread = Background(server, count, **options)
    thread.start()
    until(lambda: server.ask("GET", "/health")[1]["load"]["scoring"] == 1)
    return thread


@pytest.fixture(scope="module")
def patient() -> Iterator[Served]:
    with reward_server("ocr", token=None) as server:
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[Served]:
    with reward_server("ocr", "--score-seconds", "1.5", "--grace-seconds", "0.2", token=None) as server:
        yield server


def test_the_start_says_where_and_what(patient):
    assert patient.output == f"crd-fast: serving ocr at {patient.url} (workers 1, queue 256, token no)\n"


def test_rewards_of_shapes_are_served():
    """They are tried out on an item of their own world, and score as they do here."""
    rows = [{"prompt": "a red circle", "include": [{"class": "circle", "count": 1, "color": "red"}]}]
    images = pictures(1, 64)
    with reward_server("geneval", "shapes_judge", token=None) as server:
        for name in ("geneval", "shapes_judge"):
            client = RemoteReward(RemoteOptions(server.url, name))
            here = registry.build(name, registry.options_type(name)())
            served = score_batch(client, images, [rows[0]["prompt"]], rows)["remote"]
            torch.testing.assert_close(served, score_batch(here, images, [rows[0]["prompt"]], rows)[name])


@NEEDS_PROC
def test_a_worker_that_is_killed_costs_its_request_and_is_replaced(patient):
    (worker,) = patient.workers()
    thread = start(patient, 16, attempts=1)
    os.kill(worker, signal.SIGKILL)
    thread.join(10)
    assert "items 0 to 15 of 16: status 500: the process that scored died (exit code -9)" in str(thread.error)
    assert thread.scores is None
    images = pictures(2, 128)
    assert score_batch(thread.reward, images, [PROMPT] * 2, [{}] * 2)["remote"].tolist() == [0.0, 0.0]
    (successor,) = patient.workers()
    assert successor != worker


@NEEDS_PROC
def test_sigterm_stops_admission_and_finishes_the_work(patient):
    (worker,) = patient.workers()
    thread = start(patient, 16)
    patient.process.send_signal(signal.SIGTERM)
    until(lambda: refused(patient))
    assert thread.is_alive()  # else it was finished before the end began
    thread.join(30)
    assert thread.error is None and thread.scores.tolist() == [0.0] * 16
    assert patient.process.wait(10) == 0
    until(lambda: not os.path.exists(f"/proc/{worker}"))


def refused(server: Served) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except OSError:
        return True
    return False


def test_scoring_that_takes_too_long_is_ended(hasty):
    began = time.monotonic()
    thread = start(hasty, 200, attempts=1)
    thread.join(10)
    assert "status 500: scoring took longer than 1.5 s; the process was ended" in str(thread.error)
    assert time.monotonic() - began < 8


def test_sigterm_does_not_wait_for_ever(hasty):
    thread = start(hasty, 200, timeout_seconds=8)
    began = time.monotonic()
    hasty.process.send_signal(signal.SIGTERM)
    assert hasty.process.wait(5) == 0
    thread.join(5)
    assert thread.scores is None and "reward 'remote' ('ocr' at" in str(thread.error)
    assert time.monotonic() - began < 5


def test_a_missing_model_ends_the_start(tmp_path, capfd):
    options = tmp_path / "options.yaml"
    options.write_text(f"clipscore: {{model: {tmp_path / 'nothing'}}}\n")
    assert cli.main(["serve-reward", "clipscore", "--port", "0", "--options", str(options)]) == 2
    said = capfd.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert "crd-fast: " in said.err and str(tmp_path / "nothing") in said.err
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ocrr"], "unknown reward 'ocrr'; did you mean 'ocr'"),
        (["ocr", "--host", "0.0.0.0"], "--host is '0.0.0.0', which others can reach: give a token"),
        (["ocr", "--workers", "0"], "--workers is 0: expected at least 1"),
        (["ocr", "--queue", "-1"], "--queue is -1: expected at least 0"),
        (["ocr", "--port", "70000"], "--port is 70000"),
        (["ocr", "--max-body-mb", "nan"], "--max-body-mb is nan"),
        (["ocr", "--token-file", "/nonexistent"], "token file /nonexistent cannot be read"),
        (["ocr", "--token-file", "/dev/null"], "token file /dev/null holds no token"),
    ],
)
def test_wrong_settings_are_refused_at_once(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("CRD_FAST_REWARD_TOKEN", raising=False)
    assert cli.main(["serve-reward", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jpeg_compressibility: {}", "which is not served; valid names: ocr"),
        ("ocr: {min_sides: 3}", "unknown key ocr.min_sides; did you mean 'min_side'"),
        ("ocr: {min_side: 3}", "OCR min_side is 3"),
        ("[", "is not valid YAML"),
    ],
)
def test_wrong_options_are_refused_at_once(text, message, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert cli.main(["serve-reward", "ocr", "--options", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_an_address_in_use_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve-reward", "ocr", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_names_its_extra(package, monkeypatch, capsys):
    for name in list(sys.modules):
        if name == "crd_fast.rewards.remote.server":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["serve-reward", "ocr"]) == 2
    assert 'pip install "crd-fast[serve]"' in capsys.readouterr().err


def test_settings_need_a_reward():
    with pytest.raises(ConfigError, match="no rewards to serve"):
        ServeSettings({})


def test_an_error_in_a_rewards_own_code_is_told_once_and_never_an_items(tmp_path):
    """Neither masked as one item's failure nor asked for again."""
    source = tmp_path / "fragile.py"
    source.write_text("def fragile(images, prompts, metadata):\n    return [1 / (len(p) - 3) for p in prompts]\n")
    options = tmp_path / "options.yaml"
    options.write_text(f"custom:fragile:\n  source: {source}:fragile\n")
    with reward_server("custom:fragile", "--options", str(options), token=None) as server:
        client = RemoteReward(RemoteOptions(server.url, "custom:fragile", attempts=3))
        prompts = ["four", "seven..", "abc", "x"]
        with pytest.raises(BrokenRewardError, match=r"status 424.*fragile\.py:2.*ZeroDivisionError") as caught:
            score_batch(client, pictures(4, 64), prompts, [{}] * 4)
        assert "attempt" not in str(caught.value)
        assert score_batch(client, pictures(1, 64), ["four"], [{}])["remote"].tolist() == [1.0]


def test_a_reward_that_nothing_of_the_servers_own_fits_is_served_untried(tmp_path, capfd):
    source = tmp_path / "styles.py"
    source.write_text(
        "class Style:\n    requires = {'style'}\n    range = (0, 1)\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        return [float(entry['style'] == 'red') for entry in metadata]\n"
        "def faces(images, prompts, metadata):\n    return [float('nan') if 'A' in p else 1.0 for p in prompts]\n"
    )
    options = tmp_path / "options.yaml"
    options.write_text(f"custom:s: {{source: '{source}:Style'}}\ncustom:f: {{source: '{source}:faces'}}\n")
    with reward_server("custom:s", "custom:f", "--options", str(options), "--workers", "2", token=None) as server:
        client = RemoteReward(RemoteOptions(server.url, "custom:s"))
        assert client.requires == {"style"} and client.range == (0, 1)
        entries = [{"style": "red"}, {"style": "blue"}]
        assert score_batch(client, pictures(2), ["p"] * 2, entries)["remote"].tolist() == [1.0, 0.0]
        assert score_batch(RemoteReward(RemoteOptions(server.url, "custom:f")), pictures(1), ["p"], [{}])
    told = capfd.readouterr().err
    assert told.count("custom:s was not tried out: no item of the server's own is one that it can score (style)") == 1
    assert "custom:f was not tried out" not in told
