"""Tiny random CLIP models of the real classes, in files as published, and the images to score with them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

CONTEXT = 12
SIDE = 32
SIZES = [(32, 32), (64, 64), (48, 80), (200, 90), (20, 20), (17, 31), (33, 32)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def vocabulary() -> dict[str, int]:
    """Of single bytes, "!" the first; the last two ids begin and end a text, as in the published one."""
    symbols = [chr(code) for code in range(33, 127)]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def save_tokenizer(folder: Path, **settings: Any) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_processor(folder: Path, **settings: Any) -> CLIPImageProcessorPil:
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = CLIPImageProcessorPil(**(sizes | settings))
    processor.save_pretrained(folder)
    return processor


def save_clip(folder: Path, *, width: int = 32, projection: int = 16, text: dict[str, Any] | None = None) -> CLIPModel:
    """A model with its tokenizer and image processor; weights large enough that inputs matter to the output."""
    tokens = len(vocabulary())
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "max_position_embeddings": CONTEXT}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": tokens, **ends, **(text or {})},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        projection_dim=projection,
    )
    clip = CLIPModel(config).eval()
    randomize(clip)
    clip.save_pretrained(folder)
    save_tokenizer(folder)
    save_processor(folder)
    return clip


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 0:  # the scale of the cosine keeps its value
                middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(middle, 0.2)


def smooth_images(count: int, height: int, width: int) -> Tensor:
    """Random colours that change slowly, with a dark and a light region: what a decoded photo looks like."""
    coarse = torch.rand(count, 3, 5, 5) * 1.2 - 0.1
    images = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    images[..., : height // 4, : width // 3] *= 0.1
    return images


def eight_bit(images: Tensor) -> Tensor:
    """The images after rounding to 8 bits, uint8 (B, H, W, 3)."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def save_head(path: Path, **changed: Tensor | None) -> dict[str, Tensor]:
    """The aesthetic predictor's rating layers with random weights, which take embeddings of length 1 to a few points.

    changed: tensors by key, None leaves one out.
    """
    widths, state = (768, 1024, 128, 64, 16, 1), {}
    for place, wide, narrow in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{place}.weight"] = torch.randn(narrow, wide) / wide**0.5 * (20 if wide == 768 else 1)
        state[f"layers.{place}.bias"] = torch.randn(narrow)
    state = {key: value for key, value in (state | changed).items() if value is not None}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return state


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        inner = 4 * width
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, inner), gelu=activation, c_proj=nn.Linear(inner, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTransformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, activation: nn.Module) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width, heads, activation) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, side: int, patch: int, out: int, act: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = OpenClipTransformer(width, heads, depth, act)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).mT  # (B, P, width)
        classes = self.class_embedding.expand(len(images), 1, -1)
        x = self.ln_pre(torch.cat([classes, patches], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP in plain torch with its names, written from its definition; heads as wide as in ViT-H-14."""

    def __init__(self, activation: nn.Module | None = None, image_heads: int = 2, text_heads: int = 2) -> None:
        super().__init__()
        activation = activation or nn.GELU()
        image_width, text_width, out, tokens = 80 * image_heads, 64 * text_heads, 24, len(vocabulary())
        self.visual = OpenClipVision(image_width, image_heads, 2, 28, 14, out, activation)
        self.transformer = OpenClipTransformer(text_width, text_heads, 3, activation)
        self.token_embedding = nn.Embedding(tokens, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))
        randomize(self)
        self.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
