"""The CRD loss in DiffusionNFT's SD3 script (NVlabs/DiffusionNFT, `scripts/train_nft_sd3.py`).

Put this file on the script's path, import it there as `crd`, and change four places.

1. Where the epoch's samples have their advantages, the script deletes their prompt token ids. Delete the rewards only:
   the loss centers within a prompt and has to know which sample belongs to which.

2. At the top of an inner epoch, delete the draw of a random order of timesteps for each row, and let the draw of a
   random order of samples, a few lines before it, become both::

       perm, perms_time = crd.grouped_order(
           total_batch_size_filtered,
           num_timesteps_filtered,
           config.train.batch_size,
           seed=epoch * config.train.num_inner_epochs + inner_epoch,
           device=device,
       )

   A group is what shares prompt and timestep, because the size of a residual depends on the timestep. The script draws
   an order of timesteps for every sample, so a group is often a single sample, and such a group has no policy
   gradient: its reward, less its own mean, is zero. `singleton_groups` in the logs counts them. The sampler spreads the
   samples of a prompt over one sampling batch of all ranks; shuffling single samples would tear them apart as well. So
   keep `config.train.batch_size` equal to `config.sample.train_batch_size`, as shipped, or a multiple of it.

3. Inside the timestep loop, everything between the reference model's forward and the scaled loss, that is the mapping
   of the advantages to [0, 1], the positive and negative predictions with their adaptive weights, the policy loss, the
   KL term and their log entries, becomes::

       loss, loss_terms = crd.crd_loss(
           forward_prediction,
           old_prediction,
           ref_forward_prediction,
           noise,
           x0,
           train_sample_batch["advantages"][:, j_idx],
           train_sample_batch["prompt_ids"],
           train_sample_batch["timesteps"][:, j_idx],
           crd_config,
           process_group=dist.group.WORLD,
       )

   With an `adv_mode` other than "all" keep the lines that clip and change the advantages, and pass their result. Give
   the timestep's value, as above, not its column `j_idx`, which names another timestep in every permuted row. All ranks
   of this script are data-parallel, so its data-parallel group is the world; it must be named all the same.

4. Before the epochs: `crd_config = CRDConfig(kl_coef=0.1, adv_clip=config.train.adv_clip_max)`. The script's
   `config.beta` mixes predictions and has no counterpart here; its `config.train.beta` is our kl_coef, the paper's is
   0.1.

Keep all else: autocast around the three forwards (the loss itself runs outside it, in float32, on predictions of any
dtype), the division by accumulation steps times timesteps, GradScaler, clipping and the averaging of the log entries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

import crd_fast
from crd_fast import CRDConfig

DEFAULT_CONFIG = CRDConfig()


def crd_loss(
    forward_prediction: Tensor,
    old_prediction: Tensor,
    ref_forward_prediction: Tensor,
    noise: Tensor,
    x0: Tensor,
    advantages: Tensor,
    prompt_ids: Tensor,
    timesteps: Tensor,
    config: CRDConfig = DEFAULT_CONFIG,
    process_group: dist.ProcessGroup | None = None,
    diagnostics: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of a micro-batch, not scaled for accumulation, and the script's log entries.

    Args:
        forward_prediction, old_prediction, ref_forward_prediction: (B, C, H, W) velocities of the trained, the old and
            the frozen model at the same noisy latents. Gradients flow to the first alone.
        noise, x0: (B, C, H, W); the velocity target is noise - x0.
        advantages: (B,), any float dtype.
        prompt_ids, timesteps: of each sample, see `group_ids`.
        config: with reduction="mean", as the script divides by nothing but accumulation steps and timesteps.
        process_group: data-parallel ranks that center together. None centers within this rank's micro-batch.
        diagnostics: also log x0_norm, x0_norm_max, old_deviate, old_deviate_max and old_kl_div. The loss has no use
            for them, and they read the latents again.

    Returns:
        loss, and name -> detached scalar on the device. policy_loss, unweighted_policy_loss, kl_div_loss, kl_div (both
        before kl_coef) and total_loss keep the script's meaning; implicit_reward_mean, implicit_reward_std and
        singleton_groups are new.

    Raises:
        ValueError: what `crd_fast.loss` and `group_ids` refuse, and a reduction other than "mean".
    """
    if config.reduction != "mean":
        raise ValueError(f"config.reduction: expected 'mean', got {config.reduction!r}; weigh samples in the caller")
    precise = torch.promote_types(noise.dtype, torch.float32)
    out = crd_fast.loss(
        forward_prediction,
        noise.to(precise) - x0.to(precise),
        old=old_prediction,
        ref=ref_forward_prediction,
        advantages=advantages,
        group_ids=group_ids(prompt_ids, timesteps),
        process_group=process_group,
        config=config,
    )
    logs = {
        "policy_loss": out.policy_loss,
        "unweighted_policy_loss": out.policy_loss / config.adv_clip,
        "kl_div_loss": out.metrics["kl"],
        "kl_div": out.metrics["kl"],
        "total_loss": out.loss.detach(),
        "implicit_reward_mean": out.metrics["implicit_reward_mean"],
        "implicit_reward_std": out.metrics["implicit_reward_std"],
        "singleton_groups": out.metrics["singleton_groups"],
    }
    if diagnostics:
        logs |= _diagnostics(forward_prediction, old_prediction, ref_forward_prediction, x0)
    return out.loss, logs


@torch.no_grad()
def _diagnostics(forward: Tensor, old: Tensor, ref: Tensor, x0: Tensor) -> dict[str, Tensor]:
    x0_squared = x0.float().square()
    moved = (forward.float() - old.float()).square()
    return {
        "x0_norm": x0_squared.mean(),
        "x0_norm_max": x0_squared.max(),
        "old_deviate": moved.mean(),
        "old_deviate_max": moved.max(),
        "old_kl_div": (old.float() - ref.float()).square().mean(),
    }


# --- groups -----------------------------------------------------------------------------------------------


def group_ids(prompt_ids: Tensor, timesteps: Tensor) -> Tensor:
    """(B,) int64, equal where prompt and timestep are equal, and the same on every rank and machine.

    Ids are a 64-bit mix of the values, as numbering the pairs of one rank would mean something else on the next. At one
    timestep no two (B,) prompt ids share an id, and for one prompt no two timesteps do. Across both, as for rows of
    tokens, a clash of n groups has a chance of about n^2 / 2^65. Nothing is added or rounded in floating point.

    Args:
        prompt_ids: (B,) int64, any values, or (B, tokens) int64, the prompt's token ids.
        timesteps: (B,), float values, told apart by their bits, or integer indices.
    """
    if prompt_ids.dtype != torch.int64 or prompt_ids.ndim not in (1, 2):
        raise ValueError(
            f"prompt_ids: expected int64 of shape (B,) or (B, tokens), got {prompt_ids.dtype} of shape "
            f"{tuple(prompt_ids.shape)}; ids in floating point merge beyond 2^53"
        )
    if timesteps.shape != prompt_ids.shape[:1]:
        raise ValueError(
            f"timesteps: expected shape ({prompt_ids.shape[0]},), a value for each prompt id, got "
            f"{tuple(timesteps.shape)}; pass the column of this step"
        )
    if prompt_ids.ndim == 2:
        position = torch.arange(prompt_ids.shape[1], device=prompt_ids.device) * _GOLDEN
        prompt_ids = _mix(prompt_ids + position).sum(1)
    if timesteps.is_floating_point():
        timesteps = (timesteps.double() + 0.0).view(torch.int64)  # + 0.0 makes one zero of two
    return _mix(prompt_ids + _mix(timesteps.long()))


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(words: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): one-to-one on 64 bits, and every bit moves them all."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        words = (words ^ _shift_right(words, shift)) * factor
    return words ^ _shift_right(words, 31)


def _shift_right(words: Tensor, count: int) -> Tensor:
    return (words >> count) & ((1 << (64 - count)) - 1)  # without the copies of the sign


def grouped_order(
    samples: int, timesteps: int, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """An order of training that leaves groups whole: (samples,) rows and (samples, timesteps) columns, int64.

    Whole batches change places, and all samples go through the timesteps in one random order. Both depend on the
    arguments alone, so ranks that pass the same seed stay in step.

    Raises:
        ValueError: `samples` is no multiple of `batch_size`.
    """
    if samples % batch_size:
        raise ValueError(f"samples: expected a multiple of batch_size={batch_size}, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    batches = torch.arange(samples).view(-1, batch_size)
    rows = batches[torch.randperm(len(batches), generator=generator)].flatten()
    columns = torch.randperm(timesteps, generator=generator).expand(samples, -1)
    return rows.to(device), columns.to(device)
