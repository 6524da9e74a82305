"""Settings shared by every test: deterministic algorithms, fixed threads, reproducible examples."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("crd-fast", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("crd-fast")

torch.set_num_threads(2)
# Besides picking deterministic kernels, this fills fresh tensors with NaN, so an element nobody wrote shows.
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Unseeded draws in a test are the same in every run and in any order."""
    torch.manual_seed(0)
