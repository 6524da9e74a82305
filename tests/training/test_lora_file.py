"""Adapters as peft and diffusers themselves write them, read into a bank that then computes what peft computes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crd_fast import backbones
from crd_fast.backbones import Backbone
from crd_fast.errors import CheckpointError
from crd_fast.lora import LoRABank
from crd_fast.lora_file import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS, find_adapter, read_adapter
from crd_fast.snapshots import TRAINED
from tests.pipelines import sd3

RANK, TARGETS = 3, ["up", "down", "keep_down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)
        self.keep_down = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.keep_down(x) + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.up = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.up(x)


def plain() -> Model:
    torch.manual_seed(1)
    return Model()


def peft_model(**settings: Any) -> PeftModel:
    """The plain model with a peft adapter that changes it."""
    model = get_peft_model(
        plain(), LoraConfig(**{"r": RANK, "target_modules": TARGETS, "init_lora_weights": False} | settings)
    )
    return model.eval()


def through_bank(path: Path, x: Tensor, rank: int = RANK) -> Tensor:
    """The plain model's outputs with the adapter at `path`, read from the file. The bank's own alpha is another."""
    model = plain()
    bank = LoRABank(model, TARGETS, rank=rank, alpha=0.7 * rank, seed=0)
    bank.load(read_adapter(str(path)))
    with bank.use(TRAINED), torch.no_grad():
        return model(x)


def assert_same_outputs(model: PeftModel, path: Path) -> None:
    x = torch.randn(4, 2, 6)
    with torch.no_grad():
        expected = model(x)
    assert (expected - plain()(x)).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(through_bank(path, x), expected, rtol=1e-5, atol=1e-5)


SETTINGS = {
    "alpha is rank": {"lora_alpha": RANK},
    "alpha is not rank": {"lora_alpha": 7},
    "rslora": {"lora_alpha": 7, "use_rslora": True},
    "alpha of some layers": {"lora_alpha": 7, "alpha_pattern": {"up": 2}},
    "alpha of some layers, rslora": {"lora_alpha": 7, "alpha_pattern": {"up": 2}, "use_rslora": True},
    "alpha of one layer, whose name ends another's": {"lora_alpha": 7, "alpha_pattern": {"down": 20}},
    "alpha by a regular expression": {"lora_alpha": 7, "alpha_pattern": {r"blocks\.[1-9]\.(up|down)": 20}},
    "alpha of a full name": {"lora_alpha": 7, "alpha_pattern": {"^up": 20}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_peft_saves_computes_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    model = peft_model(**settings)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, tmp_path)
    assert_same_outputs(model, tmp_path / PEFT_WEIGHTS)


def test_a_bf16_adapter_is_scaled_in_fp32(tmp_path: Path) -> None:
    """peft keeps an adapter in fp32 whatever the file's dtype, and 7 / 3 of a bf16 number is seldom one."""
    state = {name: tensor.bfloat16() for name, tensor in get_peft_model_state_dict(peft_model(lora_alpha=7)).items()}
    save_file(state, tmp_path / PEFT_WEIGHTS)
    peft_model(lora_alpha=7).peft_config["default"].save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(plain(), tmp_path).eval()
    assert_same_outputs(model, tmp_path)


@pytest.mark.parametrize("prefix", ["", "transformer.", "unet.", "base_model.model."])
def test_alpha_tensors_scale_their_layer(prefix: str, tmp_path: Path) -> None:
    model = peft_model(lora_alpha=7, alpha_pattern={"blocks.1.up": 2})
    state = {
        name.replace("base_model.model.", prefix): tensor for name, tensor in get_peft_model_state_dict(model).items()
    }
    layers = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    alphas = {f"{name}.alpha": torch.tensor(2.0 if name.endswith("blocks.1.up") else 7.0) for name in layers}
    save_file(state | alphas, tmp_path / WEIGHTS)
    assert_same_outputs(model, tmp_path)


def test_without_any_alpha_the_scale_is_one(tmp_path: Path) -> None:
    model = peft_model(lora_alpha=RANK)
    save_file(get_peft_model_state_dict(model), tmp_path / WEIGHTS)
    assert_same_outputs(model, tmp_path)


# --- diffusers ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.save(tmp_path_factory.mktemp("sd3"))


def sd3_backbone(pipeline: Path) -> Backbone:
    return backbones.load(str(pipeline), options=sd3.OPTIONS)


def with_diffusers_adapter(pipeline: Path, **settings: Any) -> Backbone:
    backbone = sd3_backbone(pipeline)
    torch.manual_seed(5)
    backbone.transformer.add_adapter(  # type: ignore[operator]
        LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": ["to_q", "to_add_out"]} | settings)
    )
    return backbone


def assert_same_velocities(pipeline: Path, adapted: Backbone, path: Path) -> None:
    backbone = sd3_backbone(pipeline)
    embedded = backbone.encode_prompts(["2 squares", "3 squares"])
    x, sigma = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        without, expected = (b.predict(x, sigma, embedded) for b in (backbone, adapted))
    bank = LoRABank(backbone.transformer, ["to_q", "to_add_out"], rank=2, alpha=3.0, seed=0)
    bank.load(read_adapter(str(path)))
    with torch.no_grad():
        ours = bank.predict(backbone, [(TRAINED, 2)], x, sigma, embedded)
    assert (expected - without).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


DIFFUSERS_SETTINGS = {
    "alpha": {"lora_alpha": 5},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "alpha of some layers": {"lora_alpha": 5, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 9}},
}


@pytest.mark.parametrize("settings", DIFFUSERS_SETTINGS.values(), ids=DIFFUSERS_SETTINGS)
def test_what_a_pipeline_saves_with_metadata(settings: dict[str, Any], pipeline: Path, tmp_path: Path) -> None:
    adapted = with_diffusers_adapter(pipeline, **settings)
    transformer: Any = adapted.transformer
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    assert_same_velocities(pipeline, adapted, tmp_path)


def test_what_a_pipeline_saves_without_metadata(pipeline: Path, tmp_path: Path) -> None:
    """The file says nothing of alpha: it is the rank, as for the pipeline that loads the file."""
    saved: Any = with_diffusers_adapter(pipeline, lora_alpha=5).transformer
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(saved))
    loaded = sd3_backbone(pipeline)
    loaded.pipeline.load_lora_weights(tmp_path)
    assert_same_velocities(pipeline, loaded, tmp_path)


def test_what_a_model_saves_itself(pipeline: Path, tmp_path: Path) -> None:
    adapted = with_diffusers_adapter(pipeline, lora_alpha=5)
    adapted.transformer.save_lora_adapter(tmp_path)  # type: ignore[operator]
    assert_same_velocities(pipeline, adapted, tmp_path)


# --- places ---


def test_the_file_is_found_in_a_run_directory_and_a_folder(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "folder"
    (run / "lora").mkdir(parents=True)
    folder.mkdir()
    for file in (run / "lora" / WEIGHTS, folder / WEIGHTS):
        save_file({"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}, file)
    assert find_adapter(str(run)) == find_adapter(str(run / "lora")) == run / "lora" / WEIGHTS
    assert find_adapter(str(folder)) == find_adapter(str(folder / WEIGHTS)) == folder / WEIGHTS


# --- errors ---


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / WEIGHTS):
        with pytest.raises(CheckpointError, match=f"no LoRA at {path}: expected {WEIGHTS}"):
            read_adapter(str(path))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_damaged_file(keep: int, tmp_path: Path) -> None:
    peft_model(lora_alpha=7).save_pretrained(tmp_path)
    file = tmp_path / PEFT_WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"LoRA file {file} cannot be read"):
        read_adapter(str(tmp_path))


def test_damaged_settings(tmp_path: Path) -> None:
    peft_model(lora_alpha=7).save_pretrained(tmp_path)
    settings = tmp_path / PEFT_CONFIG
    settings.write_text(settings.read_text()[:-20])
    with pytest.raises(CheckpointError, match="not JSON"):
        read_adapter(str(tmp_path))


def test_nothing_in_it_is_a_lora(tmp_path: Path) -> None:
    save_file(plain().state_dict(), tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"has no \*.lora_A.weight: it holds \['blocks.0.down.bias'"):
        read_adapter(str(tmp_path))


MORE = {
    "magnitudes": {"target_modules": ["up"], "use_dora": True},
    "biases": {"target_modules": ["up"], "lora_bias": True},
    "whole layers": {"target_modules": ["up"], "modules_to_save": ["down"]},
}


@pytest.mark.parametrize("settings", MORE.values(), ids=MORE)
def test_more_than_a_lora_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Magnitudes, biases and whole layers change the outputs; without them the adapter is another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # peft takes a bias' single dimension for a shard
        peft_model(lora_alpha=7, **settings).save_pretrained(tmp_path)
    names = load_file(tmp_path / PEFT_WEIGHTS)
    extra = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    assert extra and len(extra) < len(names)
    with pytest.raises(CheckpointError) as error:
        read_adapter(str(tmp_path))
    assert any(name in str(error.value) for name in extra), "the message names what cannot be read"


def test_another_rank(tmp_path: Path) -> None:
    peft_model(lora_alpha=7).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="rank 3.*expected rank 4.*set lora.rank to the adapter's"):
        through_bank(tmp_path, torch.zeros(1, 6), rank=4)


def test_a_rank_of_its_own_for_one_layer(tmp_path: Path) -> None:
    peft_model(lora_alpha=7, rank_pattern={"blocks.1.up": 5}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="LoRA layer blocks.1.up in the file has rank 5.*expected rank 3"):
        through_bank(tmp_path, torch.zeros(1, 6))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["up", "down"], "blocks.0.keep_down.lora_A.weight is missing from the file"),
        (["blocks.0.keep_down"], "missing from the file"),
    ],
)
def test_fewer_layers(targets: list[str], message: str, tmp_path: Path) -> None:
    peft_model(lora_alpha=7, target_modules=targets).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        through_bank(tmp_path, torch.zeros(1, 6))


def test_more_layers(tmp_path: Path) -> None:
    peft_model(lora_alpha=7).save_pretrained(tmp_path)
    bank = LoRABank(plain(), ["up", "down"], rank=RANK, alpha=1.0, seed=0)
    with pytest.raises(CheckpointError, match="blocks.0.keep_down.lora_A.weight is in the file but not adapted here"):
        bank.load(read_adapter(str(tmp_path)))


def test_metadata_that_is_not_json(tmp_path: Path) -> None:
    tensors = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"lora_adapter_metadata": json.dumps({"lora_alpha": 2})[:-1]})
    with pytest.raises(CheckpointError, match="not JSON"):
        read_adapter(str(tmp_path))
