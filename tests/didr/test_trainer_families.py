"""The DIDR trainer on each family: its decoder, its one step, its guidance, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crd_fast.didr import GaussianDamping
from crd_fast.didr.networks import EMA, GENERATOR, TA
from crd_fast.errors import ConfigError
from crd_fast.rollout import generate, initial_noise
from crd_fast.snapshots import BASE
from crd_fast.training.models import load_backbone
from tests.didr.tiny import MODEL, added_noise, make_recipe, make_trainer, moved, save_pipeline, scramble, state

FAMILIES = tuple(MODEL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_pipeline(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_decoding(family: str, folders: dict[str, Path]) -> None:
    """Against central differences along a direction, where no pixel is cut off."""
    recipe = make_recipe(family, folders[family])
    backbone = load_backbone(recipe.model, "fp32", torch.device("cpu"))
    backbone.pipeline.vae.double()
    x, along = (torch.randn(2, *backbone.latent_shape, dtype=torch.float64) for _ in range(2))
    x = x.requires_grad_()
    images = backbone.decode_with_graph(x)
    weights = torch.randn(images.shape, dtype=torch.float64) * ((images > 0.01) & (images < 0.99))
    assert weights.ne(0).float().mean() > 0.5
    (slope,) = torch.autograd.grad((images * weights).sum(), x)
    step = 1e-3

    def value(side: float) -> Tensor:
        return (backbone.decode(x.detach() + side * step * along) * weights).sum()

    expected = (value(1) - value(-1)) / (2 * step)
    torch.testing.assert_close((slope * along).sum(), expected, rtol=1e-3, atol=1e-4)
    assert not backbone.decode(x).requires_grad
    assert all(p.grad is None for p in backbone.pipeline.vae.parameters())


@pytest.mark.parametrize("family", ["sd3", "z_image"])
def test_one_step_of_a_flow_model_is_its_sampler(family: str, folders: dict[str, Path]) -> None:
    trainer = make_trainer(make_recipe(family, folders[family]))
    backbone = trainer.networks.backbone
    z = initial_noise(backbone, torch.arange(3), 0)
    with torch.no_grad(), trainer.networks.sets.rollout(backbone, BASE):
        expected = generate(backbone, trainer.conditioning, z, steps=1)
    with torch.no_grad():
        got = trainer.generator.sample(GENERATOR, z, trainer.conditioning)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sdxl_starts_at_its_timestep(folders: dict[str, Path]) -> None:
    """The noise level of share 0.399 has the ratio of timestep 399, and the U-Net is told 399."""
    trainer = make_trainer(make_recipe("sdxl", folders["sdxl"]))
    backbone: Any = trainer.networks.backbone
    signal = backbone._scheduler.alphas_cumprod[399].double()
    ratio = ((1 - signal) / signal).sqrt()
    sigma = float(backbone.sigma_at(torch.tensor(trainer.generator.start)))
    assert sigma == pytest.approx(float(ratio / (1 + ratio)), rel=1e-5)
    assert backbone.timestep(torch.tensor([sigma])).item() == pytest.approx(399, abs=1e-2)
    shares = torch.tensor([0.02, 0.5, 0.98])
    assert torch.allclose(backbone.timestep(backbone.sigma_at(shares)), shares * 1000, atol=0.05)
    assert backbone.sigma_at(torch.tensor(1.0)).item() == pytest.approx(backbone._last, rel=1e-5)


@pytest.mark.parametrize(("family", "scale", "weight"), [("sd3", 4.0, 4.0), ("z_image", 4.0, 5.0), ("sd3", 1.0, 1.0)])
def test_guidance_is_that_of_the_familys_pipeline(
    family: str, scale: float, weight: float, folders: dict[str, Path]
) -> None:
    trainer = make_trainer(make_recipe(family, folders[family], {"algorithm": {"guidance_scale": scale}}))
    assert trainer.config.guidance_scale == weight


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(family: str, folders: dict[str, Path]) -> None:
    recipe = make_recipe(family, folders[family], {"algorithm": {"curvature": 0.5, "max_correction": 1.0}}, steps=1)
    trainer = make_trainer(recipe)
    scramble(trainer, GENERATOR)
    assert isinstance(trainer.damping, GaussianDamping)
    before = state(trainer)
    row = trainer.run_epoch()
    assert moved(trainer, before) == {GENERATOR, TA, EMA}
    assert row["correction"] <= row["gap"] * 1.0001 and row["nonfinite"] == 0


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_the_ta_regresses_what_its_model_predicts(family: str, folders: dict[str, Path]) -> None:
    """SDXL's error is that of eps, a flow model's that of the velocity."""
    trainer = make_trainer(make_recipe(family, folders[family]))
    scramble(trainer, GENERATOR, TA)
    (draw, _) = trainer._draw()
    with torch.no_grad():
        x0 = trainer.generator.sample(GENERATOR, draw.z, draw.conditioning)
        level = draw.t[:, None, None, None]
        eps = added_noise(x0, draw)
        x_t = (1 - level) * x0 + level * eps
        velocity = trainer.networks.predict(TA, x_t, draw.t, draw.conditioning)
        errors = velocity - (eps - x0)
        if family == "sdxl":
            errors = x_t + (1 - level) * velocity - eps
        got = trainer._ta_output(draw).errors
    torch.testing.assert_close(got, errors.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_guidance_that_is_not_linear(tmp_path: Path) -> None:
    from tests.pipelines import qwen_image

    recipe = make_recipe("sd3", qwen_image.save(tmp_path), {"model": {"max_sequence_length": 24}})
    with pytest.raises(ConfigError, match="qwen_image rescales its guidance.* set it to 1.0"):
        make_trainer(recipe)


def test_a_generator_of_another_family(folders: dict[str, Path]) -> None:
    from crd_fast.didr.networks import Networks

    recipe = make_recipe("sd3", folders["sd3"], {"generator": {"path": "elsewhere"}})
    other = make_recipe("sdxl", folders["sdxl"])
    first, second = (load_backbone(r.model, "fp32", torch.device("cpu")) for r in (recipe, other))
    with pytest.raises(ConfigError, match="generator.path elsewhere is sdxl .*expected the reference's, sd3"):
        Networks.build(recipe, first, second)
