"""The model as a recipe wants it run: precisions, attention, recomputation, compilation, sharding, in that order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from crd_fast.acceleration.attention import use_attention
from crd_fast.acceleration.compilation import CompileCounter, CompileMetrics, compile_blocks
from crd_fast.acceleration.float8_training import convert_for_full_finetuning
from crd_fast.acceleration.fp8 import require_fp8
from crd_fast.acceleration.precision import FP8, Precisions, apply_precisions
from crd_fast.acceleration.recompute import checkpoint_blocks
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.full_finetuning import FullCopies
from crd_fast.lora import LoRABank
from crd_fast.ranks import Ranks
from crd_fast.snapshots import OLD, SAMPLING, TRAINED, ParameterSets
from crd_fast.training.config import AccelerationSettings, Recipe
from crd_fast.training.flops import forward_flops
from crd_fast.training.sharding import shard


class Prepared:
    """What became of the model: its precisions, and what its compiler has done. forward_flops: of one sample."""

    def __init__(self, precisions: Precisions, counters: Sequence[CompileCounter], forward_flops: float) -> None:
        self.precisions = precisions
        self.compiling = CompileMetrics(counters)
        self.forward_flops = forward_flops


def prepare(
    sets: ParameterSets, backbone: Backbone, recipe: Recipe, ranks: Ranks, conditioning: Conditioning
) -> Prepared:
    """Apply a recipe's precision, acceleration and sharding to the backbone's model and its copies, in place.

    conditioning: of any one prompt, to count the model's arithmetic with.

    Raises ConfigError for what the device, an installed package or the model does not allow.
    """
    flops = forward_flops(sets, backbone, conditioning)
    roles = recipe.precision.roles()
    settings = recipe.acceleration
    modules = modules_of(sets, backbone)
    if isinstance(sets, FullCopies):
        _round_copies(sets, backbone, roles)
        roles = {role: precision if role == "ref" else recipe.precision.dtype for role, precision in roles.items()}
    # of full copies, the frozen base is the one model whose layers are switched
    precisions = apply_precisions(backbone.transformer, backbone.block_lists, roles)
    if isinstance(sets, LoRABank) and roles["rollout"] == FP8:
        sets.merges = False  # a merged weight would have to be rounded anew for every rollout
    counters = accelerate(modules, backbone, settings)
    shard(sets, backbone, recipe.train.sharding, ranks)
    return Prepared(precisions, counters, flops)


def modules_of(sets: ParameterSets, backbone: Backbone) -> list[nn.Module]:
    """The backbone's model, and its copies where it has any."""
    return list(sets.modules.values()) if isinstance(sets, FullCopies) else [backbone.transformer]


def accelerate(
    modules: Sequence[nn.Module], backbone: Backbone, settings: AccelerationSettings
) -> list[CompileCounter]:
    """Apply attention, recomputation and compilation to the backbone's model and its copies, in place."""
    for module in modules:
        backbone.attention = use_attention(module, settings.attention)
    counters = []
    for module in modules:
        checkpoint_blocks(module, backbone.block_lists, settings.recompute, around=backbone.attention)
        if settings.compile:
            counters.append(compile_blocks(module, backbone.block_lists))
    return counters


def _round_copies(sets: FullCopies, backbone: Backbone, roles: dict[str, str]) -> None:
    """Full fine-tuning: each slot but the base has one role and a model of its own, with weights that change."""
    for slot, role in ((TRAINED, "train"), (OLD, "old"), (SAMPLING, "rollout")):
        if roles[role] == FP8:
            require_fp8(backbone.device)  # copies that are to be sharded are on none yet
            convert_for_full_finetuning(sets.modules[slot], backbone.block_lists)
