"""The step never waits for the device, but for one number an update: proven on a device that has nothing to read.

Tensors on "meta" have shapes and no values, so whatever would bring a value to the host (item, a copy, a mask as an
index, a branch on a tensor) raises. Each family's real model runs the trainer's own updates there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crd_fast import backbones
from crd_fast.backbones.z_image import ZImageBackbone
from crd_fast.data.prompts import PromptSet
from crd_fast.lora import LoRABank
from crd_fast.ranks import Ranks
from crd_fast.rewards.scorer import Scorer
from crd_fast.rollout import RolloutBatch
from crd_fast.training import optimizer as optimizer_module
from crd_fast.training.config import build_recipe
from crd_fast.training.experience import Experience
from crd_fast.training.plan import micro_steps
from crd_fast.training.prepare import prepare
from crd_fast.training.step_inputs import step_inputs
from crd_fast.training.stop import StopRequest
from crd_fast.training.trainer import Trainer
from tests import pipelines

META = torch.device("meta")
GROUPS, SIZE, TIMESTEPS, UPDATES, MICRO = 2, 4, 2, 2, 4


class Crossings(TorchDispatchMode):
    """Notes every operation that takes tensors of one device and gives tensors of another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.device for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = {leaf.device for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
        if made - given and given:
            self.seen.append(f"{func}: {given} -> {made}")
        return result


def trainer_on_meta(family: ModuleType, folder: Any, algorithm: dict[str, Any], inner: int = 1) -> Trainer:
    backbone = backbones.load(str(folder), options=family.OPTIONS)
    embedded = backbone.encode_prompts(["", "2 squares", "3 squares"])
    recipe = build_recipe(
        {
            "model": {"path": "tiny"},
            "data": {"prompts": "none"},
            "rewards": {"jpeg_compressibility": {}},
            "algorithm": {"guidance_scale": family.GUIDANCE or backbone.unguided_scale} | algorithm,
            "precision": {"dtype": "fp32"},
            "train": {"groups": GROUPS, "group_size": SIZE, "micro_batch": MICRO, "updates": UPDATES}
            | {"timesteps": TIMESTEPS, "timestep_strategy": "uniform", "inner_epochs": inner}
            | {"fixed_noise": inner > 1},
        },
        "meta",
    )
    bank = LoRABank(backbone.transformer, backbone.lora_targets, rank=2, alpha=2.0, seed=0)
    prepared = prepare(bank, backbone, recipe, Ranks(), embedded[:1])
    backbone.transformer.to(META)
    backbone.device = META
    for name, value in list(vars(backbone).items()):  # positions and tables that the adapter made as it was loaded
        if isinstance(value, Tensor):
            setattr(backbone, name, value.to(META))
    moved = embedded.to(META, torch.float32)
    prompts = PromptSet(("2 squares", "3 squares"), ({}, {}), "two")
    return Trainer(
        recipe, backbone, bank, prepared, prompts, moved[1:], moved[:1], Scorer({}), StopRequest(), Ranks()
    )  # fmt: skip


def run_updates(trainer: Trainer, valid: Tensor | None) -> tuple[Tensor, list[float], list[str]]:
    count = GROUPS * SIZE
    samples = torch.arange(count)
    latents = torch.zeros(count, *trainer.backbone.latent_shape, device=META)
    batch = RolloutBatch(latents, samples // SIZE, samples // SIZE, samples)
    experience = Experience(batch, torch.randn(count), valid, {})
    settings = trainer.recipe.train
    plan = list(
        micro_steps(
            settings,
            kl_fraction=trainer.recipe.algorithm.kl_fraction if trainer.loss_config.kl_coef > 0 else 0.0,
            schedule=torch.tensor([1.0, 0.5]),
            seed=0,
            epoch=0,
            valid=valid,
        )
    )
    steps = step_inputs(plan, experience, settings, META)
    with Crossings() as crossings:
        metrics, norms = trainer._updates(steps, experience)
    return metrics, norms, crossings.seen


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The values that a step reads from the device, through the one function that does so."""
    seen: list[Tensor] = []

    def read(value: Tensor) -> float:
        assert value.device == META and value.shape == ()
        seen.append(value)
        return 1.0

    monkeypatch.setattr(optimizer_module, "_read", read)
    return seen


@pytest.fixture(scope="module", params=pipelines.NAMES)
def family(request: pytest.FixtureRequest) -> ModuleType:
    return pipelines.family(request.param)


@pytest.fixture(scope="module")
def folder(family: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return family.save(tmp_path_factory.mktemp(family.FAMILY), 0)


def test_a_step_reads_the_gradients_norm_and_nothing_else(
    family: ModuleType, folder: Any, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[int] = []
    if family.FAMILY == "z_image":  # its model takes captions of their own lengths: once a set of embeddings

        def lengths(self: ZImageBackbone, given: Tensor) -> list[int]:
            captions.append(len(given))
            return [1] * len(given)

        monkeypatch.setattr(ZImageBackbone, "_lengths", lengths)
    trainer = trainer_on_meta(family, folder, {"kl_fraction": 0.5})
    run_updates(trainer, valid=None)  # some models move their table of positions when they are first used
    reads.clear()
    captions.clear()
    metrics, norms, crossings = run_updates(trainer, valid=None)
    micro = GROUPS * SIZE * TIMESTEPS // MICRO
    assert len(reads) == len(norms) == UPDATES
    assert metrics.shape[0] == micro and metrics.device == META
    assert crossings == []
    assert len(captions) == (2 * micro if family.FAMILY == "z_image" else 0)


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "no reference": lambda: {"algorithm": {"kl_coef": 0.0}},
    "masked samples": lambda: {"valid": torch.tensor([True, False] + [True] * 6)},
    "kept predictions": lambda: {"inner": 2},
    "hard centering": lambda: {"algorithm": {"temperature": 0.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_nor_does_a_step_of_another_kind(
    variant: str, reads: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sd3 = pipelines.family("sd3")
    chosen = VARIANTS[variant]()
    folder = sd3.save(tmp_path_factory.mktemp("sd3"))
    trainer = trainer_on_meta(sd3, folder, chosen.get("algorithm", {}), chosen.get("inner", 1))
    _, norms, crossings = run_updates(trainer, chosen.get("valid"))
    assert len(reads) == len(norms) == UPDATES * chosen.get("inner", 1) and crossings == []


def test_the_device_has_nothing_to_read() -> None:
    value = torch.zeros(3, device=META)
    for read in (lambda: value.sum().item(), value.tolist, value.cpu, lambda: bool(value[0]), lambda: value[value > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with Crossings() as crossings:
        torch.arange(2).to(META)
    assert len(crossings.seen) == 1
