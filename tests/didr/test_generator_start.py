"""A generator that starts from a model saved without its pipeline, as a run of full fine-tuning leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crd_fast.didr.networks import EMA, GENERATOR, TA
from crd_fast.errors import ConfigError
from crd_fast.snapshots import BASE
from crd_fast.training.models import load_backbone, load_generator
from tests.didr.tiny import didr, make_recipe, make_trainer, make_world, save_pipeline, scramble

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_a_saved_model_takes_the_references_place(family: str, tmp_path: Path) -> None:
    recipe = make_recipe(family, save_pipeline(family, tmp_path / family), parameters="full")
    trainer = make_trainer(recipe)
    scramble(trainer, GENERATOR, EMA)
    trainer.networks.own.save(trainer.networks.origin, tmp_path / "saved", EMA)

    reference = load_backbone(recipe.model, "fp32", CPU)
    before = {name: tensor.clone() for name, tensor in reference.transformer.state_dict().items()}
    origin = load_generator(str(tmp_path / "saved"), reference, recipe.model, "fp32")
    saved = trainer.networks.own.named_tensors(EMA)
    loaded = dict(origin.transformer.named_parameters())
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
    assert not any(parameter.requires_grad for parameter in loaded.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.transformer.state_dict().items())


def test_a_run_starts_from_another_runs_model(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    didr(world / "sd3.yaml", f"run.dir={first}", "train.parameters=full", "train.epochs=1")
    overrides = ["train.parameters=full", "train.epochs=1", "train.lr=1e-30", "train.weight_decay=0"]
    didr(world / "sd3.yaml", f"run.dir={second}", f"generator.path={first / 'transformer'}", *overrides)
    models = [
        load_backbone(make_recipe("sd3", world / "sd3").model, "fp32", CPU).with_model(str(run / "transformer"))
        for run in (first, second)
    ]
    pairs = [dict(model.transformer.named_parameters()) for model in models]
    for name, tensor in pairs[0].items():
        torch.testing.assert_close(pairs[1][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_ta_and_the_reference_are_not_the_saved_model(tmp_path: Path) -> None:
    recipe = make_recipe("sd3", save_pipeline("sd3", tmp_path / "sd3"), parameters="full")
    trainer = make_trainer(recipe)
    scramble(trainer, EMA)
    trainer.networks.own.save(trainer.networks.origin, tmp_path / "saved", EMA)
    networks = make_trainer(recipe, origin=str(tmp_path / "saved")).networks
    base = load_backbone(recipe.model, "fp32", CPU).transformer.state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in networks.sets_of(TA).named_tensors(TA).items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in networks.backbone.transformer.state_dict().items())
    own = networks.own.named_tensors(GENERATOR)
    assert any(not torch.equal(tensor, base[name]) for name, tensor in own.items())
    x, sigma = torch.randn(2, *networks.backbone.latent_shape), torch.full((2,), 0.5)
    prompt = networks.backbone.encode_prompts(["a circle", "2 squares"])
    reference, start = (networks.predict(slot, x, sigma, prompt) for slot in (BASE, GENERATOR))
    assert not torch.equal(reference, start)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    recipe = make_recipe("sd3", save_pipeline("sd3", tmp_path / "sd3"))
    reference = load_backbone(recipe.model, "fp32", CPU)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="empty could not be loaded as a SD3Transformer2DModel"):
        load_generator(str(empty), reference, recipe.model, "fp32")
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        load_generator(str(tmp_path / "nowhere"), reference, recipe.model, "fp32")


def test_half_a_model_and_one_of_another_size(tmp_path: Path) -> None:
    recipe = make_recipe("sd3", save_pipeline("sd3", tmp_path / "sd3"))
    reference = load_backbone(recipe.model, "fp32", CPU)
    half, other = tmp_path / "half", tmp_path / "other"
    reference.transformer.save_pretrained(half)
    file = half / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="half lacks 1 tensors of its model, such as proj_out.bias"):
        load_generator(str(half), reference, recipe.model, "fp32")
    settings = {**reference.config, "num_layers": reference.config.num_layers + 1}
    type(reference.transformer).from_config(settings).save_pretrained(other)
    with pytest.raises(ConfigError, match="other is a SD3Transformer2DModel of another size: .* expected"):
        load_generator(str(other), reference, recipe.model, "fp32")
