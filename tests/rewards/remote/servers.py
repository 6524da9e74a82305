"""Servers as processes, and what tests say to them."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crd_fast.rewards.remote.png import encode_png

TOKEN = "a token of the tests"
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes through /proc")


def pictures(count: int, side: int = 24, seed: int = 0) -> Tensor:
    """Noise (count, 3, side, side) that 8 bits hold exactly, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).float() / 255


def question(images: Tensor, reward: str = "jpeg_compressibility", **changes: Any) -> dict[str, Any]:
    """A score request as JSON has it, some entries changed."""
    items = [
        {"prompt": "", "metadata": {}, "image_b64": base64.b64encode(encode_png(image)).decode()} for image in images
    ]
    return {"version": 1, "request_id": "r", "rewards": [reward], "items": items} | changes


@dataclass
class Served:
    """A server's process and port; `output` is what it printed up to its start."""

    process: subprocess.Popen[str]
    port: int
    output: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """Status, JSON and headers of an answer; a right token and content type unless given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | dict(headers or {})
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return response.status, json.loads(response.read()), dict(response.headers)

    def score(self, tree: Mapping[str, Any]) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        return self.ask("POST", "/v1/score", json.dumps(tree).encode())

    def workers(self) -> list[int]:
        """Process ids of the children, but the resource tracker."""
        return [
            pid for pid in _children(self.process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def peak_bytes(self) -> int:
        """The largest resident size that the server's own process ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def _children(pid: int) -> list[int]:
    # each thread lists what it started
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in lists for child in children]


@contextlib.contextmanager
def reward_server(*arguments: str, token: str | None = TOKEN) -> Iterator[Served]:
    """`crd-fast serve-reward` at a free port, ready; killed at the end if it is still there."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("CRD_FAST_REWARD_TOKEN", None)
    if token is not None:
        environment["CRD_FAST_REWARD_TOKEN"] = token
    process = subprocess.Popen(
        [sys.executable, "-m", "crd_fast", "serve-reward", *arguments, "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with _ended(process):
        line = first_line(process, 60)
        found = re.search(r"http://\S+:(\d+)", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line!r}")
        yield Served(process, int(found[1]), line)


@contextlib.contextmanager
def faulty_server() -> Iterator[Served]:
    script = Path(__file__).with_name("faulty_server.py")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    with _ended(process):
        line = first_line(process, 20)
        yield Served(process, int(line), line)


def first_line(process: subprocess.Popen[str], seconds: float) -> str:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], seconds)[0]:
        raise RuntimeError(f"the process printed nothing in {seconds} s")
    return process.stdout.readline()


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for a condition that must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
