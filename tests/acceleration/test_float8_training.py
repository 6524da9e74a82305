"""Full fine-tuning in FP8: torchao's real layers on the CPU where it is installed, and what is said where it is not."""

from __future__ import annotations

import builtins
import math
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from crd_fast.acceleration.float8_training import convert_for_full_finetuning
from crd_fast.acceleration.noise_ratio import gradient_cosine
from crd_fast.errors import ConfigError

# two factors rounded to e4m3, see test_fp8; torchao rounds scales down to powers of two, which moves the largest of a
# row by up to a factor of two and leaves the relative error
RMS = math.sqrt(2) * 2**-3 / math.sqrt(12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(64, 128)
        self.up = nn.Linear(64, 128)
        self.odd = nn.Linear(64, 72)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


def model() -> Model:
    torch.manual_seed(0)
    return Model().bfloat16()


def step(run: Any) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 4, 8, 64, generator=generator).bfloat16()
    prediction = run(x)
    run.zero_grad()
    (prediction.float() - target.float()).square().mean().backward()
    return prediction.detach().float(), [p.grad for p in run.parameters() if p.grad is not None]


def test_layers_of_the_blocks_train_in_fp8() -> None:
    plain, fp8 = model(), model()
    before = dict(fp8.named_parameters())
    names = convert_for_full_finetuning(fp8, ("blocks",))
    assert names == [f"blocks.{i}.{layer}" for i in range(2) for layer in ("up", "down")]
    converted = [name for name, module in fp8.named_modules() if type(module).__name__ == "Float8Linear"]
    assert converted == names
    assert {name: id(p) for name, p in fp8.named_parameters()} == {name: id(p) for name, p in before.items()}

    (exact, exact_gradient), (found, gradient) = step(plain), step(fp8)
    error = (found - exact).norm() / exact.norm()
    assert 1e-3 < error < 2 * RMS
    assert len(gradient) == len(exact_gradient) == 10  # of proj_out, and of up and down of both blocks
    assert 0.99 < gradient_cosine(gradient, exact_gradient) < 1 - 1e-5

    torch._dynamo.reset()
    compiled, compiled_gradient = step(torch.compile(fp8, fullgraph=True))
    assert (compiled - exact).norm() / exact.norm() < 2 * RMS
    assert gradient_cosine(compiled_gradient, exact_gradient) > 0.99


def test_frozen_copies_convert_too() -> None:
    trained, old = model(), model().requires_grad_(False)
    for copy in (trained, old):
        convert_for_full_finetuning(copy, ("blocks",))
    x = torch.randn(4, 8, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(trained(x), old(x))


def test_what_cannot_be_converted_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'blocks'"):
        convert_for_full_finetuning(model(), ("block",))
    with pytest.raises(ConfigError, match="keep is empty"):
        convert_for_full_finetuning(model(), ("blocks",), keep=())
    with pytest.raises(
        ConfigError, match="2 named like 'norm', 2 named like 'up', 2 with a size .*, 2 named like 'do'"
    ):
        convert_for_full_finetuning(model(), ("blocks",), keep=("up", "do", "norm"))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "torchao":
            raise ModuleNotFoundError("No module named 'torchao'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    untouched = model()
    with pytest.raises(ConfigError, match=r"No module named 'torchao'\): pip install 'crd-fast\[fp8\]'"):
        convert_for_full_finetuning(untouched, ("blocks",))
    assert all(type(module).__name__ != "Float8Linear" for module in untouched.modules())
