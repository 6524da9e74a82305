"""The script that makes the committed pipeline, and the pipeline itself."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from crd_fast import backbones
from crd_fast.rewards.geneval import evaluate
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.shapes import world

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "shapes-sd3"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "examples" / "shapes" / "pretrain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_makes_a_pipeline_that_generates(script: ModuleType, tmp_path: Path) -> None:
    small = replace(
        script.Pretraining(),
        vae_renders=8,
        vae_steps=2,
        vae_batch=4,
        bank=16,
        layers=2,
        text_width=16,
        steps=2,
        batch=4,
        compiled=False,  # a minute of compiling for two steps
    )
    script.pretrain(tmp_path, small, torch.device("cpu"))
    assert not (tmp_path / ".pretraining").exists()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a red circle", 'a sign "427"'], num_inference_steps=1, max_sequence_length=1, output_type="np"
    ).images
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all()


def test_every_word_is_one_token_and_digits_stand_alone(script: ModuleType, tmp_path: Path) -> None:
    tokenizer = script.make_tokenizer(tmp_path)
    for entry in world.prompts("all"):
        words = entry["prompt"].split('"')[0].split()
        digits = len(entry["text"]) + 2 if entry["tag"] == "text" else 0
        assert len(tokenizer(entry["prompt"]).input_ids) == 2 + len(words) + digits, entry["prompt"]


def test_the_committed_pipeline_is_small_and_loads() -> None:
    size = sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file())
    assert size <= 12e6
    pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle", num_inference_steps=2, max_sequence_length=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and image.std() > 0.01


def test_the_committed_autoencoder_keeps_what_prompts_ask_for() -> None:
    """It caps every score, so it has to be nearly perfect."""
    backbone = backbones.load(str(MODEL))
    vae = backbone.pipeline.vae
    rng = np.random.default_rng(4)
    chosen = [rng.choice(world.prompts("all", [task])) for task in world.GENEVAL_TASKS for _ in range(10)]
    images = torch.from_numpy(world.render([world.sample_scene(entry, rng) for entry in chosen], rng))
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mean
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert 0.7 < scaled.std() < 1.3, "training assumes latents of about unit spread"
    found = detect_shapes(backbone.decode(scaled))
    strict = [evaluate(boxes, entry).strict for boxes, entry in zip(found, chosen, strict=True)]
    assert np.mean(strict) >= 0.95
