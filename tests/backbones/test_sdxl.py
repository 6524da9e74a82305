"""What is SDXL's own: a velocity from eps at equal signal-to-noise ratio, its noise levels, and the empty prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from crd_fast import backbones
from crd_fast.backbones import Backbone
from crd_fast.errors import ConfigError
from crd_fast.rollout import generate, initial_noise
from tests.pipelines import sdxl

PROMPTS = ["2 squares", "3 squares"]


class Recorded(nn.Module):
    """In place of the U-Net: keeps what it was given and returns `eps`."""

    def __init__(self, eps: Tensor) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, timestep: Tensor, **conditioning: Any) -> tuple[Tensor]:
        self.x, self.timestep, self.conditioning = x, timestep, conditioning
        return (self.eps,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.save(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return backbones.load(str(folder), options=sdxl.OPTIONS)


def trained_ratios() -> np.ndarray:
    """Noise over signal of the 1000 training timesteps in fp64, from the definition of the schedule."""
    betas = np.linspace(sdxl.SCHEDULE["beta_start"] ** 0.5, sdxl.SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    return np.sqrt((1 - signal) / signal)


def noised(levels: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, eps, sigma and x_t in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(levels), sdxl.LATENT, 8, 8)
    x0, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor(levels, dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    return x0, eps, sigma, (1 - s) * x0 + s * eps


def record(backbone: Backbone, x_t: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Recorded, Tensor]:
    """What the U-Net reads, and the velocity made of its eps."""
    conditioning = backbone.encode_prompts(["2 squares"] * len(x_t))
    backbone.transformer = unet = Recorded(eps.float())
    return unet, backbone.predict(x_t.float(), sigma.float(), conditioning)


def test_velocity_is_that_of_the_formula(backbone: Backbone) -> None:
    """The U-Net reads alpha x0 + beta eps at the timestep of their ratio; its eps gives eps - x0, whatever it is."""
    x0, eps, sigma, x_t = noised([0.05, 0.3, 0.5, 0.7, 0.93])
    unet, _ = record(backbone, x_t, sigma, eps)
    ratio = (sigma / (1 - sigma)).numpy()
    alpha = torch.from_numpy(1 / np.sqrt(1 + ratio**2)).view(-1, 1, 1, 1)
    expected = alpha * x0 + (1 - alpha.square()).sqrt() * eps
    torch.testing.assert_close(unet.x.double(), expected, rtol=1e-5, atol=2e-6)
    timesteps = np.interp(ratio, trained_ratios(), np.arange(1000))
    np.testing.assert_allclose(unet.timestep.numpy(), timesteps, rtol=0, atol=1e-3)
    s = sigma.view(-1, 1, 1, 1)
    wrong = eps.flip(0)
    for predicted, x0_of_it in ((eps, x0), (wrong, (x_t - s * wrong) / (1 - s))):
        _, velocity = record(backbone, x_t, sigma, predicted)
        error = (velocity.double() - (predicted - x0_of_it)).abs().flatten(1).amax(1)
        assert (error < 1e-6 / (1 - sigma)).all(), error  # x_t and eps are fp32: their rounding is divided by 1 - sigma


def test_levels_that_training_did_not_reach(backbone: Backbone) -> None:
    """Above the last level all is as at it, with finite velocities; below the first, the first timestep."""
    last = trained_ratios()[-1] / (1 + trained_ratios()[-1])
    _, eps, _, x_t = noised([0.5] * 5)
    unet, velocity = record(backbone, x_t, torch.tensor([last, 0.99, 1.0, 0.01, 0.0]), eps)
    np.testing.assert_allclose(unet.timestep.numpy(), [999, 999, 999, 0, 0], rtol=0, atol=1e-3)
    scale = ((1 - last) ** 2 + last**2) ** 0.5
    torch.testing.assert_close(unet.x[:3].double(), x_t[:3] / scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(velocity[:3].double(), (eps - x_t)[:3] / (1 - last), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(velocity[4].double(), (eps - x_t)[4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_spacing": "linspace"},  # fractional timesteps, the first of them the last trained
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},  # timesteps by the logarithm
    ],
)
def test_samples_equal_the_pipelines_at_any_spacing(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = sdxl.save(tmp_path, scheduler=EulerDiscreteScheduler(**{**sdxl.SCHEDULE, **settings}))
    backbone = backbones.load(str(path), options=sdxl.OPTIONS)
    embedded = backbone.encode_prompts(PROMPTS)
    start = initial_noise(backbone, torch.arange(2), 5)
    ours = backbone.decode(generate(backbone, embedded, start, steps=4))
    torch.testing.assert_close(ours, sdxl.sample(path, None, PROMPTS, start, 4, None), rtol=1e-4, atol=2e-5)
    scheduler = backbone.pipeline.scheduler
    scheduler.set_timesteps(4)
    times = backbone.timestep(backbone.rollout_sigmas(4)[:-1])
    torch.testing.assert_close(times, scheduler.timesteps, rtol=0, atol=1e-3)


def test_another_scheduler_lends_its_settings_to_euler(tmp_path: Path) -> None:
    settings = {**sdxl.SCHEDULE, "timestep_spacing": "trailing", "use_karras_sigmas": True}
    scheduler = DPMSolverMultistepScheduler(**settings, final_sigmas_type="sigma_min")  # a sample is clean all the same
    backbone = backbones.load(str(sdxl.save(tmp_path, scheduler=scheduler)))
    euler = EulerDiscreteScheduler(**settings)
    euler.set_timesteps(6)
    torch.testing.assert_close(backbone.rollout_sigmas(6), euler.sigmas / (1 + euler.sigmas))
    assert backbone.start_scale(6) == pytest.approx(float(euler.init_noise_sigma / (1 + euler.sigmas[0])))


@pytest.mark.parametrize(
    "scheduler",
    [EulerDiscreteScheduler(**sdxl.SCHEDULE, prediction_type="v_prediction"), EDMEulerScheduler()],
)
def test_models_of_another_kind_are_refused(tmp_path: Path, scheduler: Any) -> None:
    with pytest.raises(ConfigError, match=f"{type(scheduler).__name__} .* expected a U-Net that predicts 'epsilon'"):
        backbones.load(str(sdxl.save(tmp_path, scheduler=scheduler)))


def test_a_unet_that_is_told_its_guidance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="told its guidance_scale"):
        backbones.load(str(sdxl.save(tmp_path, time_cond_proj_dim=16)))


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_the_pipelines_unconditional(tmp_path: Path, zeros: bool) -> None:
    path = sdxl.save(tmp_path, force_zeros_for_empty_prompt=zeros)
    backbone = backbones.load(str(path), options=sdxl.OPTIONS)
    embedded = backbone.encode_prompts(["2 squares", "", "3 squares"])
    for tensor in embedded.tensors.values():
        assert (tensor[1] == 0).all() == zeros
        assert tensor[0].abs().sum() > 0 and tensor[2].abs().sum() > 0
    start = initial_noise(backbone, torch.arange(2), 5)
    ours = generate(
        backbone, embedded[torch.tensor([0, 2])], start, steps=3, guidance_scale=4.0, unconditional=embedded[1:2]
    )
    theirs = sdxl.sample(path, None, PROMPTS, start, 3, 4.0)
    torch.testing.assert_close(backbone.decode(ours), theirs, rtol=1e-4, atol=2e-5)


def test_the_model_is_told_its_size(folder: Path) -> None:
    """Original size, crop and target size, as the pipeline computes them where a user gives none."""
    backbone = backbones.load(str(folder), options=replace(sdxl.OPTIONS, resolution=72))
    assert backbone.latent_shape == (sdxl.LATENT, 9, 9)
    x = torch.randn(2, *backbone.latent_shape)
    unet, _ = record(backbone, x, torch.rand(2), x)
    expected = backbone.pipeline._get_add_time_ids((72, 72), (0, 0), (72, 72), torch.float32, sdxl.POOLED)
    told = unet.conditioning["added_cond_kwargs"]["time_ids"]
    assert torch.equal(told, expected.expand(2, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 60}, "model.resolution is 60: expected a multiple of 8"),
        ({"max_sequence_length": 20}, "model.max_sequence_length is 20, but SDXL has no such setting"),
        ({"frames": 5}, "model.frames is 5, but SDXL has no such setting"),
        ({"distilled_guidance": 3.5}, "model.distilled_guidance is 3.5, but SDXL has no such setting"),
    ],
)
def test_options_that_do_not_fit(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbones.load(str(folder), options=replace(sdxl.OPTIONS, **change))


def test_bfloat16(folder: Path, backbone: Backbone) -> None:
    rounded = backbones.load(str(folder), options=replace(sdxl.OPTIONS, dtype=torch.bfloat16))
    x, sigma = initial_noise(backbone, torch.arange(2), 0), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        ours = rounded.predict(x, sigma, rounded.encode_prompts(PROMPTS))
        exact = backbone.predict(x, sigma, backbone.encode_prompts(PROMPTS))
    assert ours.dtype == torch.float32 and (ours - exact).norm() < 0.02 * exact.norm()
