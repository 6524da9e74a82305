"""What Qwen-Image alone does: a prompt template, one text length with a mask, guidance that keeps the norm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crd_fast import backbones
from crd_fast.backbones import Backbone, Conditioning
from crd_fast.errors import ConfigError
from crd_fast.rollout import generate, initial_noise
from tests.pipelines import qwen_image

PROMPTS = ["2 squares", "3 squares and a circle beside a triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.save(tmp_path_factory.mktemp("qwen_image"), 0)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return backbones.load(str(folder), options=qwen_image.OPTIONS)


def velocity(backbone: Backbone, conditioning: Conditioning) -> torch.Tensor:
    rows = len(conditioning)
    x = initial_noise(backbone, torch.arange(rows), 0)
    with torch.no_grad():
        return backbone.predict(x, torch.linspace(0.2, 0.9, rows), conditioning)


def test_every_prompt_has_the_same_number_of_tokens(backbone: Backbone) -> None:
    """The template's first 34 tokens are dropped: of an empty prompt what ends the template is left."""
    short, all_of_them = backbone.encode_prompts(PROMPTS[:1]), backbone.encode_prompts(["", *PROMPTS])
    assert short.tensors["context"].shape == (1, 24, qwen_image.CONTEXT)
    assert all_of_them.tensors["context"].shape == (3, 24, qwen_image.CONTEXT)
    assert all_of_them.tensors["mask"].sum(1).tolist() == [5, 13, 24]  # the last is cut
    assert short.tensors["mask"].sum(1).tolist() == [13]
    for given in (short, all_of_them):
        assert (given.tensors["context"][~given.tensors["mask"]] == 0).all()
    torch.testing.assert_close(short.tensors["context"][0], all_of_them.tensors["context"][1])


def test_padding_is_not_seen(backbone: Backbone) -> None:
    given = backbone.encode_prompts(PROMPTS[:1])
    length = int(given.tensors["mask"].sum())
    expected = velocity(backbone, given)
    unpadded = Conditioning({name: tensor[:, :length] for name, tensor in given.tensors.items()})
    torch.testing.assert_close(velocity(backbone, unpadded), expected, rtol=1e-5, atol=1e-6)
    context, mask = given.tensors["context"].clone(), given.tensors["mask"]
    context[~mask] = 5.0
    torch.testing.assert_close(velocity(backbone, Conditioning({"context": context, "mask": mask})), expected)
    seen = Conditioning({"context": context, "mask": torch.ones_like(mask)})
    assert (velocity(backbone, seen) - expected).abs().max() > 1e-3


def test_guidance_keeps_the_norm_of_the_conditional_velocity(backbone: Backbone) -> None:
    c, u = torch.randn(2, 3, *backbone.latent_shape)
    guided = backbone.guide(c, u, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), c.norm(dim=-1))
    direction = torch.nn.functional.cosine_similarity(guided, u + 4 * (c - u), dim=-1)
    torch.testing.assert_close(direction, torch.ones_like(direction))
    assert backbone.guide(c.bfloat16(), u.bfloat16(), 4.0).dtype == torch.float32


def test_a_scale_up_to_one_is_no_guidance_as_in_the_pipeline(backbone: Backbone, folder: Path) -> None:
    start = initial_noise(backbone, torch.arange(2), 7)
    embedded = backbone.encode_prompts(["", *PROMPTS])
    ours = backbone.decode(
        generate(backbone, embedded[1:], start, steps=2, guidance_scale=0.5, unconditional=embedded[:1])
    )
    torch.testing.assert_close(ours, qwen_image.sample(folder, None, PROMPTS, start, 2, 0.5), rtol=1e-4, atol=2e-5)


def test_the_prompt_shows_in_the_image(backbone: Backbone) -> None:
    start = initial_noise(backbone, torch.zeros(2, dtype=torch.int64), 7)
    images = backbone.decode(generate(backbone, backbone.encode_prompts(PROMPTS), start, steps=3))
    assert (images[0] - images[1]).abs().max() > 5e-3 and images.mean() > 0.1


def test_time_is_rounded_as_the_pipeline_rounds_it(folder: Path) -> None:
    """bf16: the pipeline rounds 1000 * sigma, then divides; rounding sigma is off by up to a step of bf16."""
    backbone = backbones.load(str(folder), options=replace(qwen_image.OPTIONS, dtype=torch.bfloat16))
    told: list[torch.Tensor] = []

    def note(module: Any, positional: Any, named: dict[str, Any]) -> None:
        told.append(named["timestep"][0].clone())

    hook = backbone.transformer.register_forward_pre_hook(note, with_kwargs=True)
    steps = 25
    backbone.pipeline(PROMPTS[0], num_inference_steps=steps, height=64, width=64, true_cfg_scale=1.0, output_type="pt")
    theirs, told = told, []
    conditioning = backbone.encode_prompts(PROMPTS[:1])
    sigmas = backbone.rollout_sigmas(steps)[:-1]
    with torch.no_grad():
        for sigma in sigmas:
            backbone.predict(initial_noise(backbone, torch.arange(1), 0), sigma.expand(1), conditioning)
    hook.remove()
    assert torch.equal(torch.stack(told), torch.stack(theirs))
    assert not torch.equal(torch.stack(told), sigmas.bfloat16()), "the order of rounding can be told apart here"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_sequence_length": 1025}, "max_sequence_length is 1025"), ({"resolution": 72}, "multiple of 16")],
)
def test_settings_that_the_model_cannot_have(folder: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbones.load(str(folder), options=replace(qwen_image.OPTIONS, **options))


def test_without_a_resolution_it_is_the_pipelines(folder: Path) -> None:
    backbone = backbones.load(str(folder))
    assert backbone.latent_shape == (64 * 64, 4 * qwen_image.LATENT)
