"""The ImageReward checkpoint in transformers' modules, against the original architecture written out in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from crd_fast.errors import RewardError
from crd_fast.rewards.imagereward_weights import UNUSED, checkpoint_name, load_imagereward

CONFIG = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "vocab_size": 20,
    "encoder_width": 768,  # ignored: the image encoder's own width counts
    "add_cross_attention": True,
}
WIDTH, VISION_HEADS, PATCH, SIDE = 128, 2, 8, 16


def random_state() -> dict[str, Tensor]:
    """A checkpoint with the names of the published one, small, and as large in effect."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}

    def linear(name: str, outputs: int, *inputs: int, gain: float = 1.5) -> None:
        weight = torch.randn(outputs, *inputs, generator=generator)
        state[f"{name}.weight"] = weight * gain / weight[0].numel() ** 0.5
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) / 2

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(size, generator=generator) / 4
        state[f"{name}.bias"] = torch.randn(size, generator=generator) / 4

    def bert_attention(name: str, source: int) -> None:
        for part, inputs in (("self.query", hidden), ("self.key", source), ("self.value", source)):
            linear(f"{name}.{part}", hidden, inputs)
        linear(f"{name}.output.dense", hidden, hidden)
        norm(f"{name}.output.LayerNorm", hidden)

    vision, text, hidden = "blip.visual_encoder", "blip.text_encoder", CONFIG["hidden_size"]
    state[f"{vision}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    state[f"{vision}.pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH, generator=generator)
    linear(f"{vision}.patch_embed.proj", WIDTH, 3, PATCH, PATCH)
    for layer in range(3):
        block = f"{vision}.blocks.{layer}"
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", 96, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 96)
    norm(f"{vision}.norm", WIDTH)
    embeddings = f"{text}.embeddings"
    state[f"{embeddings}.word_embeddings.weight"] = torch.randn(CONFIG["vocab_size"], hidden, generator=generator)
    state[f"{embeddings}.position_embeddings.weight"] = torch.randn(40, hidden, generator=generator)
    state[f"{embeddings}.position_ids"] = torch.arange(40)[None]
    norm(f"{embeddings}.LayerNorm", hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        bert_attention(f"{text}.encoder.layer.{layer}.attention", hidden)
        bert_attention(f"{text}.encoder.layer.{layer}.crossattention", WIDTH)
        linear(f"{text}.encoder.layer.{layer}.intermediate.dense", CONFIG["intermediate_size"], hidden)
        linear(f"{text}.encoder.layer.{layer}.output.dense", hidden, CONFIG["intermediate_size"])
        norm(f"{text}.encoder.layer.{layer}.output.LayerNorm", hidden)
    linear("blip.vision_proj", 8, WIDTH)
    linear("blip.text_proj", 8, hidden)
    sizes = (hidden, 24, 16, 12, 8, 1)
    for layer, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        linear(f"mlp.layers.{layer}", outputs, inputs, gain=1.0)
    return state


def write(folder: Path, state: dict[str, Any], config: dict[str, Any] = CONFIG) -> Path:
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(config))
    return folder


class Original:
    """The published architecture: a ViT with fused projections, BERT with cross-attention, a linear head.

    `used` collects the entries of the checkpoint that the forward pass reads.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.used = state, set[str]()

    def __call__(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image = self.image(pixels)
        x = self.get("blip.text_encoder.embeddings.word_embeddings.weight")[ids]
        x = x + self.get("blip.text_encoder.embeddings.position_embeddings.weight")[: ids.shape[1]]
        x = self.norm("blip.text_encoder.embeddings.LayerNorm", x, 1e-12)
        for layer in range(CONFIG["num_hidden_layers"]):
            name = f"blip.text_encoder.encoder.layer.{layer}"
            x = self.bert_attention(f"{name}.attention", x, x, mask)
            x = self.bert_attention(f"{name}.crossattention", x, image, torch.ones(image.shape[:2]))
            inner = self.linear(f"{name}.intermediate.dense", x)
            inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
            x = self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", inner), 1e-12)
        score = x[:, 0]
        for layer in (0, 2, 4, 6, 7):
            score = self.linear(f"mlp.layers.{layer}", score)
        return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072

    def image(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        projection = self.get(f"{name}.patch_embed.proj.weight").flatten(1)
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # (B, patches, 3 * PATCH * PATCH)
        x = patches @ projection.T + self.get(f"{name}.patch_embed.proj.bias")
        x = torch.cat([self.get(f"{name}.cls_token").expand(len(x), 1, -1), x], 1)
        x = x + self.get(f"{name}.pos_embed")
        for layer in range(3):
            block = f"{name}.blocks.{layer}"
            query, key, value = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            mixed = attention(query, key, value, VISION_HEADS, torch.ones(x.shape[:2]))
            x = x + self.linear(f"{block}.attn.proj", mixed)
            inner = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", inner * (1 + torch.erf(inner / 2**0.5)) / 2)
        return self.norm(f"{name}.norm", x, 1e-6)

    def bert_attention(self, name: str, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        query = self.linear(f"{name}.self.query", x)
        key, value = (self.linear(f"{name}.self.{part}", source) for part in ("key", "value"))
        mixed = attention(query, key, value, CONFIG["num_attention_heads"], mask)
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", mixed), 1e-12)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.get(f"{name}.weight").T + self.get(f"{name}.bias")

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def get(self, name: str) -> Tensor:
        self.used.add(name)
        return self.state[name]


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor) -> Tensor:
    """query (B, L, D), key and value (B, S, D), mask (B, S): each head on its own."""
    mixed = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        mixed.append(logits.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1) @ v)
    return torch.cat(mixed, -1)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[2, 7, 9, 3, 0, 0], [2, 11, 3, 0, 0, 0], [2, 5, 6, 7, 8, 3]])
    return pixels, ids, (ids != 0).long()


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


def test_scores_are_those_of_the_original_architecture(tmp_path: Path) -> None:
    state = random_state()
    model = load_imagereward(str(write(tmp_path, state))).double().eval()
    original = Original(double(state))
    scores, expected = model(*inputs()), original(*inputs())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    assert original.used == state.keys() - UNUSED
    assert expected.std() > 0.1  # so that a score which ignores image and text would not pass
    assert model.image_size == SIDE and model.vocab_size == CONFIG["vocab_size"]


def test_padding_and_position_count(tmp_path: Path) -> None:
    model = load_imagereward(str(write(tmp_path, random_state()))).double().eval()
    pixels, ids, mask = inputs()
    torch.testing.assert_close(model(pixels[:2], ids[:2, :4], mask[:2, :4]), model(pixels[:2], ids[:2], mask[:2]))
    assert (
        model(pixels[:2], ids[:2], torch.ones_like(mask[:2])) - model(pixels[:2], ids[:2], mask[:2])
    ).abs().min() > 1e-3


def test_every_parameter_has_one_name_in_the_checkpoint(tmp_path: Path) -> None:
    state = random_state()
    names = [checkpoint_name(name) for name in load_imagereward(str(write(tmp_path, state))).state_dict()]
    assert len(set(names)) == len(names) and set(names) == state.keys() - UNUSED


def test_loading_takes_the_files_numbers_and_draws_none(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    model = load_imagereward(str(write(tmp_path, random_state())))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_entries_the_score_does_not_need_may_be_absent_and_safetensors_will_do(tmp_path: Path) -> None:
    state = random_state()
    expected = load_imagereward(str(write(tmp_path, state))).eval().double()(*inputs())
    (tmp_path / "ImageReward.pt").unlink()
    save_file(
        {name: value for name, value in state.items() if name not in UNUSED}, tmp_path / "ImageReward.safetensors"
    )
    assert torch.equal(load_imagereward(str(tmp_path)).eval().double()(*inputs()), expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", None, "missing: blip.visual_encoder.blocks.1.attn.qkv.bias"),
        ("blip.visual_encoder.patch_embed.proj.weight", None, "missing: blip.visual_encoder.patch_embed.proj.weight"),
        ("mlp.layers.4.weight", None, "missing: mlp.layers.4.weight"),
        ("mlp.layers.7.bias", None, "missing: mlp.layers.7.bias"),
        ("mlp.layers.8.weight", (1, 8), "unknown: mlp.layers.8.weight"),
        ("module.mlp.layers.0.weight", (24, 32), "unknown: module.mlp.layers.0.weight"),
        ("blip.text_encoder.pooler.dense.bias", (32,), "unknown: blip.text_encoder.pooler.dense.bias"),
        (
            "blip.visual_encoder.norm.bias",
            (64,),
            r"of another shape: blip.visual_encoder.norm.bias \(64,\) instead of \(128,\)",
        ),
        ("blip.visual_encoder.pos_embed", (1, 4, 128), "of another shape: blip.visual_encoder.pos_embed"),
        ("blip.visual_encoder.patch_embed.proj.weight", (100, 3, 8, 8), "has width 100: expected a multiple of 64"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    state = random_state()
    state.pop(name, None)
    if shape is not None:
        state[name] = torch.zeros(shape)
    with pytest.raises(RewardError, match=message):
        load_imagereward(str(write(tmp_path, state)))


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path, random_state(), CONFIG | {"num_hidden_layers": 3})
    with pytest.raises(RewardError, match="missing: blip.text_encoder.encoder.layer.2.attention.output.LayerNorm.bias"):
        load_imagereward(str(tmp_path))
    write(tmp_path, random_state(), {key: value for key, value in CONFIG.items() if key != "layer_norm_eps"})
    with pytest.raises(RewardError, match="has no layer_norm_eps: expected the med_config.json of zai-org/ImageReward"):
        load_imagereward(str(tmp_path))


@pytest.mark.parametrize("file", ["ImageReward.pt", "med_config.json"])
def test_a_missing_file_is_named_with_what_to_download(tmp_path: Path, file: str) -> None:
    (write(tmp_path, random_state()) / file).unlink()
    download = f"hf download zai-org/ImageReward ImageReward.pt med_config.json --local-dir {tmp_path}"
    with pytest.raises(RewardError, match=f"has no {file}: .*{download}"):
        load_imagereward(str(tmp_path))


class Payload:
    """What a pickle could do on loading."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    write(tmp_path, {"mlp.layers.0.weight": Payload(target)})
    with pytest.raises(RewardError, match="is no plain state dict"):
        load_imagereward(str(tmp_path))
    assert not target.exists()


@pytest.mark.parametrize("name", ["ImageReward.pt", "ImageReward.safetensors"])
def test_a_file_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, random_state()) / name
    if file.suffix == ".safetensors":
        save_file(random_state(), file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(
        RewardError, match=f"{name} is no plain state dict .* download it again from zai-org/ImageReward"
    ):
        load_imagereward(str(tmp_path))


def test_a_wrapped_state_dict_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"state_dict": random_state()})
    with pytest.raises(RewardError, match="holds more than a state dict"):
        load_imagereward(str(tmp_path))
