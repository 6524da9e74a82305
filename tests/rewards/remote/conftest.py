"""One reward server and one faulty server for all tests of this folder that leave them as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rewards.remote.servers import TOKEN, Served, faulty_server, reward_server

pytest.importorskip("fastapi", reason="the server needs crd-fast[serve]")
pytest.importorskip("uvicorn", reason="the server needs crd-fast[serve]")


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    limits = ["--max-body-mb", "4", "--max-pixels", str(512 * 512), "--body-seconds", "2", "--queue", "119"]
    with reward_server("jpeg_compressibility", "ocr", *limits) as server:
        yield server


@pytest.fixture(scope="session")
def faulty() -> Iterator[Served]:
    with faulty_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
