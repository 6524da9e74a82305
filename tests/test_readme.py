from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_and_has_a_gradient() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(block.replace("16, 64, 64", "4, 8, 8"), names)
    f_theta = names["f_theta"]
    assert isinstance(f_theta, torch.Tensor) and f_theta.grad is not None
    assert torch.isfinite(f_theta.grad).all() and f_theta.grad.abs().sum() > 0


def test_files_and_folders_it_names_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"\b(?:recipes|models|examples)/[\w./-]+\w", README
    ):
        assert (Path(__file__).parents[1] / name).exists(), name
