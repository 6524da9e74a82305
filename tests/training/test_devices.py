"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from crd_fast import ranks
from crd_fast.errors import ConfigError
from crd_fast.ranks import choose_device


def test_a_device_that_is_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("gpu", "is not known"), ("cpu:x", "is not known"), ("", "is not known"), ("cuda:99", r"cannot be used \(.*\)")],
)
def test_a_device_that_is_not_there(name: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' {wrong}: this machine has cpu"):
        choose_device(name)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """What is made the current GPU, on a machine that seems to have four."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(ranks, "_device", torch.device)
    return current


@pytest.mark.parametrize(
    ("wanted", "local_rank", "device"),
    [(None, "3", "cuda:3"), ("cuda", "3", "cuda:3"), ("cuda", None, "cuda:0"), ("cuda:1", None, "cuda:1")],
)
def test_a_gpu_is_the_ranks_own_and_the_current_one(
    chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch, wanted: str | None, local_rank: str | None, device: str
) -> None:
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_device(wanted) == torch.device(device)
    assert chosen == [torch.device(device)]


def test_one_gpu_for_several_ranks_is_refused(chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"run.device is 'cuda:1' for 2 ranks on this machine: expected 'cuda'"):
        choose_device("cuda:1")
    assert not chosen


@pytest.mark.parametrize("wanted", [None, "cuda", "cuda:0"])
def test_where_each_rank_sees_one_gpu_it_is_that(
    chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch, wanted: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_device(wanted) == torch.device("cuda:0")
    assert chosen == [torch.device("cuda:0")]


def test_more_ranks_than_gpus_are_refused(chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match="6 ranks on this machine, which has 4 GPUs"):
        choose_device(None)
