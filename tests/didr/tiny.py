"""A DIDR trainer on tiny random pipelines of the real classes, with a reward of the tests' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import crd_fast
from crd_fast import cli
from crd_fast.data.prompts import PromptSet
from crd_fast.didr.networks import Networks
from crd_fast.didr.recipe import DIDRRecipe, build_recipe
from crd_fast.didr.trainer import DIDRTrainer
from crd_fast.ranks import Ranks
from crd_fast.training.models import load_backbone, load_generator
from crd_fast.training.stop import StopRequest
from tests import pipelines
from tests.rewards.clip_models import save_clip

ADAPTER = "lora/pytorch_lora_weights.safetensors"  # of a run directory
PROMPTS = ("2 squares", "3 squares", "a circle")
# what a tiny pipeline of a family is loaded with
MODEL: dict[str, dict[str, Any]] = {
    "sd3": {"max_sequence_length": 1},
    "sdxl": {},
    "z_image": {"max_sequence_length": 64, "resolution": 64},
}
START = {"sd3": 1.0, "sdxl": 0.399, "z_image": 1.0}


class Redness(nn.Module):
    """A learned-looking reward: how red an image is, by weights that must stay as they are. See `Reward`."""

    name = "redness"
    requires: frozenset[str] = frozenset()
    differentiable = True
    range: tuple[float, float] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.colors = nn.Parameter(torch.tensor([2.0, -1.0, -1.0]))
        self.calls = 0

    def forward(self, images: Tensor, prompts: Any, metadata: Any) -> dict[str, Tensor]:
        return {self.name: self.differentiable_scores(images, prompts, metadata).detach().cpu()}

    def differentiable_scores(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        assert len(images) == len(prompts) == len(metadata)
        self.calls += 1
        return images.mean((2, 3)) @ self.colors


def recipe_tree(family: str, folder: Path, prompts: Path | str = "prompts.txt", **train: Any) -> dict[str, Any]:
    settings = {"epochs": 2, "steps": 2, "batch": 4, "micro_batch": 2, "ta_ratio": 2, "ta_warmup": 0, "ema": 0.5}
    return {
        "model": {"path": str(folder), **MODEL[family]},
        "data": {"prompts": str(prompts)},
        "reward": {"name": "clipscore"},
        "algorithm": {"beta": 0.05, "guidance_scale": 3.0},
        "generator": {"start": START[family]},
        "lora": {"rank": 2, "alpha": 4},
        "train": settings | {"lr": 1e-2, "ta_lr": 1e-2, "checkpoint_every": 1} | train,
        "precision": {"dtype": "fp32"},
        "evaluation": {"images": 4, "steps": 2},
    }


def make_recipe(family: str, folder: Path, sections: dict[str, Any] | None = None, **train: Any) -> DIDRRecipe:
    """sections: keys to add to some sections of the recipe."""
    tree = recipe_tree(family, folder, **train)
    for name, values in (sections or {}).items():
        tree[name] = tree.get(name, {}) | values
    return build_recipe(tree, "tiny")


def make_trainer(recipe: DIDRRecipe, reward: Any = None, origin: bool | str = False) -> DIDRTrainer:
    """origin: the generator has a model of its own: the reference's once more, or the one at this path."""
    backbone = load_backbone(recipe.model, "fp32", torch.device("cpu"))
    path = origin if isinstance(origin, str) else recipe.model.path
    own = load_generator(path, backbone, recipe.model, "fp32") if origin else None
    networks = Networks.build(recipe, backbone, own)
    embedded = backbone.encode_prompts(["", *PROMPTS])
    prompts = PromptSet(PROMPTS, tuple({} for _ in PROMPTS), "tiny")
    return DIDRTrainer(
        recipe,
        networks,
        prompts,
        embedded[1:],
        embedded[:1],
        reward or Redness(),
        recipe.algorithm.beta,
        StopRequest(),
        Ranks(),
    )


def scramble(trainer: DIDRTrainer, *slots: str) -> None:
    """Give slots parameters of their own, so that the scores differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for slot in slots:
            for tensor in trainer.networks.sets_of(slot).tensors(slot):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def state(trainer: DIDRTrainer) -> dict[str, Tensor]:
    """Everything there is, by the network it belongs to: adapters, frozen models, autoencoder, reward."""
    networks = trainer.networks
    tensors = {name: tensor.detach().clone() for name, tensor in networks.named_tensors().items()}
    banks = [".down_", ".up_"]
    for name, tensor in networks.backbone.transformer.state_dict().items():
        if not any(bank in name for bank in banks):
            tensors[f"reference.{name}"] = tensor.clone()
    for name, tensor in networks.backbone.pipeline.vae.state_dict().items():
        tensors[f"vae.{name}"] = tensor.clone()
    assert isinstance(trainer.reward, Redness)
    return tensors | {f"reward.{name}": tensor.clone() for name, tensor in trainer.reward.state_dict().items()}


def moved(trainer: DIDRTrainer, before: dict[str, Tensor]) -> set[str]:
    now = state(trainer)
    assert now.keys() == before.keys()
    return {name.partition(".")[0] for name in now if not torch.equal(now[name], before[name])}


def added_noise(x0: Tensor, draw: Any) -> Tensor:
    """The noise of a draw, like x0."""
    return crd_fast.noise(x0, torch.ones(len(x0)), seed=draw.eps.seed, sample_ids=draw.eps.sample_ids).x_t


def save_pipeline(family: str, folder: Path) -> Path:
    return pipelines.family(family).save(folder)


def make_world(folder: Path) -> Path:
    """A pipeline of each family, a reward's model, and a recipe of each family beside them."""
    save_clip(folder / "clip")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    for family in MODEL:
        tree = recipe_tree(family, save_pipeline(family, folder / family), folder / "prompts.txt")
        tree["reward"] = {"name": "clipscore", "options": {"model": str(folder / "clip")}}
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(tree))
    return folder


def didr(recipe: Path, *arguments: str, code: int = 0) -> None:
    assert cli.main(["didr", str(recipe), *arguments]) == code


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics without the wall clock."""
    timed = ("seconds", "samples_per_second", "elapsed_seconds")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
