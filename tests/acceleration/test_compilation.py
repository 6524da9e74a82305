"""Blocks compile once for every way of running them, share code, and compute what they computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from crd_fast import backbones
from crd_fast.acceleration import compilation
from crd_fast.acceleration.attention import use_attention
from crd_fast.acceleration.compilation import RECOMPILE_LIMIT, compile_blocks
from crd_fast.errors import ConfigError
from crd_fast.lora import LoRABank
from crd_fast.snapshots import OLD, SAMPLING
from tests import pipelines
from tests.acceleration import BLOCKS, adapted, inputs, transformer

LIMITS = ("recompile_limit", "fail_on_recompile_limit_hit", "cache_size_limit", "fail_on_cache_limit_hit")


@pytest.fixture(autouse=True)
def _own_compiler_state() -> Iterator[None]:
    config = torch._dynamo.config
    with config.patch({name: getattr(config, name) for name in LIMITS if hasattr(config, name)}):
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def test_a_training_step_compiles_once(tmp_path: Path) -> None:
    """Rollout with merged weights, old and reference rows in one pass, trained pass: two kinds of blocks, two graphs
    each. New weights, new snapshots, new row plans with the same numbers: none."""
    family = pipelines.family("sd3")
    backbone = backbones.load(str(family.save(tmp_path)), options=family.OPTIONS)
    bank = LoRABank(backbone.transformer, backbone.lora_targets, rank=2, alpha=2.0, seed=0)
    prompts = backbone.encode_prompts(["a", "b", "c"])
    counter = compile_blocks(backbone.transformer, backbone.block_lists, backend="eager")

    def predict(rows: int) -> Tensor:
        x, sigma = torch.randn(rows, *backbone.latent_shape), torch.rand(rows)
        return backbone.predict(x, sigma, prompts[torch.arange(rows) % len(prompts)])

    def step() -> list[int]:
        graphs = []
        with bank.merged(SAMPLING):
            predict(4)
        graphs.append(counter.graphs)
        with torch.no_grad(), bank.use([("old", 3), ("base", 6)]):
            predict(9)
        graphs.append(counter.graphs)
        with bank.use("trained"):
            prediction = predict(3)
        prediction.square().mean().backward()
        graphs.append(counter.graphs)
        with torch.no_grad():
            for tensor in bank.tensors("trained"):
                tensor.sub_(0.1 * tensor.grad)
                tensor.grad = None
        bank.update_snapshot(OLD, 0.5)
        bank.update_snapshot(SAMPLING, 0.0)
        return graphs

    assert step() == [2, 4, 6]
    counter.mark_warm()
    assert step() == step() == [6, 6, 6] and counter.recompiles == 0
    with bank.use("trained"), torch.no_grad():
        predict(5)
    assert counter.recompiles == 2, "the counter sees a new shape"


def test_blocks_of_one_kind_share_their_graphs() -> None:
    """Three kinds: the first block gets an image that has no gradient yet, the last has no text output."""
    model = transformer(6)
    bank = adapted(model)
    use_attention(model, "native")
    counter = compile_blocks(model, BLOCKS, backend="eager")
    with torch.no_grad(), bank.use("old"):
        model(**inputs(2))
    assert counter.graphs == 2
    with bank.use("trained"):
        model(**inputs(2))
    assert counter.graphs == 2 + 3


class Block(nn.Module):
    """Small enough for the real compiler in a test."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.project(self.norm(x)))


class Stack(nn.Module):
    def __init__(self, width: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def adapter_gradients(bank: LoRABank) -> list[Tensor]:
    """Of the trained slot, where there are any: the last block has no text output. Cleared for the next pass."""
    found = [tensor.grad for tensor in bank.tensors("trained") if tensor.grad is not None]
    for tensor in bank.tensors("trained"):
        tensor.grad = None
    assert found
    return found


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    """Predictions of mixed rows without gradients, of the trained adapter, and its gradients.

    The real compiler gets a small model, because it takes long over a transformer's block on two cores.
    """
    torch.manual_seed(0)
    if backend == "inductor":
        model: nn.Module = Stack(32, blocks=1)
        bank = LoRABank(model, ["project"], rank=2, alpha=4.0, seed=0)
        arguments: dict[str, Any] = {"x": torch.randn(3, 8, 32)}
        lists = ["blocks"]
        with torch.no_grad():
            for tensor in (*bank.tensors("trained"), *bank.tensors("old")):
                tensor.normal_(std=0.3)
    else:
        model = transformer(1)
        bank, arguments, lists = adapted(model), inputs(3), list(BLOCKS)

    def run() -> list[Tensor]:
        with torch.no_grad(), bank.use([("old", 1), ("base", 2)]):
            mixed = model(**arguments)
        with bank.use("trained"):
            prediction = model(**arguments)
        if isinstance(prediction, tuple):
            (mixed,), (prediction,) = mixed, prediction
        prediction.square().mean().backward()
        return [mixed, prediction.detach(), *adapter_gradients(bank)]

    eager, names = run(), list(model.state_dict())
    counter = compile_blocks(model, lists, backend=backend)
    compiled = run()
    assert counter.graphs == 2 and list(model.state_dict()) == names
    for ours, reference in zip(compiled, eager, strict=True):
        # fp32 rounding of sums in another order, relative to the largest value
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-6 * reference.abs().max().item())


class Printing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_too_many_graphs_are_an_error_and_not_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIMITS[::2]:
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 2)
    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", 3)
    model = Stack()
    counter = compile_blocks(model, ["blocks"], backend="eager")
    with torch.no_grad():
        for rows in range(2, 5):
            model(torch.randn(rows, 4))
        assert counter.graphs == 3
        with pytest.raises(Exception, match="limit"):
            model(torch.randn(9, 4))


def test_a_graph_that_breaks_is_an_error() -> None:
    model = Stack()
    model.blocks[1] = Printing()
    compile_blocks(model, ["blocks"], backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("before, after", [(8, RECOMPILE_LIMIT), (100, 100)])
def test_the_limit_is_raised_and_never_lowered(before: int, after: int) -> None:
    config: Any = torch._dynamo.config
    name = LIMITS[0] if hasattr(config, LIMITS[0]) else LIMITS[2]
    fail = LIMITS[1] if hasattr(config, LIMITS[1]) else LIMITS[3]
    setattr(config, name, before)
    compile_blocks(Stack(), ["blocks"], backend="eager")
    assert getattr(config, name) == after and getattr(config, fail)


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no list of blocks 'block'; did you mean 'blocks'"):
        compile_blocks(Stack(), ["block"])
    with pytest.raises(ConfigError, match="unknown compile backend 'inducter'; did you mean 'inductor'"):
        compile_blocks(Stack(), ["blocks"], backend="inducter")
