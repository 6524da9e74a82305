"""The CRD loss as a diffusion loss of verl-omni (`actor_rollout_ref.actor.diffusion_loss.loss_mode=crd`).

It takes the place of that project's DiffusionNFT loss: same adapters, same engine, same rollouts. Importing this file
registers it; the driver and every worker import it with ::

    actor_rollout_ref.model.algorithm=diffusion_nft
    actor_rollout_ref.model.external_lib=examples.dropin.verl_omni
    actor_rollout_ref.actor.diffusion_loss.loss_mode=crd
    actor_rollout_ref.actor.diffusion_loss.ref_kl_coef=0.1

with this repository's root on PYTHONPATH. A copy of the file elsewhere needs another name, and this folder must not be
on the path itself: either would hide the package `verl_omni` behind this file.

What has to be added to verl-omni:

1. `workers/config/diffusion/actor.py`: "crd" in the list of loss modes that `DiffusionLossConfig` accepts, and a field
   for every setting of `SETTINGS` that is to differ from its default (`crd_beta: float = 1.0` and so on).
2. `trainer/diffusion/ray_diffusion_trainer.py`: "crd" beside "diffusion_nft" where the trainer checks which loss an old
   adapter goes with.
3. `workers/engine/fsdp/diffusers_impl.py`, forward step of the NFT engine, where the data for the loss are made::

       data["advantages"] = micro_batch["advantages"][:, step]
       tu.assign_non_tensor(data, uid=micro_batch["uid"])

4. `workers/utils/losses.py`, first line of `diffusion_loss`, because it does not hand its data-parallel group on::

       config.global_batch_info["dp_group"] = dp_group

   The group is the mesh's "dp" dimension under sequence parallelism, whose other ranks hold the same samples again. Set
   it to None instead to center within each micro-batch of each rank.

Groups reach over data-parallel ranks but not over micro-batches: keep `actor.shuffle=false`, and a micro-batch of all
ranks together a multiple of `rollout.n`. A sample whose group is elsewhere has no policy gradient; the metric
`actor/singleton_groups` counts those. All samples of a prompt are trained at the same timesteps, which
`prepare_actor_batch` sees to.

The loss is the mean over the micro-batch. Division by accumulation steps and multiplication by the sequence-parallel
size happen around it, in `diffusion_loss`, as for every loss there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from verl_omni.trainer.diffusion.diffusion_algos import (
    DiffusionLossFn,
    DiffusionLossResult,
    DiffusionNFTLoss,
    register_diffusion_loss,
)

import crd_fast
from crd_fast import CRDConfig

# Field of CRDConfig -> name in verl-omni's loss config. Two are fields it has; of these ref_kl_coef is 0 by default,
# which switches the anchor off, where the paper has 0.1.
SETTINGS = {
    "adv_clip": "adv_clip_max",
    "kl_coef": "ref_kl_coef",
    "beta": "crd_beta",
    "adaptive_weight": "crd_adaptive_weight",
    "adaptive_kl": "crd_adaptive_kl",
    "temperature": "crd_temperature",
    "loss_type": "crd_loss_type",
    "centering": "crd_centering",
}
DEFAULTS = CRDConfig()


@register_diffusion_loss("crd")
class CRDLoss(DiffusionLossFn):
    """Centered reward distillation on final latents (arXiv 2603.14128)."""

    required_model_output_keys = (
        "forward_prediction",
        "old_prediction",
        "ref_forward_prediction",
        "x0",
        "xt",
        "t_expanded",
    )
    required_data_keys = ("advantages", "uid")

    @classmethod
    def compute_loss(
        cls,
        *,
        forward_prediction: Tensor,
        old_prediction: Tensor,
        ref_forward_prediction: Tensor,
        x0: Tensor,
        xt: Tensor,
        t_expanded: Tensor,
        advantages: Tensor,
        uid: Sequence[str],
        process_group: dist.ProcessGroup | None,
        config: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a micro-batch and its metrics.

        Args:
            forward_prediction, old_prediction, ref_forward_prediction: (B, *latent) velocities at xt, any float dtype.
            x0, xt: (B, *latent) clean and noisy latents.
            t_expanded: noise level in (0, 1], (B, 1, ...) or as many elements as xt, one value a sample.
            advantages: (B,), any float dtype.
            uid: B strings, one value a prompt.
            process_group: data-parallel ranks that center together; None centers within this micro-batch.
            config: actor config; its `diffusion_loss` is read with `get` under the names of `SETTINGS`.
        """
        precise = torch.promote_types(xt.dtype, torch.float32)
        t = t_expanded.to(precise)
        out = crd_fast.loss(
            forward_prediction,
            (xt.to(precise) - x0.to(precise)) / t,  # xt = (1 - t) x0 + t eps
            old=old_prediction,
            ref=ref_forward_prediction,
            advantages=advantages,
            group_ids=group_ids(uid, t.flatten(1)[:, 0]),
            process_group=process_group,
            config=settings(config.diffusion_loss),
        )
        metrics = {
            "actor/policy_loss": out.policy_loss,
            "actor/ref_kl_loss": out.metrics["kl"],
            "actor/reward_prob_mean": out.metrics["reward_mapped_mean"],
            "actor/total_loss": out.loss.detach(),
            "actor/implicit_reward_mean": out.metrics["implicit_reward_mean"],
            "actor/implicit_reward_std": out.metrics["implicit_reward_std"],
            "actor/singleton_groups": out.metrics["singleton_groups"],
        }
        values = torch.stack(list(metrics.values())).tolist()  # one wait for the device
        return out.loss, dict(zip(metrics, values, strict=True))

    def __call__(self, *, config: Any, model_output: dict[str, Any], data: Any) -> DiffusionLossResult:
        """`compute_loss` on what the engine hands over; all ranks of the data-parallel group call it together."""
        if "dp_group" not in config.global_batch_info:
            raise KeyError(
                'config.global_batch_info: expected the data-parallel group under "dp_group", got keys '
                f"{sorted(config.global_batch_info)}; set it at the top of verl-omni's `diffusion_loss`, or set None "
                "to center within each micro-batch"
            )
        loss, metrics = self.compute_loss(
            **{name: model_output[name] for name in self.required_model_output_keys},
            advantages=data["advantages"],
            uid=data["uid"],
            process_group=config.global_batch_info["dp_group"],
            config=config,
        )
        return DiffusionLossResult(loss=loss, metrics=metrics)

    @staticmethod
    def prepare_actor_batch(batch: Any, reward_tensor: Tensor, config: Any) -> Any:
        """The batch as DiffusionNFT prepares it, but with one order of timesteps for all samples of a prompt."""
        rollout_timesteps = batch.batch["train_timesteps"]  # (B, T), before they are permuted
        batch = DiffusionNFTLoss.prepare_actor_batch(batch, reward_tensor, config)
        permuted = batch.batch["train_timesteps"]  # (B, trained)
        uid = batch.non_tensor_batch["uid"]
        batch.batch["train_timesteps"] = shared_timesteps(rollout_timesteps, uid, permuted.shape[1]).to(permuted.dtype)
        return batch


def settings(loss_config: Any) -> CRDConfig:
    """`CRDConfig` from verl-omni's loss config, with our default for every name that it lacks."""
    return CRDConfig(**{ours: loss_config.get(name, getattr(DEFAULTS, ours)) for ours, name in SETTINGS.items()})


def group_ids(uid: Sequence[str], t: Tensor) -> Tensor:
    """(B,) int64 on t's device, equal where prompt and timestep are equal, and the same on every rank.

    The sum, modulo 2^64, of a hash of the uid and the bits of t, so different t of one prompt never share an id, and
    n groups do with a chance of about n^2 / 2^65. uid: B strings; t: (B,) float.
    """
    if len(uid) != len(t):
        raise ValueError(f"uid: expected {len(t)}, one for each sample, got {len(uid)}; pass the micro-batch's own")
    return torch.tensor([_hashed(prompt) for prompt in uid], device=t.device) + t.double().view(torch.int64)


def shared_timesteps(timesteps: Tensor, uid: Sequence[str], count: int) -> Tensor:
    """`count` of the timesteps (B, T) in random order, (B, count); the order is drawn from the prompt's uid.

    Raises:
        ValueError: two samples of a prompt have different timesteps, or one has 0 after rounding down, where a noisy
            latent does not tell the noise.
    """
    rows: dict[str, Tensor] = {}
    for prompt, row in zip(uid, timesteps, strict=True):
        if not torch.equal(rows.setdefault(prompt, row), row):
            raise ValueError(
                f"train_timesteps: expected one row for all samples of prompt {prompt!r}, got "
                f"{rows[prompt].tolist()} and {row.tolist()}; their residuals could not be compared"
            )
    if bool((timesteps < 1).any()):
        raise ValueError(
            f"train_timesteps: expected timesteps of 1 to 1000, got {timesteps.min().item()}; leave out the final 0"
        )
    orders = {
        prompt: torch.randperm(timesteps.shape[1], generator=torch.Generator().manual_seed(_hashed(prompt)))[:count]
        for prompt in rows
    }
    return torch.stack([row[orders[prompt].to(row.device)] for prompt, row in zip(uid, timesteps, strict=True)])


def _hashed(prompt: str) -> int:
    """64 bits as a signed number."""
    return int.from_bytes(hashlib.blake2b(str(prompt).encode(), digest_size=8).digest(), "little", signed=True)
