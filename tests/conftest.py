"""Settings shared by every test: deterministic algorithms, fixed threads, reproducible examples."""

from __future__ import annotations

import importlib.util
import os
import sys

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("crd-fast", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("crd-fast")

torch.set_num_threads(2)
# Besides picking deterministic kernels, this fills fresh tensors with NaN, so an element nobody wrote shows.
torch.use_deterministic_algorithms(True)


def _use_extension(path: str) -> None:
    """Another build of the extension than the installed one; `make sanitize` names its own."""
    spec = importlib.util.spec_from_file_location("crd_fast._C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"CRD_FAST_TEST_EXTENSION={path!r} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["crd_fast._C"] = module


if "CRD_FAST_TEST_EXTENSION" in os.environ:
    _use_extension(os.environ["CRD_FAST_TEST_EXTENSION"])


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Unseeded draws in a test are the same in every run and in any order."""
    torch.manual_seed(0)
