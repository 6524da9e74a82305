"""Every family alike: samples equal to its own pipeline's, training through the command, adapters for diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from crd_fast import backbones, cli
from crd_fast.errors import ConfigError
from crd_fast.lora import LoRABank
from crd_fast.lora_file import read_adapter
from crd_fast.rollout import generate, initial_noise
from crd_fast.snapshots import BASE, TRAINED
from tests import pipelines

PROMPTS = ["2 squares", "3 squares"]


@pytest.fixture(scope="module", params=pipelines.NAMES)
def family(request: pytest.FixtureRequest) -> ModuleType:
    return pipelines.family(request.param)


@pytest.fixture(scope="module")
def folder(family: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp(family.FAMILY), 0)


def our_samples(family: ModuleType, folder: Path, lora: Path | None, guidance: float | None) -> tuple[Any, ...]:
    """Start noise and images of our solver over the adapter."""
    backbone = backbones.load(str(folder), options=family.OPTIONS)
    bank = LoRABank(backbone.transformer, backbone.lora_targets, rank=2, alpha=2.0, seed=0)
    if lora is not None:
        bank.load(read_adapter(str(lora)))
    embedded = backbone.encode_prompts(["", *PROMPTS])
    start = initial_noise(backbone, torch.arange(2), 7)
    with bank.merged(BASE if lora is None else TRAINED):
        latents = generate(
            backbone, embedded[1:], start, steps=3, guidance_scale=guidance, unconditional=embedded[:1]
        )  # fmt: skip
        return start, backbone.decode(latents)


@pytest.mark.parametrize("guided", [False, True])
def test_samples_equal_the_pipelines_own(family: ModuleType, folder: Path, guided: bool) -> None:
    """Sign, time convention, noise levels, text, guidance and decoding at once: any of them wrong shows here."""
    if guided and family.GUIDANCE is None:
        with pytest.raises(ConfigError, match="guidance_scale is 2.5"):
            our_samples(family, folder, None, 2.5)
        return
    guidance = family.GUIDANCE if guided else None
    start, ours = our_samples(family, folder, None, guidance)
    theirs = family.sample(folder, None, PROMPTS, start, 3, guidance)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


def test_velocity_has_the_layout_of_the_latents(family: ModuleType, folder: Path) -> None:
    backbone = backbones.load(str(folder), family.FAMILY, family.OPTIONS)
    assert backbone.family == family.FAMILY
    x = initial_noise(backbone, torch.arange(3), 0)
    sigma = torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        conditioning = backbone.encode_prompts(["", *PROMPTS])
        together = backbone.predict(x, sigma, conditioning)
        alone = torch.cat([backbone.predict(x[i : i + 1], sigma[i : i + 1], conditioning[i : i + 1]) for i in range(3)])
    assert together.shape == x.shape == (3, *backbone.latent_shape)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    sigmas = backbone.rollout_sigmas(4)
    assert len(sigmas) == 5 and sigmas[-1] == 0 and (sigmas.diff() < 0).all() and sigmas[0] <= 1


def test_guidance_is_what_the_loss_combines(family: ModuleType, folder: Path) -> None:
    backbone = backbones.load(str(folder), options=family.OPTIONS)
    if family.GUIDANCE is None:
        assert backbone.guidance == "distilled" and not backbone.is_guided(backbone.unguided_scale)
        return
    assert backbone.is_guided(family.GUIDANCE) and not backbone.is_guided(backbone.unguided_scale)
    c, u = torch.randn(2, 2, *backbone.latent_shape, dtype=torch.float32)
    if backbone.guidance == "linear":
        w = backbone.linear_scale(family.GUIDANCE)
        torch.testing.assert_close(backbone.guide(c, u, family.GUIDANCE), u + w * (c - u))
        torch.testing.assert_close(backbone.guide(c, u, backbone.unguided_scale), c)


def test_names_in_the_adapter_exist_in_the_model(family: ModuleType, folder: Path) -> None:
    backbone = backbones.load(str(folder), options=family.OPTIONS)
    for name in backbone.block_lists:
        assert isinstance(backbone.transformer.get_submodule(name), nn.ModuleList), name
    layers = [name for name, module in backbone.transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in backbone.lora_targets:
        assert any(f".{layer}".endswith(f".{target}") for layer in layers), target
    with pytest.raises(RuntimeError, match="released"):
        backbone.release_text_encoders()
        backbone.encode_prompts(["too late"])


def recipe(family: ModuleType, pipeline: Path, folder: Path) -> Path:
    (folder / "train.txt").write_text("2 squares\n3 squares\n")
    options = {k: v for k, v in vars(family.OPTIONS).items() if k not in ("device", "dtype") and v is not None}
    guidance = 1.0 if family.GUIDANCE is None else family.GUIDANCE
    tree = {
        "model": {"path": str(pipeline), "family": family.FAMILY, **options},
        "data": {"prompts": str(folder / "train.txt")},
        "rewards": {"jpeg_compressibility": {"weight": 1}},
        "algorithm": {"guidance_scale": guidance, "kl_fraction": 0.5},
        "lora": {"rank": 2, "alpha": 4},
        "rollout": {"steps": 2, "batch": 4},
        "train": {"epochs": 2, "groups": 2, "group_size": 2, "micro_batch": 2, "updates": 2, "timesteps": 2}
        | {"timestep_strategy": "uniform", "checkpoint_every": 1, "lr": 1e-2},
        "precision": {"dtype": "fp32"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_training_resumes_and_diffusers_loads_the_adapter(family: ModuleType, folder: Path, tmp_path: Path) -> None:
    """Two epochs through the command, the second after a resume; the exported LoRA gives the pipeline our samples."""
    path, run = recipe(family, folder, tmp_path), tmp_path / "run"
    assert cli.main(["train", str(path), f"run.dir={run}", "train.epochs=1"]) == 0
    assert cli.main(["train", str(path), f"run.dir={run}", "--resume"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and [row["skipped_steps"] for row in rows] == [0, 0]
    assert all(row["kl"] >= 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[1]["implicit_reward_std"] > 0, "the second epoch starts away from the old snapshot"
    start, ours = our_samples(family, folder, run / "lora", family.GUIDANCE)
    theirs = family.sample(folder, run / "lora", PROMPTS, start, 3, family.GUIDANCE)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    without = family.sample(folder, None, PROMPTS, start, 3, family.GUIDANCE)
    assert (without - theirs).abs().max() > 1e-5, "the adapter does something"
