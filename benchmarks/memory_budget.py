"""What the models of true size keep in memory, apart from activations:

    python -m benchmarks.memory_budget [--markdown]

Every model is built without its weights, and what the package itself chooses is counted in it: the linear layers that
FP8 takes, the layers that a LoRA adapts by default, the tensors of a bank. A GB is 10^9 bytes. Nothing is loaded and
nothing is measured: see docs/precision_and_memory.md for what else needs memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from crd_fast.acceleration.fp8 import KEPT, linears_for_fp8
from crd_fast.backbones.base import Backbone
from crd_fast.backbones.flux1 import Flux1Backbone
from crd_fast.backbones.qwen_image import QwenImageBackbone
from crd_fast.backbones.sd3 import SD3Backbone
from crd_fast.backbones.sdxl import SDXLBackbone
from crd_fast.backbones.wan import WanBackbone
from crd_fast.backbones.z_image import ZImageBackbone
from crd_fast.lora import LoRABank
from crd_fast.snapshots import SLOTS, TRAINED

RANK = 32
RANKS = (1, 8, 64)
PROMPTS = 1000
BF16, FP32, FP8 = 2, 4, 1  # bytes

# of every trained element, in fp32: AdamW's two moments and the gradient, beside the slots
_MOMENTS, _GRADIENT = 2, 1


@dataclass(frozen=True)
class Sizes:
    """A published model: its family's adapter, its velocity model, and the elements of one prompt's embeddings."""

    backbone: type[Backbone]
    make: Callable[[], nn.Module]
    embedding: int


@dataclass(frozen=True)
class Budget:
    """Elements that are counted, and the bytes that follow from them.

    parameters: of the velocity model. buffers: positions and the like, which are never sharded. rounded,
    scales: weights that FP8 takes, and their rows, each with an fp32 scale.
    adapter: of one slot of the bank. adapted: weights that the bank adapts. embedding: of one prompt.
    """

    parameters: int
    buffers: int
    rounded: int
    scales: int
    adapter: int
    adapted: int
    embedding: int

    @property
    def bf16(self) -> int:
        """The frozen model."""
        return BF16 * (self.parameters + self.buffers)

    @property
    def both(self) -> int:
        """The frozen model with the rounded layers in both precisions."""
        return self.bf16 + FP8 * self.rounded + FP32 * self.scales

    @property
    def fp8(self) -> int:
        """The frozen model with the rounded layers in FP8 alone."""
        return self.both - BF16 * self.rounded

    @property
    def bank(self) -> int:
        """Slots, moments and gradient of the adapters, and the copy of slots and moments from the epoch's start."""
        kept = len(SLOTS) + _MOMENTS
        return FP32 * self.adapter * (2 * kept + _GRADIENT)

    @property
    def merged(self) -> int:
        """The adapted weights once more, while rollouts run with `lora.merge`."""
        return BF16 * self.adapted

    @property
    def copies(self) -> int:
        """Full fine-tuning of one rank as it starts: the base and the slots."""
        return self.bf16 + FP32 * len(SLOTS) * (self.parameters + self.buffers)

    @property
    def prompts(self) -> int:
        """Embeddings of `PROMPTS` prompts."""
        return BF16 * self.embedding * PROMPTS

    def start(self, ranks: int) -> float:
        """The most that one of several ranks holds before its copies are made: the base, whole and its share."""
        return self.bf16 + BF16 * self.parameters / ranks

    def full(self, ranks: int) -> float:
        """Full fine-tuning on one of `ranks` that share it: base, slots, moments and gradient."""
        whole = (BF16 + FP32 * len(SLOTS)) * self.buffers
        return whole + (self.copies - whole + FP32 * (_MOMENTS + _GRADIENT) * self.parameters) / ranks


def sd35m() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def flux1() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel()


def z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel()


def wan_14b() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel()


def wan_1_3b() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


# Sizes that a class has by default are the published model's; embeddings have the text length of the family's recipe.
MODELS: dict[str, Sizes] = {
    "SDXL": Sizes(SDXLBackbone, sdxl, 77 * 2048 + 1280),
    "SD3.5 Medium": Sizes(SD3Backbone, sd35m, (77 + 256) * 4096 + 2048),
    "FLUX.1 dev": Sizes(Flux1Backbone, flux1, 512 * 4096 + 768),
    "Qwen-Image": Sizes(QwenImageBackbone, qwen_image, 64 * 3584),
    "Z-Image": Sizes(ZImageBackbone, z_image, 64 * 2560),
    "Wan2.1 1.3B": Sizes(WanBackbone, wan_1_3b, 128 * 4096),
    "Wan2.1 14B": Sizes(WanBackbone, wan_14b, 128 * 4096),
}


def budget(sizes: Sizes) -> Budget:
    """Count one model."""
    with torch.device("meta"):
        model = sizes.make().to(torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    bank = LoRABank(model, sizes.backbone.lora_targets, rank=RANK, alpha=RANK, seed=0)
    rounded = _rounded(model, sizes.backbone.block_lists)  # after the bank, as a run does it
    return Budget(
        parameters=parameters,
        buffers=buffers,
        rounded=sum(layer.weight.numel() for layer in rounded),
        scales=sum(layer.out_features for layer in rounded),
        adapter=sum(tensor.numel() for tensor in bank.tensors(TRAINED)),
        adapted=sum(layer.base.weight.numel() for layer in bank.layers.values()),
        embedding=sizes.embedding,
    )


def _rounded(model: nn.Module, block_lists: Sequence[str]) -> list[nn.Linear]:
    """The layers that FP8 takes; the model's tensors become fake ones that say they are on the CPU.

    On the meta device the rule refuses: nothing multiplies there.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
    return list(linears_for_fp8(model, block_lists, KEPT).values())


def tables() -> list[tuple[str, list[dict[str, Any]]]]:
    """Two titled tables, of a model for each row."""
    frozen, trained = [], []
    for name, sizes in MODELS.items():
        found = budget(sizes)
        frozen.append(
            {
                "model": name,
                "parameters, 10^9": f"{found.parameters / 1e9:.2f}",
                "bf16": _gigabytes(found.bf16),
                "bf16 and FP8": _gigabytes(found.both),
                "FP8 alone": _gigabytes(found.fp8),
                "LoRA parameters, 10^6": f"{found.adapter / 1e6:.1f}",
                "bank": _gigabytes(found.bank),
                "merged copy": _gigabytes(found.merged),
                f"{PROMPTS} prompts": _gigabytes(found.prompts),
            }
        )
        shares = {f"{ranks} rank{'s' if ranks > 1 else ''}": _gigabytes(found.full(ranks)) for ranks in RANKS}
        trained.append({"model": name, **shares, f"start, {RANKS[1]} ranks": _gigabytes(found.start(RANKS[1]))})
    return [
        (f"Frozen model and a LoRA of rank {RANK}, GB a rank, not sharded", frozen),
        ("Full fine-tuning, GB a rank, sharded over all ranks", trained),
    ]


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2f}"


def text(title: str, rows: list[dict[str, Any]], markdown: bool) -> str:
    """One table, aligned or as Markdown."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    if markdown:
        ruled = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
        return "\n".join([f"{title}:", "", *(f"| {' | '.join(line)} |" for line in ruled)])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([title, *aligned])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_budget", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    options = parser.parse_args(arguments)
    print("\n\n".join(text(title, rows, options.markdown) for title, rows in tables()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
