"""Decoding with a graph by a tiny autoencoder: what the family's own pipeline makes with it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd_fast import backbones
from crd_fast.errors import ConfigError
from crd_fast.rollout import generate, initial_noise
from tests import pipelines

PROMPTS = ["2 squares", "3 squares"]
FAMILIES = ("flux1", "sd3", "sdxl", "z_image")


def tiny(folder: Path, channels: int = 4, **settings: Any) -> Path:
    """64x64 images of latents (channels, 8, 8)."""
    torch.manual_seed(1)
    AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        **({"decoder_block_out_channels": (4, 4, 4, 4), "num_decoder_blocks": (1, 1, 1, 1)} | settings),
    ).save_pretrained(folder)
    return folder


def samples(family: ModuleType, backbone: backbones.Backbone) -> tuple[Tensor, Tensor]:
    """Start noise and latents."""
    start = initial_noise(backbone, torch.arange(2), 7)
    return start, generate(backbone, backbone.encode_prompts(PROMPTS), start, steps=2, guidance_scale=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_those_of_the_pipeline_with_that_autoencoder(name: str, tmp_path: Path) -> None:
    family = pipelines.family(name)
    own = family.save(tmp_path / "own")
    backbone = backbones.load(str(own), options=family.OPTIONS)
    channels = backbone.pipeline.vae.config.latent_channels
    path = tiny(tmp_path / "tiny", channels, scaling_factor=0.9, shift_factor=0.0 if name == "sdxl" else 0.1)
    start, latents = samples(family, backbone)
    before = backbone.decode(latents)
    backbone.use_tiny_decoder(str(path))
    ours = backbone.decode_with_graph(latents.requires_grad_())

    other = Path(shutil.copytree(own, tmp_path / "other"))
    shutil.rmtree(other / "vae")
    shutil.copytree(path, other / "vae")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    theirs = family.sample(other, None, PROMPTS, start, 2, None)
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=2e-5)
    assert torch.equal(backbone.decode(latents), before), "evaluation decodes with the pipeline's own"
    assert (ours - before).abs().max() > 1e-2
    (slope,) = torch.autograd.grad(ours.sum(), latents)
    assert slope.isfinite().all() and slope.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in backbone.tiny_decoder.parameters())


@pytest.mark.parametrize("name", sorted(set(pipelines.NAMES) - set(FAMILIES)))
def test_families_without_tiny_decoders(name: str, tmp_path: Path) -> None:
    family = pipelines.family(name)
    backbone = backbones.load(str(family.save(tmp_path)), options=family.OPTIONS)
    with pytest.raises(ConfigError, match=f"does not decode the latents of {name}"):
        backbone.use_tiny_decoder(str(tiny(tmp_path / "tiny")))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> backbones.Backbone:
    family = pipelines.family("sd3")
    return backbones.load(str(family.save(tmp_path_factory.mktemp("sd3"))), options=family.OPTIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 8}, "decodes latents of 8 channels, expected 4 as sd3 has"),
        (
            {"decoder_block_out_channels": (4, 4, 4), "num_decoder_blocks": (1, 1, 1)},
            r"makes images \(3, 32, 32\) of latents that are images \(3, 64, 64\)",
        ),
    ],
)
def test_decoders_of_other_latents(
    settings: dict[str, Any], message: str, sd3: backbones.Backbone, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        sd3.use_tiny_decoder(str(tiny(tmp_path / "tiny", **settings)))
    assert sd3.tiny_decoder is None


def test_a_decoder_that_lacks_tensors(sd3: backbones.Backbone, tmp_path: Path) -> None:
    """diffusers would fill them at random."""
    file = tiny(tmp_path / "tiny") / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = sorted(key for key in tensors if key.startswith("decoder."))[0]
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"lacks 1 tensors of an AutoencoderTiny's decoder, as {name}"):
        sd3.use_tiny_decoder(str(file.parent))
    assert sd3.tiny_decoder is None


def test_a_folder_without_a_decoder(sd3: backbones.Backbone, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be loaded as an AutoencoderTiny"):
        sd3.use_tiny_decoder(str(tmp_path))
