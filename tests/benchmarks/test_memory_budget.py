"""The budget of one model beside arithmetic by hand, from its published sizes."""

from __future__ import annotations

import pytest

from benchmarks import memory_budget
from benchmarks.memory_budget import MODELS, Budget, budget

LAYERS, WIDTH, HIDDEN, TEXT, PATCH = 30, 1536, 8960, 4096, 16 * 4  # of Wan2.1 1.3B; a patch is 2x2 of 16 channels
ATTENTION = 8 * WIDTH * WIDTH  # q, k, v and out of attention to the video and of attention to the text
MLP = 2 * WIDTH * HIDDEN


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


@pytest.fixture(scope="module")
def wan() -> Budget:
    return budget(MODELS["Wan2.1 1.3B"])


def test_parameters_and_adapters_are_counted(wan: Budget) -> None:
    block = ATTENTION + 8 * WIDTH + linear(WIDTH, HIDDEN) + linear(HIDDEN, WIDTH)
    block += 4 * WIDTH  # norms of queries and keys
    block += 2 * WIDTH + 6 * WIDTH  # the norm before attention to the text, and the modulation
    time = linear(256, WIDTH) + linear(WIDTH, WIDTH) + linear(WIDTH, 6 * WIDTH)
    words = linear(TEXT, WIDTH) + linear(WIDTH, WIDTH)
    ends = linear(PATCH, WIDTH) + linear(WIDTH, PATCH) + 2 * WIDTH  # patches in and out, the last modulation
    assert wan.parameters == LAYERS * block + time + words + ends
    assert wan.rounded == LAYERS * (ATTENTION + MLP)
    assert wan.scales == LAYERS * (8 * WIDTH + HIDDEN + WIDTH)
    assert wan.adapted == LAYERS * ATTENTION
    assert wan.adapter == LAYERS * 8 * 32 * 2 * WIDTH
    assert wan.embedding == 128 * TEXT


def test_bytes_follow_from_the_counts() -> None:
    found = Budget(parameters=1000, buffers=10, rounded=600, scales=20, adapter=50, adapted=400, embedding=7)
    assert found.bf16 == 2020
    assert found.both == 2020 + 600 + 4 * 20
    assert found.fp8 == 2 * 410 + 600 + 4 * 20
    assert found.bank == 4 * 50 * (3 + 2 + 1 + 3 + 2)
    assert found.merged == 800
    assert found.prompts == 2 * 7 * 1000
    assert found.copies == 1010 * (2 + 3 * 4)
    assert found.full(1) == 1000 * (2 + 3 * 4 + 2 * 4 + 4) + 10 * (2 + 3 * 4)
    assert found.start(8) == 2020 + 2 * 1000 / 8
    assert found.full(8) == 1000 * 26 / 8 + 10 * 14


def test_the_command_prints_a_row_for_every_model(
    wan: Budget, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_budget, "MODELS", {"Wan2.1 1.3B": MODELS["Wan2.1 1.3B"]})
    assert memory_budget.main(["--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| Wan2.1 1.3B |")]
    assert len(rows) == 2 and f"| {wan.bf16 / 1e9:.1f} |" in rows[0] and f"| {wan.full(1) / 1e9:.1f} |" in rows[1]
