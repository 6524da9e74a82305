"""Recomputation changes memory and nothing else: same predictions, same gradients, whatever adapter is chosen later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from crd_fast.acceleration import recompute
from crd_fast.acceleration.attention import use_attention
from crd_fast.acceleration.compilation import compile_blocks
from crd_fast.acceleration.precision import apply_precisions
from crd_fast.acceleration.recompute import MODES, checkpoint_blocks
from crd_fast.errors import ConfigError
from crd_fast.lora import LoRABank
from tests.acceleration import BLOCKS, adapted, inputs, transformer

RECOMPUTING = MODES[1:]


def gradients(bank: LoRABank) -> list[Tensor]:
    """Of the trained slot, where there are any: the last block has no text output. Cleared for the next pass."""
    found = [tensor.grad for tensor in bank.tensors("trained") if tensor.grad is not None]
    for tensor in bank.tensors("trained"):
        tensor.grad = None
    assert found and sum(grad.abs().sum() for grad in found) > 0
    return found


def held_after(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The prediction, and the bytes that a forward pass allocates and keeps."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        prediction = forward()
    return prediction, sum(event.self_cpu_memory_usage for event in profile.function_events)


def pass_of(model: Any, bank: LoRABank, rows: int = 4) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with bank.use("trained"):
            return model(**inputs(rows))[0]

    return forward


@pytest.fixture
def model() -> Any:
    return transformer(3, dual=(0,))


@pytest.fixture
def bank(model: Any) -> LoRABank:
    return adapted(model)


def test_gradients_are_the_same_and_memory_falls(model: Any, bank: LoRABank) -> None:
    """The adapter is chosen for the prediction alone: the backward pass, outside, has to choose it again."""
    held, reference = {}, None
    for mode in MODES:
        checkpoint_blocks(model, BLOCKS, mode)
        prediction, held[mode] = held_after(pass_of(model, bank))
        prediction.square().mean().backward()
        found = [prediction.detach(), *gradients(bank)]
        reference = reference or found
        assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True)), mode
    assert held["full"] < 0.25 * held["off"] and held["full"] < held["selective"] < 0.9 * held["off"], held


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_another_adapter_chosen_meanwhile_does_not_leak_in(model: Any, bank: LoRABank, mode: str) -> None:
    checkpoint_blocks(model, BLOCKS, "off")
    pass_of(model, bank)().square().mean().backward()
    expected = gradients(bank)
    checkpoint_blocks(model, BLOCKS, mode)
    loss = pass_of(model, bank)().square().mean()
    with bank.use("old"):
        loss.backward(retain_graph=mode == "full")
        with torch.no_grad():
            after = model(**inputs(2))[0]
    assert all(torch.equal(a, b) for a, b in zip(gradients(bank), expected, strict=True))
    with bank.use("old"), torch.no_grad():
        assert torch.equal(after, model(**inputs(2))[0]), "the choice at the time of the backward pass is back"
    if mode == "full":  # a second backward pass through the same graph
        loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(gradients(bank), expected, strict=True))
    with pytest.raises(RuntimeError, match="no adapter chosen"):
        model(**inputs(2))


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_blocks_are_recomputed_in_the_precision_of_the_prediction(model: Any, bank: LoRABank, mode: str) -> None:
    """A trained pass in FP8 beside an exact reference: outside of predictions, the layers are exact."""
    roles = {"train": "fp8", "old": "fp8", "ref": "fp32", "rollout": "fp32"}
    precisions = apply_precisions(model, BLOCKS, roles)
    results = []
    for role, chosen in (("ref", "off"), ("train", "off"), ("train", mode)):
        checkpoint_blocks(model, BLOCKS, chosen)
        with precisions.use(role):
            prediction = pass_of(model, bank)()
        prediction.square().mean().backward()
        results.append(gradients(bank))
        assert not precisions.fp8
    exact, expected, found = results
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(exact, expected, strict=True)), "the precision matters"


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_passes_without_gradients_are_untouched(
    model: Any, bank: LoRABank, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("checkpointed")

    rows = [("old", 2), ("base", 4)]
    checkpoint_blocks(model, BLOCKS, "off")
    with bank.use(rows), torch.no_grad():
        expected = model(**inputs(6))[0]
    checkpoint_blocks(model, BLOCKS, mode)
    monkeypatch.setattr(recompute, "checkpoint", never)
    with bank.use(rows), torch.no_grad():
        assert torch.equal(model(**inputs(6))[0], expected)
    with pytest.raises(AssertionError, match="checkpointed"):
        pass_of(model, bank)()


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_blocks_are_recomputed_in_the_context_of_predictions(model: Any, bank: LoRABank, mode: str) -> None:
    """Another kernel of attention in the backward pass could differ from the one that made the prediction."""
    entered = []
    order = use_attention(model, "sdpa")

    @contextmanager
    def around() -> Iterator[None]:
        with order():
            entered.append(torch.backends.cuda.math_sdp_enabled())
            yield

    checkpoint_blocks(model, BLOCKS, mode, around)
    with around():
        prediction = pass_of(model, bank)()
    assert entered == [False]
    prediction.square().mean().backward()
    assert entered == [False] * 4, "once for the prediction and once a block"
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_compiled_blocks_recompute_inside_their_graph(mode: str) -> None:
    results, held = [], []
    for chosen in ("off", mode):
        torch._dynamo.reset()
        model = transformer(1)
        bank = adapted(model)
        checkpoint_blocks(model, BLOCKS, chosen)
        counter = compile_blocks(model, BLOCKS, backend="aot_eager")
        for _ in range(2):  # compile, then measure
            prediction, size = held_after(pass_of(model, bank))
            prediction.square().mean().backward()
            found = gradients(bank)
        assert counter.graphs == 1
        results.append([prediction.detach(), *found])
        held.append(size)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert held[1] < (0.4 if mode == "full" else 0.95) * held[0], held


def test_names_stay_and_off_undoes(model: Any) -> None:
    before, kind = list(model.state_dict()), type(model.transformer_blocks[0])
    for mode in ("full", "selective", "off"):
        checkpoint_blocks(model, BLOCKS, mode)
        assert list(model.state_dict()) == before
        kinds = {type(block) for block in model.transformer_blocks}
        assert len(kinds) == 1 and all(issubclass(found, kind) for found in kinds)
        assert (kinds == {kind}) == (mode == "off")


def test_sharded_blocks_are_refused(model: Any) -> None:
    """Their class is fully_shard's: changing it would take the sharding away."""
    block = model.transformer_blocks[1]
    block.__class__ = type("Sharded", (FSDPModule, type(block)), {})
    with pytest.raises(RuntimeError, match="before fully_shard"):
        checkpoint_blocks(model, BLOCKS, "full")


def test_unknown_modes_and_lists_name_the_nearest(model: Any) -> None:
    with pytest.raises(ConfigError, match="unknown recomputation mode 'selectiv'; did you mean 'selective'"):
        checkpoint_blocks(model, BLOCKS, "selectiv")
    with pytest.raises(ConfigError, match="no list of blocks 'transformer_block'; did you mean 'transformer_blocks'"):
        checkpoint_blocks(model, ["transformer_block"], "full")
