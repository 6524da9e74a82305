"""What is Wan's own: frames, UniPC's noise levels, a time per token, and pipelines of two transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from crd_fast import backbones
from crd_fast.errors import ConfigError
from crd_fast.rollout import generate, initial_noise
from tests.pipelines import wan

PROMPTS = ["2 squares", "3 squares"]
SHIFT = 3.0


def unipc(**settings: Any) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", flow_shift=SHIFT, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan.save(tmp_path_factory.mktemp("wan"))


def test_noise_levels_of_unipc(tmp_path: Path) -> None:
    """Those at which the pipeline calls the model, which are a shifted line from 1 to 1 / 1000 with 0 after it."""
    backbone = backbones.load(str(wan.save(tmp_path, scheduler=unipc(use_flow_sigmas=True))), options=wan.OPTIONS)
    line = torch.linspace(1, 1 / 1000, 6, dtype=torch.float64)[:-1]
    expected = torch.cat([SHIFT * line / (1 + (SHIFT - 1) * line), torch.zeros(1)])
    ours = backbone.rollout_sigmas(5)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6)
    pipeline = WanPipeline.from_pretrained(tmp_path)
    times = []
    pipeline(
        ["2 squares"],
        num_inference_steps=5,
        guidance_scale=1.0,
        num_frames=1,
        height=64,
        width=64,
        max_sequence_length=4,
        output_type="latent",
        callback_on_step_end=lambda _, step, time, kept: times.append(int(time)) or kept,
    )
    assert times == [int(sigma * 1000) for sigma in ours[:-1].tolist()]  # UniPC rounds its times down


def test_unipc_of_a_diffusion_model_is_refused(tmp_path: Path) -> None:
    path = wan.save(tmp_path, scheduler=unipc(use_flow_sigmas=False))
    with pytest.raises(ConfigError, match="UniPCMultistepScheduler, has use_flow_sigmas off"):
        backbones.load(str(path), options=wan.OPTIONS)


def test_one_time_a_sample_is_the_pipelines_time_a_token(tmp_path: Path) -> None:
    path = wan.save(tmp_path, expand_timesteps=True)
    backbone = backbones.load(str(path), options=wan.OPTIONS)
    assert backbone.pipeline.config.expand_timesteps is True
    embedded = backbone.encode_prompts(["", *PROMPTS])
    start = initial_noise(backbone, torch.arange(2), 3)
    ours = generate(backbone, embedded[1:], start, steps=3, guidance_scale=2.5, unconditional=embedded[:1])
    theirs = wan.sample(path, None, PROMPTS, start, 3, 2.5)
    torch.testing.assert_close(backbone.decode(ours), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "change", [{"boundary_ratio": 0.875}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}]
)
def test_two_transformers_are_refused_before_loading(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ConfigError, match="two transformers.*Wan2.1-T2V-1.3B.*Wan2.2-TI2V-5B"):
        backbones.load(str(tmp_path), options=wan.OPTIONS)


def test_sizes_by_default(folder: Path) -> None:
    backbone = backbones.load(str(folder))
    assert backbone.frames == 81
    assert backbone.latent_shape == (wan.LATENT, 21, 60, 60)  # 480 pixels
    assert backbone.encode_prompts([""]).tensors["context"].shape == (1, 512, wan.TEXT)


@pytest.mark.parametrize("frames", [1, 9])
def test_decoded_frames(folder: Path, frames: int) -> None:
    backbone = backbones.load(str(folder), options=replace(wan.OPTIONS, frames=frames))
    videos = backbone.decode(initial_noise(backbone, torch.arange(2), 0))
    assert backbone.frames == frames
    assert videos.shape == (2, frames, 3, 64, 64) and videos.dtype == torch.float32
    assert videos.min() >= 0 and videos.max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 6}, "model.frames is 6: expected one more than a multiple of 4, such as 5"),
        ({"frames": 80}, "model.frames is 80: .* such as 81"),
        ({"frames": 0}, "model.frames is 0: .* such as 1"),
        ({"resolution": 40}, "model.resolution is 40: expected a multiple of 16"),
        ({"distilled_guidance": 3.5}, "model.distilled_guidance is 3.5, but Wan has no such setting"),
    ],
)
def test_options_that_do_not_fit(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbones.load(str(folder), options=replace(wan.OPTIONS, **change))


def test_bfloat16(folder: Path) -> None:
    """Where diffusers keeps some layers in fp32."""
    backbone = backbones.load(str(folder), options=replace(wan.OPTIONS, dtype=torch.bfloat16))
    exact = backbones.load(str(folder), options=wan.OPTIONS)
    x, sigma = initial_noise(exact, torch.arange(2), 0), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        rounded = backbone.predict(x, sigma, backbone.encode_prompts(PROMPTS)).float()
        reference = exact.predict(x, sigma, exact.encode_prompts(PROMPTS))
    assert (rounded - reference).norm() < 0.02 * reference.norm()
