"""What only the FLUX families have: a guidance number that the model is told, distilled models, cached positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crd_fast import backbones
from crd_fast.backbones import Backbone, LoadOptions
from crd_fast.errors import ConfigError
from crd_fast.rollout import generate, initial_noise
from tests.pipelines import flux1, flux2

PROMPTS = ["2 squares", "3 squares"]
UNTOLD = replace(flux1.OPTIONS, distilled_guidance=None)
FAMILIES = pytest.mark.parametrize("family", [flux1, flux2], ids=["flux1", "flux2"])


def images(backbone: Backbone, start: Tensor, prompts: list[str], guidance: float | None = None) -> Tensor:
    return backbone.decode(
        generate(backbone, backbone.encode_prompts(prompts), start, steps=3, guidance_scale=guidance)
    )


@FAMILIES
def test_prompts_change_the_image_of_one_noise(family: Any, tmp_path: Path) -> None:
    backbone = backbones.load(str(family.save(tmp_path)), options=family.OPTIONS)
    ours = images(backbone, initial_noise(backbone, torch.zeros(2, dtype=torch.int64), 7), PROMPTS)
    assert (ours[0] - ours[1]).abs().max() > 0.05
    assert ours.std() > 0.05 and ours.mean() > 0.1, "not one dark plane"


def test_flux1_is_told_the_pipelines_number_unless_given(tmp_path: Path) -> None:
    folder = str(flux1.save(tmp_path))
    backbone = backbones.load(folder, options=UNTOLD)
    start = initial_noise(backbone, torch.arange(2), 7)
    pipeline = flux1.PIPELINE.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=start, num_inference_steps=3, max_sequence_length=12, height=64, width=64, output_type="pt"
    ).images
    ours = images(backbone, start, PROMPTS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    told = images(backbones.load(folder, options=flux1.OPTIONS), start, PROMPTS)
    assert (told - ours).abs().max() > 1e-3, "the number matters"
    with pytest.raises(ConfigError, match=r"guidance_scale is 3\.5.*distilled_guidance"):
        backbone.is_guided(3.5)


def test_schnell_is_told_nothing(tmp_path: Path) -> None:
    folder = flux1.save(tmp_path, told_guidance=False)
    backbone = backbones.load(str(folder), options=UNTOLD)
    start = initial_noise(backbone, torch.arange(2), 7)
    theirs = flux1.sample(folder, None, PROMPTS, start, 3, None)
    torch.testing.assert_close(images(backbone, start, PROMPTS), theirs, rtol=1e-4, atol=2e-5)
    assert not backbone.is_guided(1.0)
    with pytest.raises(ConfigError, match="no guidance of any kind.*set guidance_scale to 1.0"):
        backbone.is_guided(3.5)
    with pytest.raises(ConfigError, match=r"distilled_guidance is 2\.0.*schnell.*leave it out"):
        backbones.load(str(folder), options=flux1.OPTIONS)


def test_a_distilled_klein_refuses_guidance(tmp_path: Path) -> None:
    folder = flux2.save(tmp_path, distilled=True)
    backbone = backbones.load(str(folder), options=flux2.OPTIONS)
    start = initial_noise(backbone, torch.arange(2), 7)
    theirs = flux2.sample(folder, None, PROMPTS, start, 3, None)
    torch.testing.assert_close(images(backbone, start, PROMPTS), theirs, rtol=1e-4, atol=2e-5)
    for attempt in (lambda: backbone.is_guided(4.0), lambda: images(backbone, start, PROMPTS, 4.0)):
        with pytest.raises(ConfigError, match=r"guidance_scale is 4\.0.*is_distilled.*set guidance_scale to 1\.0"):
            attempt()


@pytest.mark.parametrize(
    ("family", "option", "message"),
    [
        (flux1, {"max_sequence_length": 513}, "513: expected 1 to 512"),
        (flux1, {"frames": 9}, "FLUX.1 has no such setting"),
        (flux1, {"resolution": 72}, "72: expected a multiple of 16"),
        (flux2, {"max_sequence_length": 0}, "0: expected at least 1"),
        (flux2, {"frames": 9}, "FLUX.2 klein has no such setting"),
        (flux2, {"resolution": 72}, "72: expected a multiple of 16"),
        (flux2, {"distilled_guidance": 3.5}, "FLUX.2 klein has no such setting"),
    ],
)
def test_options_that_the_model_cannot_use(family: Any, option: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        backbones.load(str(family.save(tmp_path)), options=replace(family.OPTIONS, **option))


@FAMILIES
def test_defaults_are_the_pipelines(family: Any, tmp_path: Path) -> None:
    """1024 pixels and 512 tokens, as real models are sampled."""
    backbone = backbones.load(str(family.save(tmp_path)), options=LoadOptions())
    assert backbone.latent_shape == (64 * 64, 16)
    conditioning = backbone.encode_prompts([""])
    assert conditioning.tensors["context"].shape[:2] == (1, 512)


@FAMILIES
def test_every_prediction_gets_the_same_positions(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbones.load(str(family.save(tmp_path)), options=family.OPTIONS)
    forward, calls = backbone.transformer.forward, []

    def recorded(**arguments: Any) -> Any:
        calls.append(arguments)
        return forward(**arguments)

    monkeypatch.setattr(backbone.transformer, "forward", recorded)
    images(backbone, initial_noise(backbone, torch.arange(2), 7), PROMPTS)
    assert len(calls) == 3
    for name in ("img_ids", "txt_ids"):
        assert all(call[name] is calls[0][name] for call in calls), name
        assert calls[0][name].ndim == 2, "the transformer warns of a batch of positions"


@FAMILIES
def test_bfloat16_stays_near_float32(family: Any, tmp_path: Path) -> None:
    folder = str(family.save(tmp_path))
    exact = backbones.load(folder, options=family.OPTIONS)
    rough = backbones.load(folder, options=replace(family.OPTIONS, dtype=torch.bfloat16))
    x, sigma = initial_noise(exact, torch.arange(2), 7), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        wanted = exact.predict(x, sigma, exact.encode_prompts(PROMPTS))
        found = rough.predict(x, sigma, rough.encode_prompts(PROMPTS))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()
    assert (rough.decode(x) - exact.decode(x)).abs().mean() < 0.02
