"""The ImageReward checkpoint in the BLIP towers of transformers.

Source: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation" (arXiv
2304.05977).
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crd_fast.errors import RewardError

REPOSITORY = "zai-org/ImageReward"
CHECKPOINT, CONFIG = "ImageReward.pt", "med_config.json"

# Standardises the head's output over the training set of the checkpoint.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# Both sizes of BLIP's image encoder have heads of this width; the checkpoint does not say it.
VISION_HEAD_WIDTH = 64

# Positions of the linear layers in the head; the others are dropouts.
HEAD_LAYERS = (0, 2, 4, 6, 7)

# Entries of the checkpoint that the score does not need: BLIP's contrastive projections and a counting buffer.
UNUSED = frozenset(
    {
        "blip.vision_proj.weight",
        "blip.vision_proj.bias",
        "blip.text_proj.weight",
        "blip.text_proj.bias",
        "blip.text_encoder.embeddings.position_ids",
    }
)

# Beginnings of parameter names here -> in the checkpoint.
_PREFIXES = {
    "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision.embeddings.patch_embedding.": "blip.visual_encoder.patch_embed.proj.",
    "vision.encoder.layers.": "blip.visual_encoder.blocks.",
    "vision.post_layernorm.": "blip.visual_encoder.norm.",
    "text.": "blip.text_encoder.",
    "head.": "mlp.layers.",
}
# Parts of the names of a vision layer's parameters, likewise.
_PARTS = {
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.qkv.": ".attn.qkv.",
    ".self_attn.projection.": ".attn.proj.",
}

_TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)


class HeadLayer(nn.Linear):
    """A linear layer in float32 at least: in half precision the small head would cost digits and save no time."""

    def forward(self, features: Tensor) -> Tensor:
        dtype = torch.promote_types(features.dtype, torch.float32)
        return F.linear(features.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class ImageRewardModel(nn.Module):
    """BLIP's image encoder, its text encoder with cross-attention to the image, and a linear head of five layers.

    `image_size`: side of the input in pixels. `vocab_size`: tokens that the text encoder knows.
    """

    def __init__(self, vision: Any, text: Any, head: nn.ModuleDict) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.image_size: int = vision.config.image_size
        self.vocab_size: int = text.config.vocab_size

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (B,) in float32: one for each pair of an image and a text.

        pixels (B, 3, S, S), normalised; ids (B, L) and mask (B, L) of the texts, 0 where padded.
        """
        image = self.vision(pixels).last_hidden_state  # (B, patches + 1, width)
        text = self.text(ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        features = text[:, 0]  # (B, hidden), the CLS token
        for layer in self.head.values():
            features = layer(features)
        return (features.squeeze(1) - MEAN) / STD


def load_imagereward(source: str) -> ImageRewardModel:
    """The model of a folder or hub id with ImageReward.pt (or ImageReward.safetensors) and med_config.json.

    Sizes are read from the files. Raises RewardError for a missing file, for one that is no plain state dict, and for
    entries that are missing, unknown or of another shape; OSError where the hub cannot be reached.
    """
    checkpoint, config = _files(source)
    state = _read_state(checkpoint)
    model = _empty_model(state, _text_settings(config), checkpoint)
    _check_names(model, state, checkpoint)
    model.load_state_dict({name: state[checkpoint_name(name)] for name in model.state_dict()}, assign=True)
    return model


def checkpoint_name(name: str) -> str:
    """What the checkpoint calls the parameter `name` of `ImageRewardModel`."""
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    translated = _PREFIXES[prefix] + name[len(prefix) :]
    if prefix == "vision.encoder.layers.":
        for here, there in _PARTS.items():
            translated = translated.replace(here, there)
    return translated


def _files(source: str) -> tuple[Path, Path]:
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(source, CHECKPOINT)), Path(hf_hub_download(source, CONFIG))
    converted = folder / "ImageReward.safetensors"
    checkpoint = converted if converted.is_file() else folder / CHECKPOINT
    for file in (checkpoint, folder / CONFIG):
        if not file.is_file():
            raise RewardError(
                f"the imagereward model's folder {source} has no {file.name}: expected {CHECKPOINT} and {CONFIG}; "
                f"hf download {REPOSITORY} {CHECKPOINT} {CONFIG} --local-dir {source}"
            )
    return checkpoint, folder / CONFIG


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, SafetensorError) as error:
        raise RewardError(
            f"{file} is no plain state dict ({error}): expected names and tensors only; download it again from "
            f"{REPOSITORY}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"{file} holds more than a state dict: expected names and tensors only, as in {REPOSITORY}")
    return state


def _text_settings(file: Path) -> dict[str, Any]:
    settings = json.loads(file.read_text())
    missing = [key for key in _TEXT_SETTINGS if key not in settings]
    if missing:
        raise RewardError(f"{file} has no {', '.join(missing)}: expected the {CONFIG} of {REPOSITORY}")
    return {key: settings[key] for key in _TEXT_SETTINGS}


def _empty_model(state: Mapping[str, Tensor], text_settings: dict[str, Any], file: Path) -> ImageRewardModel:
    """The model with the sizes of the checkpoint; parameters without memory."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state or state[name].ndim != dimensions:
            raise RewardError(_difference(file, missing=[name]))
        return state[name].shape

    width, _, patch, _ = shape("blip.visual_encoder.patch_embed.proj.weight", 4)
    if width % VISION_HEAD_WIDTH:
        raise RewardError(
            f"the image encoder in {file} has width {width}: expected a multiple of {VISION_HEAD_WIDTH}, the width of "
            "its heads"
        )
    blocks = "blip.visual_encoder.blocks."
    depth = 1 + max((int(name[len(blocks) :].split(".")[0]) for name in state if name.startswith(blocks)), default=0)
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape(f"{blocks}0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=depth,
        num_attention_heads=width // VISION_HEAD_WIDTH,
        image_size=patch * math.isqrt(shape("blip.visual_encoder.pos_embed", 3)[1] - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    # "is_decoder" gives the layers their cross-attention; masks are causal only where a call asks for it
    text = BlipTextConfig(**text_settings, encoder_hidden_size=width, is_decoder=True, use_cache=False)
    outputs = [shape(f"mlp.layers.{layer}.weight", 2)[0] for layer in HEAD_LAYERS[:-1]] + [1]
    inputs = [text.hidden_size, *outputs[:-1]]
    with torch.device("meta"):
        head = {str(layer): HeadLayer(*sizes) for layer, *sizes in zip(HEAD_LAYERS, inputs, outputs, strict=True)}
        text_encoder = BlipTextModel(text, add_pooling_layer=False)
        model = ImageRewardModel(BlipVisionModel(vision), text_encoder, nn.ModuleDict(head))
    # a buffer that no state dict holds
    text_encoder.embeddings.position_ids = torch.arange(text.max_position_embeddings).expand(1, -1)
    return model


def _check_names(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    expected = {checkpoint_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys() - UNUSED
    if missing or unknown or shapes:
        raise RewardError(_difference(file, missing, unknown, shapes))


def _difference(
    file: Path, missing: Iterable[str] = (), unknown: Iterable[str] = (), shapes: Iterable[str] = ()
) -> str:
    found = [
        f"{kind}: {', '.join(sorted(names))}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    return (
        f"{file} does not fit ImageReward and its {CONFIG}: {'; '.join(found)}; expected the checkpoint of {REPOSITORY}"
    )
