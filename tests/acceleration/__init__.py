"""A tiny random Stable Diffusion 3 transformer with an adapter, for tests of what makes it faster."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from crd_fast.lora import LoRABank
from crd_fast.snapshots import SLOTS

BLOCKS = ("transformer_blocks",)
WIDTH, CONTEXT = 64, 32


def transformer(layers: int, dual: tuple[int, ...] = (), qk_norm: str | None = "rms_norm") -> SD3Transformer2DModel:
    """`dual`: layers with a second attention over the image alone, as Stable Diffusion 3.5 has."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=CONTEXT,
        pos_embed_max_size=8,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def adapted(model: SD3Transformer2DModel) -> LoRABank:
    """Adapters on all attention projections, every slot with its own random values."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    bank = LoRABank(model, [f"attn.{target}" for target in targets], rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for slot in SLOTS:
            for tensor in bank.tensors(slot):
                tensor.normal_(std=0.1)
    return bank


def inputs(rows: int) -> dict[str, Any]:
    """Arguments of the transformer for `rows` samples."""
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": draw(rows, 4, 8, 8),
        "timestep": torch.rand(rows, generator=generator) * 1000,
        "encoder_hidden_states": draw(rows, 5, CONTEXT),
        "pooled_projections": draw(rows, CONTEXT),
        "return_dict": False,
    }
