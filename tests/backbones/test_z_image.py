"""What Z-Image alone does: captions that keep their lengths, guidance counted from zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crd_fast import backbones
from crd_fast.backbones import Backbone, Conditioning
from crd_fast.errors import ConfigError
from crd_fast.rollout import generate, initial_noise
from tests.pipelines import z_image

PROMPTS = ["2 squares", "3 squares and a circle that lies in the lower corner"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return z_image.save(tmp_path_factory.mktemp("z_image"), 0)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return backbones.load(str(folder), options=z_image.OPTIONS)


def velocity(backbone: Backbone, conditioning: Conditioning) -> torch.Tensor:
    rows = len(conditioning)
    x = initial_noise(backbone, torch.arange(rows), 0)
    with torch.no_grad():
        return backbone.predict(x, torch.linspace(0.9, 0.2, rows), conditioning)


def test_captions_are_stored_at_one_length_beside_their_own(backbone: Backbone) -> None:
    given = backbone.encode_prompts(["", *PROMPTS])
    context, lengths = given.tensors["context"], given.tensors["length"]
    assert context.shape == (3, 64, z_image.CONTEXT) and lengths.tolist() == [29, 37, 64]  # the last is cut
    for caption, length in zip(context, lengths.tolist(), strict=True):
        assert (caption[length:] == 0).all() and (caption[:length] != 0).any(dim=1).all()
    alone = backbone.encode_prompts([""]).tensors["context"]
    assert alone.shape == (1, 64, z_image.CONTEXT)
    torch.testing.assert_close(alone[0], context[0])


def test_a_longer_padding_would_be_another_velocity(backbone: Backbone) -> None:
    """The reason why captions are cut to their lengths: the transformer's padding takes part in attention."""
    given = backbone.encode_prompts([""])
    context = given.tensors["context"]
    noise = torch.randn_like(context)
    beyond = torch.arange(context.shape[1])[None, :, None] >= given.tensors["length"][:, None, None]
    unread = Conditioning({"context": torch.where(beyond, noise, context), "length": given.tensors["length"]})
    torch.testing.assert_close(velocity(backbone, unread), velocity(backbone, given), rtol=0, atol=0)
    longer = Conditioning({"context": context, "length": torch.tensor([context.shape[1]])})
    assert (velocity(backbone, longer) - velocity(backbone, given)).abs().max() > 1e-3


def test_lengths_are_read_once_for_a_conditioning(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every reading waits for all work before it."""
    given = backbone.encode_prompts(["", *PROMPTS])
    read: list[torch.Size] = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor.shape) or original(tensor))
    first = velocity(backbone, given)
    torch.testing.assert_close(velocity(backbone, given), first, rtol=0, atol=0)
    assert read == [(3,)]
    # another conditioning is another reading, also where it takes the place of one that is gone
    for i in range(3):
        expected = first[i : i + 1]
        x = initial_noise(backbone, torch.arange(3), 0)[i : i + 1]
        with torch.no_grad():
            again = backbone.predict(x, torch.linspace(0.9, 0.2, 3)[i : i + 1], given[torch.tensor([i])])
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    assert read == [(3,), (1,), (1,), (1,)]


def test_guidance_counts_from_zero(backbone: Backbone) -> None:
    c, u = torch.randn(2, 3, *backbone.latent_shape)
    torch.testing.assert_close(backbone.guide(c, u, 4.0), c + 4 * (c - u), rtol=1e-5, atol=1e-5)
    assert backbone.is_guided(1.0) and backbone.is_guided(0.5) and not backbone.is_guided(0.0)


def test_a_scale_below_zero_is_no_guidance_as_in_the_pipeline(backbone: Backbone, folder: Path) -> None:
    start = initial_noise(backbone, torch.arange(2), 7)
    embedded = backbone.encode_prompts(["", *PROMPTS])
    ours = backbone.decode(
        generate(backbone, embedded[1:], start, steps=2, guidance_scale=-0.5, unconditional=embedded[:1])
    )
    torch.testing.assert_close(ours, z_image.sample(folder, None, PROMPTS, start, 2, -0.5), rtol=1e-4, atol=2e-5)


def test_the_prompt_shows_in_the_image(backbone: Backbone) -> None:
    start = initial_noise(backbone, torch.zeros(2, dtype=torch.int64), 7)
    images = backbone.decode(generate(backbone, backbone.encode_prompts(PROMPTS), start, steps=3))
    assert (images[0] - images[1]).abs().max() > 5e-3 and images.mean() > 0.1


def test_the_longest_caption_has_positions_in_the_model(folder: Path) -> None:
    """The tiny model has 128: padding takes one, the image one, and captions come in units of 32."""
    longest = backbones.load(str(folder), options=replace(z_image.OPTIONS, max_sequence_length=96))
    given = longest.encode_prompts(["squares " * 40])
    assert given.tensors["length"].tolist() == [96] and velocity(longest, given).isfinite().all()
    with pytest.raises(ConfigError, match="max_sequence_length is 97: expected 1 to 96"):
        backbones.load(str(folder), options=replace(z_image.OPTIONS, max_sequence_length=97))


def test_a_resolution_that_tokens_do_not_cover(folder: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        backbones.load(str(folder), options=replace(z_image.OPTIONS, resolution=72))


def test_without_a_resolution_it_is_the_pipelines(folder: Path) -> None:
    backbone = backbones.load(str(folder), options=replace(z_image.OPTIONS, resolution=None))
    assert backbone.latent_shape == (z_image.LATENT, 1, 128, 128)
