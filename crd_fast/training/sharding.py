"""Parameters spread over ranks with FSDP2, block by block; adapters stay whole on every rank.

A LoRA's tensors are small: they are replicated and their gradients averaged in one all-reduce, whatever happens to the
frozen backbone. Full fine-tuning shards the trained model and its copies alike, with gradients reduced in fp32.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from crd_fast.backbones.base import Backbone
from crd_fast.errors import ConfigError
from crd_fast.full_finetuning import FullCopies
from crd_fast.lora import LoRABank
from crd_fast.ranks import Ranks
from crd_fast.snapshots import BASE, ParameterSets


def shard(sets: ParameterSets, backbone: Backbone, sharding: str, ranks: Ranks) -> None:
    """Shard the backbone and whatever is trained, in place. sharding: "replicate" does nothing, "fsdp", "hsdp".

    Raises ConfigError when there is one rank, or nodes of unequal size for "hsdp".
    """
    if sharding == "replicate":
        return
    if ranks.world == 1:
        raise ConfigError(f"train.sharding is {sharding!r} but there is one rank: start the job with torchrun")
    mesh = _mesh(backbone.device.type, sharding, ranks)
    if isinstance(sets, FullCopies):
        # inputs as the base gets them: times and rotary tables in fp32 are so on purpose
        policy = MixedPrecisionPolicy(backbone.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for slot, module in sets.modules.items():
            _shard_blocks(
                module, backbone.block_lists, mesh, mp_policy=policy if slot != BASE else MixedPrecisionPolicy()
            )
        sets.sharded = True
        sets.fill()
    if isinstance(sets, LoRABank):
        adapters = {tensor for slot in sets.slots for tensor in sets.tensors(slot)}
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise ConfigError(f"train.sharding with a LoRA needs torch >= 2.7, this is {torch.__version__}")
        _shard_blocks(backbone.transformer, backbone.block_lists, mesh, ignored_params=adapters)
        sets.merges = False  # a sharded weight has no place for a merged one


def _mesh(device: str, sharding: str, ranks: Ranks) -> DeviceMesh:
    if sharding == "fsdp":
        return init_device_mesh(device, (ranks.world,), mesh_dim_names=("shard",))
    if ranks.world % ranks.local_world:
        raise ConfigError(f"train.sharding is 'hsdp' but {ranks.world} ranks are not a multiple of {ranks.local_world}")
    shape = (ranks.world // ranks.local_world, ranks.local_world)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def _shard_blocks(model: nn.Module, block_lists: Iterable[str], mesh: DeviceMesh, **options: Any) -> None:
    for name in block_lists:
        for block in model.get_submodule(name).children():
            fully_shard(block, mesh=mesh, **options)
    # of its own accord a root keeps its parameters whole after a forward pass; snapshots are moved as shards
    fully_shard(model, mesh=mesh, reshard_after_forward=True, **options)
