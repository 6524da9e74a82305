"""The minimal trainer learns its reward, and its anchor holds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import crd_fast

EXAMPLE = Path(__file__).parents[2] / "examples" / "dropin" / "minimal_trainer.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("minimal_trainer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal_trainer"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_reward_rises_on_the_circle_and_a_weak_anchor_leaves_it(example):
    settings = example.Settings(epochs=16, pretraining_steps=800)
    held = example.train(settings, crd_fast.CRDConfig(kl_coef=2.0))
    loose = example.train(settings, crd_fast.CRDConfig(kl_coef=0.0))
    (first_reward, first_distance), (last_reward, last_distance) = held[0], held[-1]
    assert last_reward > first_reward + 0.2
    assert last_distance < first_distance + 0.05
    assert loose[-1][0] > last_reward and loose[-1][1] > last_distance + 0.1
