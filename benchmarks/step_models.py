"""The models that `benchmarks.step` runs: the committed small one, and true sizes with random weights.

True sizes have no text encoders: prompts are random embeddings of the right shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from crd_fast import backbones
from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.data.prompts import load_prompts

ROOT = Path(__file__).parents[1]
PROMPTS = 24


@dataclass(frozen=True)
class StepModel:
    """A backbone with embeddings of `PROMPTS` prompts and of the empty one; targets: what a LoRA adapts."""

    backbone: Backbone
    conditioning: Conditioning
    unconditional: Conditioning
    targets: tuple[str, ...]
    guidance_scale: float


def shapes(device: torch.device, dtype: torch.dtype) -> StepModel:
    """The embedded model with the demo's targets."""
    backbone = backbones.load(str(ROOT / "models/shapes-sd3"), options=LoadOptions(device, dtype))
    prompts = load_prompts(str(ROOT / "recipes/prompts/shapes_train.jsonl")).prompts[:PROMPTS]
    embedded = backbone.encode_prompts(["", *prompts])
    return StepModel(backbone, embedded[1:], embedded[:1], (*backbone.lora_targets, "ff.net.0.proj", "ff.net.2"), 4.0)


def sd35m(device: torch.device, dtype: torch.dtype) -> StepModel:
    """Stable Diffusion 3.5 Medium at 512 px: 24 blocks, 13 of them with a second attention, 333 text tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from crd_fast.backbones.sd3 import SD3Backbone

    transformer = _random(
        lambda: SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        device,
        dtype,
    )
    pipeline = SimpleNamespace(
        transformer=transformer,
        vae=torch.nn.Identity(),
        vae_scale_factor=8,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        set_progress_bar_config=lambda **_: None,
    )
    backbone = SD3Backbone(pipeline, LoadOptions(device, dtype, resolution=512))
    return _with_prompts(backbone, {"context": (333, 4096), "pooled": (2048,)}, 4.5)


def flux1(device: torch.device, dtype: torch.dtype) -> StepModel:
    """FLUX.1 dev at 512 px, 512 text tokens. The classes' defaults are that model's sizes."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from crd_fast.backbones.flux1 import Flux1Backbone

    pipeline = SimpleNamespace(
        transformer=_random(lambda: FluxTransformer2DModel(guidance_embeds=True), device, dtype),
        vae=torch.nn.Identity(),
        vae_scale_factor=8,
        default_sample_size=128,
        tokenizer_max_length=77,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        set_progress_bar_config=lambda **_: None,
    )
    backbone = Flux1Backbone(pipeline, LoadOptions(device, dtype, resolution=512))
    return _with_prompts(backbone, {"context": (512, 4096), "pooled": (768,)}, 1.0)


def z_image(device: torch.device, dtype: torch.dtype) -> StepModel:
    """Z-Image at 512 px, captions of 64 tokens. The class's defaults are that model's sizes."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    from crd_fast.backbones.z_image import ZImageBackbone

    pipeline = SimpleNamespace(
        transformer=_random(ZImageTransformer2DModel, device, dtype),
        vae=torch.nn.Identity(),
        vae_scale_factor=8,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        set_progress_bar_config=lambda **_: None,
    )
    backbone = ZImageBackbone(pipeline, LoadOptions(device, dtype, max_sequence_length=64, resolution=512))
    return _with_prompts(backbone, {"context": (64, 2560)}, 4.0, length=torch.full((PROMPTS + 1,), 64))


MODELS: dict[str, Callable[[torch.device, torch.dtype], StepModel]] = {
    "shapes": shapes,
    "sd35m": sd35m,
    "flux1": flux1,
    "z_image": z_image,
}


def _random(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The model made on the device, so that its weights never exist on the host; all of them random, none zero."""
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = make()
        finally:
            torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return model


def _with_prompts(
    backbone: Backbone, shapes: dict[str, tuple[int, ...]], guidance_scale: float, **exact: Tensor
) -> StepModel:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(PROMPTS + 1, *shape, generator=generator) for name, shape in shapes.items()}
    embedded = Conditioning(tensors | exact).to(backbone.device, backbone.dtype)
    return StepModel(backbone, embedded[1:], embedded[:1], backbone.lora_targets, guidance_scale)
