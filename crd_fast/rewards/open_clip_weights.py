"""Weights in open_clip's names and layout as a CLIP model of transformers.

open_clip keeps one matrix for queries, keys and values, and projections that multiply from the right; everything else
differs in names alone. Source of the layout: github.com/mlfoundations/open_clip, class CLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from crd_fast.errors import RewardError
from crd_fast.rewards.clip_embedding import ClipModel


@dataclass(frozen=True)
class OpenClipLayout:
    """What the shapes of the weights do not tell.

    Widths of an attention head in the two encoders, and the activation by transformers' name: "gelu", or "quick_gelu"
    for the models that OpenAI trained. The defaults are those of ViT-H-14.
    """

    image_head_width: int = 80
    text_head_width: int = 64
    activation: str = "gelu"


_PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so there
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_ENCODERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(?P<encoder>(?:visual\.)?transformer)\.resblocks\.(?P<index>\d+)\.(?P<rest>.+)")


def clip_from_open_clip(weights: Mapping[str, Tensor], layout: OpenClipLayout | None = None) -> ClipModel:
    """The model with exactly these weights, in their dtype.

    The architecture is read from their shapes. Texts end where open_clip takes their state: at the highest token of the
    vocabulary.

    Raises RewardError naming weights that are missing, left over or of the wrong shape.
    """
    from transformers import CLIPModel

    mapped = map_names(weights)
    config = _config(weights, layout or OpenClipLayout())
    model, info = CLIPModel.from_pretrained(
        None, config=config, state_dict=mapped, ignore_mismatched_sizes=True, output_loading_info=True
    )
    wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        found = ", ".join(f"{kind} {keys}" for kind, keys in wrong.items() if keys)
        raise RewardError(
            f"the open_clip weights do not make a CLIP model of transformers, by its names: {found}; expected the "
            "weights of one whole model"
        )
    return ClipModel(model)


def map_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each of open_clip's weights under its name, and in its layout, in transformers.

    Raises RewardError naming those that have none.
    """
    mapped: dict[str, Tensor] = {}
    unknown = []
    for key, value in weights.items():
        if key in _PLAIN:
            mapped[_PLAIN[key]] = value
        elif key in _TRANSPOSED:
            mapped[_TRANSPOSED[key]] = value.T.contiguous()
        elif parts := _in_block(key, value):
            mapped |= parts
        else:
            unknown.append(key)
    if unknown:
        raise RewardError(
            f"{len(unknown)} open_clip weights have no place in a CLIP model of transformers: {sorted(unknown)}; "
            "expected the plain CLIP architecture (a vision transformer, class-token pooling)"
        )
    return mapped


def _in_block(key: str, value: Tensor) -> dict[str, Tensor] | None:
    match = _BLOCK.fullmatch(key)
    if match is None:
        return None
    layer = f"{_ENCODERS[match['encoder']]}.encoder.layers.{match['index']}"
    if match["rest"] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = match["rest"].removeprefix("attn.in_proj_")
        width = len(value) // 3
        parts = {"q_proj": value[:width], "k_proj": value[width : 2 * width], "v_proj": value[2 * width :]}
        return {f"{layer}.self_attn.{name}.{kind}": part.contiguous() for name, part in parts.items()}
    name, _, kind = match["rest"].rpartition(".")
    return {f"{layer}.{_IN_BLOCK[name]}.{kind}": value} if name in _IN_BLOCK else None


def _config(weights: Mapping[str, Tensor], layout: OpenClipLayout) -> Any:
    from transformers import CLIPConfig

    needed = ["visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight"]
    needed += ["positional_embedding", "text_projection"]
    needed += [f"{encoder}.resblocks.0.mlp.c_fc.weight" for encoder in _ENCODERS]
    if missing := [key for key in needed if key not in weights]:
        raise RewardError(f"the open_clip weights lack {missing}: expected a whole CLIP model")

    width, channels, patch, _ = weights["visual.conv1.weight"].shape
    patches = len(weights["visual.positional_embedding"]) - 1
    vocabulary, text_width = weights["token_embedding.weight"].shape
    if isqrt(patches) ** 2 != patches:
        raise RewardError(f"the open_clip weights have positions for {patches} patches: expected a square image's")
    for name, size, head in (
        ("image", width, layout.image_head_width),
        ("text", text_width, layout.text_head_width),
    ):
        if size % head:
            raise RewardError(f"the {name} encoder is {size} wide: expected a multiple of its heads' {head}")
    projection = weights["visual.proj"].shape[1]
    return CLIPConfig(
        projection_dim=projection,
        vision_config={
            "hidden_size": width,
            "intermediate_size": len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": _depth(weights, "visual.transformer"),
            "num_attention_heads": width // layout.image_head_width,
            "num_channels": channels,
            "image_size": isqrt(patches) * patch,
            "patch_size": patch,
            "hidden_act": layout.activation,
            "projection_dim": projection,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": _depth(weights, "transformer"),
            "num_attention_heads": text_width // layout.text_head_width,
            "max_position_embeddings": len(weights["positional_embedding"]),
            "hidden_act": layout.activation,
            "projection_dim": projection,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
        },
    )


def _depth(weights: Mapping[str, Tensor], encoder: str) -> int:
    matches = (_BLOCK.fullmatch(key) for key in weights)
    return 1 + max(int(match["index"]) for match in matches if match and match["encoder"] == encoder)
