"""Devices by name."""

from __future__ import annotations

import pytest
import torch

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
