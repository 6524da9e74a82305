from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from crd_fast.didr import recipe as didr
from crd_fast.errors import ConfigError
from crd_fast.training.config import build_recipe, dump_recipe, load_recipe

ROOT = Path(__file__).parents[2]
LEAST = {"model": {"path": "m"}, "data": {"prompts": "p"}, "rewards": {"geneval": {"weight": 2, "score": "strict"}}}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_recipes_load_and_round_trip(path: Path) -> None:
    load, build, dump = load_recipe, build_recipe, dump_recipe
    if path.stem.endswith("_didr"):
        load, build, dump = didr.load_recipe, didr.build_recipe, didr.dump_recipe
    recipe = load(path)
    assert build(yaml.safe_load(dump(recipe)), path.stem) == recipe


def test_defaults_are_the_papers() -> None:
    recipe = build_recipe(LEAST, "x")
    algorithm, train = recipe.algorithm, recipe.train
    assert (algorithm.beta, algorithm.kl_coef, algorithm.guidance_scale, algorithm.adv_clip) == (1.0, 0.1, 4.5, 5.0)
    assert (train.groups, train.group_size, train.updates, train.lr) == (48, 24, 2, 3e-4)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.rollout.steps) == (32, 64.0, 10)
    assert [recipe.snapshots.old.at(e) for e in (0, 10, 1000)] == [0.25, 0.3, 0.999]
    assert [recipe.snapshots.sampling.at(e) for e in (0, 74, 75, 85)] == [0.0, 0.0, 0.0, 0.075]


def test_overrides_and_numbers_yaml_reads_as_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    recipe = load_recipe(file, ["train.lr=1e-4", "algorithm.temperature=inf", "run.dir=/tmp/x", "model.family=null"])
    assert recipe.train.lr == 1e-4 and recipe.algorithm.temperature == float("inf")
    assert recipe.run.dir == "/tmp/x" and recipe.model.family is None
    assert recipe.rewards["geneval"].spec.weight == 2 and recipe.rewards["geneval"].options.score == "strict"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.lr=1", "unknown key trian; did you mean 'train'"),
        ("train.learning_rate=1", "unknown key train.learning_rate"),
        ("train.epoch=1", "unknown key train.epoch; did you mean 'epochs'"),
        ("rewards.ocr.weigt=1", "unknown key rewards.ocr.weigt; did you mean 'weight'"),
        ("rewards.genevall.weight=1", "unknown reward 'genevall'; did you mean 'geneval'"),
        ("train.epochs=1.5", "train.epochs is 1.5: expected a whole number"),
        ("train.lr=fast", "train.lr is 'fast': expected a number"),
        ("acceleration.recompute=off", "recompute is False: expected text; YAML reads off, no or false so"),
        ("algorithm.adaptive_kl=3", "algorithm.adaptive_kl is 3: expected true or false"),
        ("algorithm.beta=-1", "beta: expected a finite number > 0, got -1"),
        ("algorithm.kl_fraction=0", r"kl_fraction is 0.0: expected a share in \(0, 1\]"),
        ("algorithm.reduction=sum", "belong to the loss"),
        ("snapshots.old.initial=2", "snapshot decay initial is 2"),
        ("precision.dtype=fp8", "precision.dtype is 'fp8': expected one of 'fp32', 'bf16'"),
        ("evaluation.suite=shape", "did you mean 'shapes'"),
        ("evaluation.batch=0", "evaluation.batch is 0: expected at least 1"),
        ("train.timestep_strategy=logitnormal", "did you mean 'logit_normal'"),
        ("train.timestep_std=0", "train.timestep_std is 0.0: expected more than 0"),
        ("train.weight_decay=-1", "train.weight_decay is -1.0: expected 0 or more"),
        ("train.max_skipped=0", "train.max_skipped is 0: expected at least 1"),
        ("train.lr=.inf", "train.lr is inf: expected more than 0, and finite"),
        ("train.lr=.nan", "train.lr is nan: expected a number"),
        ("train.max_minutes=-1", "train.max_minutes is -1.0: expected more than 0"),
        ("train.weight_decay=.inf", "train.weight_decay is inf: expected 0 or more, and finite"),
        ("train.timestep_mean=-.inf", "train.timestep_mean is -inf: expected a finite number"),
        ("lora.alpha=0", "lora.alpha is 0.0: expected more than 0"),
        ("lora.rank=0", "lora.rank is 0: expected at least 1"),
        ("algorithm.guidance_scale=.inf", "algorithm.guidance_scale is inf: expected a finite number"),
        ("algorithm.advantage_mode=gdop", "algorithm.advantage_mode is 'gdop': .*did you mean 'gdpo'"),
        ("algorithm.advantage_scope=x", "algorithm.advantage_scope is 'x': expected one of 'global', 'group'"),
        ("evaluation.reference_guidance=.inf", "evaluation.reference_guidance is inf"),
        ("rewards.ocr=1", "rewards.ocr is 1: expected a section of options"),
        ("train.parameters=none", "expected one of 'lora', 'full'$"),
        ("lora.targets=attn", "lora.targets is 'attn': expected a list"),
        ("rollout.steps=0", "rollout.steps is 0"),
        ("model=3", "model is 3: expected a section with path"),
        ("train", "expected key=value"),
        ("train.lr.x=1", "train.lr is 'x'|lr is a value|train.lr is"),
    ],
)
def test_wrong_keys_and_values_say_what_is_right(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    with pytest.raises(ConfigError, match=message):
        load_recipe(file, [override])


def test_what_can_never_train_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="advantage_scope is 'group' but algorithm.advantage_mode is 'gdpo'"):
        build_recipe(LEAST | {"algorithm": {"advantage_mode": "gdpo", "advantage_scope": "group"}}, "x")
    with pytest.raises(ConfigError, match="rewards jpeg_compressibility all have weight 0"):
        build_recipe(LEAST | {"rewards": {"jpeg_compressibility": {"weight": 0}}}, "x")


def test_no_clipping_is_an_infinite_norm() -> None:
    assert build_recipe(LEAST | {"train": {"max_grad_norm": "inf"}}, "x").train.max_grad_norm == float("inf")


def test_a_recipe_of_the_other_command_names_it() -> None:
    with pytest.raises(ConfigError, match="recipe x has generator and reward, it is one of `crd-fast didr`"):
        build_recipe({"model": {"path": "m"}, "reward": {"name": "ocr"}, "generator": {}}, "x")
    with pytest.raises(ConfigError, match="recipe x has rewards, it is one of `crd-fast train`"):
        didr.build_recipe(LEAST, "x")
    with pytest.raises(ConfigError, match="unknown key reward; did you mean 'rewards'"):
        build_recipe(LEAST | {"reward": {"name": "ocr"}}, "x")


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.path is missing"):
        build_recipe(LEAST | {"model": {}}, "x")
    with pytest.raises(ConfigError, match="has no rewards"):
        build_recipe(LEAST | {"rewards": {}}, "x")
    (tmp_path / "shapes.yaml").write_text("")
    with pytest.raises(ConfigError, match="does not exist; did you mean 'shapes'"):
        load_recipe(tmp_path / "shape.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
