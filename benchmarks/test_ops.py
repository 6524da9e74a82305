"""pytest-benchmark entry points of the registry: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.registry import DTYPES, WORKLOADS

SHAPE = (24, 16, 64, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("side", ["eager", "crd_fast"])
def test_operation(benchmark: Any, name: str, dtype: str, side: str) -> None:
    benchmark.group = f"{name} {dtype} {'x'.join(map(str, SHAPE))}"
    work = WORKLOADS[name](SHAPE, DTYPES[dtype], torch.device("cpu"))
    work.check()
    benchmark({"eager": work.eager, "crd_fast": work.ours}[side])
