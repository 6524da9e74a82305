"""Models shared between rewards: one copy, freed with its last reward, offloaded when all of them say so."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import nn

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards import RewardSpec, registry
from crd_fast.rewards.models import ModelOptions, SharedModel, missing_files

DEVICE = "cpu:0"  # where models run, told apart from "cpu", where they wait


class Travelling(nn.Linear):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.trips: list[str] = []

    def to(self, *args: Any, **settings: Any) -> Travelling:
        self.trips.append(str(args[0]))
        return super().to(*args, **settings)


def loader() -> tuple[list[str], Any]:
    sources: list[str] = []

    def load(source: str) -> Travelling:
        sources.append(source)
        return Travelling()

    return sources, load


def test_equal_models_are_one(tmp_path):
    sources, load = loader()
    first, second = (SharedModel("linear", ModelOptions(str(tmp_path), "cpu", batch_size=n), load) for n in (1, 2))
    roundabout = SharedModel("linear", ModelOptions(str(tmp_path / "x" / ".."), "cpu"), load)
    (tmp_path / "x").mkdir()
    assert sources == []  # until the first use
    assert first.module() is second.module() and len(sources) == 1
    assert SharedModel("linear", ModelOptions(f"{tmp_path}/x/..", "cpu"), load).module() is first.module()
    assert roundabout.module().weight.dtype == torch.float32


def test_other_models_are_not():
    sources, load = loader()
    options = ModelOptions("m", "cpu")
    models = [
        SharedModel("linear", options, load),
        SharedModel("other", options, load),
        SharedModel("linear", ModelOptions("n", "cpu"), load),
        SharedModel("linear", ModelOptions("m", "cpu", dtype="bf16"), load),
        SharedModel("linear", ModelOptions("m", DEVICE), load),
    ]
    assert len({id(model.module()) for model in models}) == len(sources) == 5
    assert models[3].module().weight.dtype == torch.bfloat16


def test_the_model_is_frozen_and_in_evaluation_mode():
    module = SharedModel("linear", ModelOptions("m", "cpu"), loader()[1]).module()
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_the_model_goes_with_its_last_reward():
    sources, load = loader()
    first, second = (SharedModel("linear", ModelOptions("m", "cpu"), load) for _ in range(2))
    module = weakref.ref(first.module())
    assert second.module() is module()
    del first
    gc.collect()
    assert module() is second.module()
    del second
    gc.collect()
    assert module() is None
    SharedModel("linear", ModelOptions("m", "cpu"), load).module()
    assert sources == ["m", "m"]


def trips(model: SharedModel[Travelling]) -> list[str]:
    seen = list(model.module().trips)
    model.module().trips.clear()
    return seen


def test_an_offloaded_model_comes_for_each_call():
    model = SharedModel("linear", ModelOptions("m", DEVICE, offload=True), loader()[1])
    assert trips(model) == ["torch.float32"]
    with model.on_device() as module, model.on_device() as again:
        assert module is again and trips(model) == [DEVICE, DEVICE]
    assert trips(model) == ["cpu"]  # once, when nobody is at work with it
    with pytest.raises(RuntimeError, match="inside"), model.on_device():
        raise RuntimeError("inside")
    assert trips(model) == [DEVICE, "cpu"]


def test_a_model_stays_if_one_of_its_rewards_keeps_it():
    load = loader()[1]
    passing = SharedModel("linear", ModelOptions("m", DEVICE, offload=True), load)
    keeping = SharedModel("linear", ModelOptions("m", DEVICE), load)
    with passing.on_device():
        pass
    assert trips(passing)[-1] == "cpu"
    with keeping.on_device():
        pass
    with passing.on_device():
        pass
    assert "cpu" not in trips(passing)


def test_threads_load_once_and_share():
    sources, load = loader()
    model, barrier = SharedModel("linear", ModelOptions("m", DEVICE, offload=True), load), Barrier(4)

    def use(_: int) -> list[str]:
        with model.on_device() as module:
            barrier.wait()  # all are at work
            seen = list(module.trips)
            barrier.wait()
            return seen

    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(use, range(4)))
    assert len(sources) == 1
    assert seen == [["torch.float32", *[DEVICE] * 4]] * 4
    assert trips(model).count("cpu") == 1


def test_autocast_is_off_inside():
    model = SharedModel("linear", ModelOptions("m", "cpu"), loader()[1])
    with torch.autocast("cpu", dtype=torch.bfloat16), model.on_device() as module:
        assert module(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_model_leaves_the_gpu():
    model = SharedModel("linear", ModelOptions("m", "cuda", offload=True), loader()[1])
    assert model.module().weight.device.type == "cpu"
    with model.on_device() as module:
        assert module.weight.is_cuda
    assert model.module().weight.device.type == "cpu"


@pytest.mark.parametrize("error", [OSError("no such file"), ValueError("no such file")])
def test_missing_files_become_reward_errors(error):
    def load(source: str) -> nn.Module:
        raise error

    model = SharedModel("linear", ModelOptions("some/model", "cpu"), load)
    with pytest.raises(RewardError, match=r"'some/model' cannot be loaded: no such file.*hf download some/model"):
        model.module()


def test_missing_packages_become_reward_errors():
    with pytest.raises(RewardError, match=r"'m' needs a package that is missing .*pip install 'crd-fast\[rewards\]'"):
        with missing_files("m"):
            import not_a_package  # noqa: F401


def test_what_the_loader_says_itself_stays():
    with pytest.raises(RewardError, match="^as it was$"), missing_files("m"):
        raise RewardError("as it was")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model is ''"),
        ({"dtype": "bf61"}, "dtype is 'bf61'; did you mean 'bf16'"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
    ],
)
def test_wrong_options_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelOptions(**({"model": "m"} | settings))


def test_the_device_is_a_gpu_if_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert ModelOptions("m").torch_device.type == expected
    assert ModelOptions("m", "meta").torch_device.type == "meta"


def test_no_option_of_a_reward_has_the_name_of_how_rewards_are_weighed() -> None:
    weighed = {field.name for field in dataclasses.fields(RewardSpec)}
    for name in registry.available():
        assert not weighed & {field.name for field in dataclasses.fields(registry.options_type(name))}, name
