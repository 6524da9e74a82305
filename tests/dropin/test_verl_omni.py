"""The drop-in for verl-omni: registered, fed as its engine feeds a loss, against the published formulas."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import crd_fast
from crd_fast import CRDConfig

from .test_diffusion_nft import MODES, TOLERANCE, error, load, published

LATENT = (6, 5)


class Registry:
    """The little of verl-omni's loss module that a drop-in needs."""

    def __init__(self) -> None:
        self.losses: dict[str, Any] = {}

    def module(self) -> types.ModuleType:
        class DiffusionLossFn:
            required_model_output_keys: tuple[str, ...] = ()
            required_data_keys: tuple[str, ...] = ()

        class DiffusionNFTLoss(DiffusionLossFn):
            @staticmethod
            def prepare_actor_batch(batch, reward_tensor, config):
                """Half of the timesteps, each sample its own; advantages beside them."""
                rows = batch.batch["train_timesteps"]
                count = rows.shape[1] // 2
                picked = [row[torch.randperm(rows.shape[1])[:count]] for row in rows]
                batch.batch["train_timesteps"] = torch.stack(picked).long()
                batch.batch["advantages"] = (reward_tensor - reward_tensor.mean())[:, None].expand(-1, count)
                return batch

        @dataclass
        class DiffusionLossResult:
            loss: torch.Tensor
            metrics: dict[str, Any]
            add_loss_metric: bool = False

        def register_diffusion_loss(name):
            def decorate(cls):
                self.losses[name] = cls()
                return cls

            return decorate

        module = types.ModuleType("verl_omni.trainer.diffusion.diffusion_algos")
        for value in (DiffusionLossFn, DiffusionNFTLoss, DiffusionLossResult, register_diffusion_loss):
            setattr(module, value.__name__, value)
        return module


@pytest.fixture(scope="module")
def registry():
    registry = Registry()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("verl_omni", "verl_omni.trainer", "verl_omni.trainer.diffusion"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, "verl_omni.trainer.diffusion.diffusion_algos", registry.module())
        registry.dropin = load("verl_omni")
    return registry


@dataclass
class ActorConfig:
    diffusion_loss: dict[str, Any] = field(default_factory=dict)
    global_batch_info: dict[str, Any] = field(default_factory=lambda: {"dp_group": None})


def loss_config(config: CRDConfig) -> dict[str, Any]:
    """The settings under the names they have in verl-omni."""
    return {
        "loss_mode": "crd",
        "adv_clip_max": config.adv_clip,
        "ref_kl_coef": config.kl_coef,
        "crd_beta": config.beta,
        "crd_adaptive_weight": config.adaptive_weight,
        "crd_adaptive_kl": config.adaptive_kl,
        "crd_temperature": config.temperature,
        "crd_loss_type": config.loss_type,
        "crd_centering": config.centering,
    }


def micro_batch(dtype, seed=0, batch=8):
    """(model_output, data, noise) of one step: predictions and x0 in the actor's dtype, xt and t at least float32."""
    generator = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        return torch.randn(shape or (batch, *LATENT), generator=generator, dtype=torch.float64)

    x0, noise = draw().to(dtype), draw().to(precise)
    t = torch.tensor([(0.9375, 0.25)[i // 4 % 2] for i in range(batch)]).to(precise).view(-1, 1, 1)
    y = noise.double() - x0.double()
    model_output = {
        "forward_prediction": (y + 0.6 * draw()).to(dtype),
        "old_prediction": (y + 0.7 * draw()).to(dtype),
        "ref_forward_prediction": (y + 0.5 * draw()).to(dtype),
        "x0": x0,
        "xt": (1 - t) * x0 + t * noise,
        "t_expanded": t,
    }
    data = {"advantages": 3 * draw(batch), "uid": [f"prompt {i // 2 % 2}" for i in range(batch)]}
    return model_output, data, noise


def run(registry, model_output, data, config):
    f = model_output["forward_prediction"].detach().requires_grad_()
    result = registry.losses["crd"](config=config, model_output={**model_output, "forward_prediction": f}, data=data)
    result.loss.backward()
    return result, f.grad


def assert_published(registry, case, config):
    model_output, data, _ = case
    result, gradient = run(registry, model_output, data, ActorConfig(loss_config(config)))
    x0, xt, t = (model_output[name].double() for name in ("x0", "xt", "t_expanded"))
    pairs = list(zip(data["uid"], t.flatten().tolist(), strict=True))
    groups = torch.tensor([pairs.index(pair) for pair in pairs])
    f, old, ref = (model_output[f"{name}_prediction"] for name in ("forward", "old", "ref_forward"))
    loss, policy, kl, want_gradient = published(f, (xt - x0) / t, old, ref, data["advantages"], groups, config)
    tolerance = TOLERANCE[f.dtype]
    assert gradient.dtype == f.dtype
    assert error(result.loss.detach(), loss) < tolerance
    assert error(gradient, want_gradient) < tolerance
    for name, want in (("policy_loss", policy), ("ref_kl_loss", kl), ("total_loss", loss)):
        assert result.metrics[f"actor/{name}"] == pytest.approx(want.item(), rel=tolerance)
    return result


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_every_mode_and_dtype(registry, mode, dtype):
    assert_published(registry, micro_batch(dtype), CRDConfig(**mode))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(1, 7))
def test_random_cases(registry, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    mode = MODES[int(torch.randint(len(MODES), (), generator=generator))]
    beta, kl_coef, adv_clip = (0.5 + torch.rand(3, generator=generator) * torch.tensor([3.0, 1.0, 4.0])).tolist()
    config = CRDConfig(beta=beta, kl_coef=kl_coef, adv_clip=adv_clip, **mode)
    assert_published(registry, micro_batch(dtype, seed, batch=2 + seed), config)


def test_the_velocity_target_is_noise_minus_latents(registry):
    """xt holds the noise; a model that predicts noise - x0 exactly has no error left."""
    model_output, data, noise = micro_batch(torch.float64)
    model_output["forward_prediction"] = noise - model_output["x0"]
    result, _ = run(registry, model_output, data, ActorConfig())
    old = model_output["old_prediction"] - model_output["forward_prediction"]
    rho = old.flatten(1).square().mean(1) / old.flatten(1).abs().mean(1)
    assert result.metrics["actor/implicit_reward_mean"] == pytest.approx(rho.mean().item(), rel=1e-5)


def test_metrics_are_numbers(registry):
    result = assert_published(registry, micro_batch(torch.float32), CRDConfig())
    assert result.loss.shape == () and not result.add_loss_metric
    assert all(type(value) is float for value in result.metrics.values())
    assert result.metrics["actor/singleton_groups"] == 0


def test_what_the_config_lacks_has_our_default(registry):
    assert registry.dropin.settings({}) == CRDConfig()
    assert registry.dropin.settings({"ref_kl_coef": 0.0, "crd_temperature": 0.5}) == CRDConfig(
        kl_coef=0.0, temperature=0.5
    )


def test_accumulation_is_left_to_the_caller(registry):
    """The engine's numbers beside the tensors change nothing: `diffusion_loss` scales what it gets from the loss."""
    model_output, data, _ = micro_batch(torch.float32)
    plain, gradient = run(registry, model_output, data, ActorConfig())
    more = data | {"gradient_accumulation_steps": 4, "sp_size": 2}
    scaled, scaled_gradient = run(registry, model_output, more, ActorConfig())
    assert torch.equal(plain.loss, scaled.loss) and torch.equal(gradient, scaled_gradient)


def test_the_data_parallel_group_is_the_one_that_was_set(registry, monkeypatch):
    given = []
    real = crd_fast.loss

    def seen(*args, process_group, **kwargs):
        given.append(process_group)
        return real(*args, **kwargs)

    monkeypatch.setattr(crd_fast, "loss", seen)
    model_output, data, _ = micro_batch(torch.float32)
    group = object()
    run(registry, model_output, data, ActorConfig(global_batch_info={"dp_group": group, "loss_scale_factor": None}))
    assert given == [group]
    with pytest.raises(KeyError, match="expected the data-parallel group under .*dp_group"):
        run(registry, model_output, data, ActorConfig(global_batch_info={"loss_scale_factor": None}))


# --- groups -----------------------------------------------------------------------------------------------


def test_group_ids_are_as_many_as_pairs_and_the_same_on_every_rank(registry):
    uid = [f"{i}" for i in range(500) for _ in range(20)]
    t = (torch.arange(1, 21) / 1000).repeat(500)
    ids = registry.dropin.group_ids(uid, t)
    assert ids.dtype == torch.int64 and len(ids.unique()) == 10_000
    assert ids.abs().double().log2().median() > 60  # ids use all of 64 bits, so nothing may round them
    other_rank = registry.dropin.group_ids(uid[::-7], t.flip(0)[::7])
    assert torch.equal(other_rank, ids.flip(0)[::7])
    with pytest.raises(ValueError, match="uid: expected 2"):
        registry.dropin.group_ids(["a", "b", "c"], torch.ones(2))


def test_group_ids_do_not_change_between_versions_and_machines(registry):
    (bits,) = torch.tensor([0.25], dtype=torch.float64).view(torch.int64).tolist()
    (group,) = registry.dropin.group_ids(["uid-0"], torch.tensor([0.25])).tolist()
    assert (group - bits) % 2**64 == 0x42FE05F61581170A  # blake2b of 8 bytes


def actor_batch(timesteps):
    uid = ["a", "b", "a", "c", "b", "c"]
    return types.SimpleNamespace(batch={"train_timesteps": timesteps}, non_tensor_batch={"uid": uid})


def test_samples_of_a_prompt_are_trained_at_the_same_timesteps(registry):
    timesteps = torch.linspace(1000, 20, 12).expand(6, -1)
    batch = registry.losses["crd"].prepare_actor_batch(actor_batch(timesteps), torch.arange(6.0), None)
    rows = batch.batch["train_timesteps"]
    assert rows.shape == (6, 6) and rows.dtype == torch.int64
    for one, other in ((0, 2), (1, 4), (3, 5)):
        assert torch.equal(rows[one], rows[other])
    assert len({tuple(row.tolist()) for row in rows}) == 3
    assert set(rows.flatten().tolist()) <= set(timesteps[0].long().tolist())
    assert all(len(row.unique()) == 6 for row in rows)
    assert batch.batch["advantages"].shape == (6, 6)


def test_timesteps_that_cannot_be_shared_are_refused(registry):
    timesteps = torch.linspace(1000, 20, 12).repeat(6, 1)
    timesteps[2, 3] += 1
    with pytest.raises(ValueError, match="one row for all samples of prompt 'a'"):
        registry.losses["crd"].prepare_actor_batch(actor_batch(timesteps), torch.arange(6.0), None)
    timesteps = torch.linspace(1000, 0, 12).repeat(6, 1)
    with pytest.raises(ValueError, match="timesteps of 1 to 1000, got 0.0"):
        registry.losses["crd"].prepare_actor_batch(actor_batch(timesteps), torch.arange(6.0), None)


def test_hard_and_soft_centering_are_told_apart(registry):
    """So the names of the settings above reach the loss."""
    model_output, data, _ = micro_batch(torch.float64)
    losses = {
        run(registry, model_output, data, ActorConfig({"crd_temperature": temperature}))[0].loss.item()
        for temperature in (math.inf, 0.3, 0.0)
    }
    assert len(losses) == 3
