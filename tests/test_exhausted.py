"""Running out of memory or of room on a disk is told in a line; every other error keeps its traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crd_fast import cli

SCORE = ["score", "jpeg_compressibility", "images"]


def full_disk() -> None:
    # a device of Linux with room for nothing
    with Path("/dev/full").open("w") as file:
        file.write("x" * 100_000)


def no_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def behind_another_error() -> None:
    try:
        no_memory()
    except RuntimeError as error:
        raise ValueError("the batch was not made") from error


def a_mistake() -> None:
    raise ValueError("a mistake")


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        pytest.param(
            full_disk,
            "crd-fast: no room is left on the disk ([Errno 28] No space left on device): make some",
            marks=pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full"),
        ),
        (no_memory, "DefaultCPUAllocator: can't allocate memory"),
        (behind_another_error, "crd-fast: out of memory ("),
    ],
)
def test_what_the_machine_lacks_is_told(
    failing: Callable[[], None], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_score", lambda options: failing())
    assert cli.main(SCORE) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_a_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: argparse.Namespace) -> int:
        a_mistake()
        return 0

    monkeypatch.setattr(cli, "_score", run)
    with pytest.raises(ValueError, match="a mistake"):
        cli.main(SCORE)
