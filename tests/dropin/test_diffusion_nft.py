"""The drop-in for DiffusionNFT's SD3 script against the published formulas, and its group ids and order of training."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

import crd_fast
from crd_fast import CRDConfig


def load(name: str):
    """An example as a module; examples are files to copy and belong to no package."""
    path = Path(__file__).parents[2] / "examples" / "dropin" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"dropin_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


crd = load("diffusion_nft")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-3}
MODES = [
    dict(zip(("temperature", "loss_type", "adaptive_weight", "adaptive_kl", "centering"), mode, strict=True))
    for mode in itertools.product(
        (math.inf, 0.3, 0.0), ("mse", "bce"), (True, False), (True, False), ("prompt", "batch")
    )
]
T_VALUES = (937.5, 250.0)


def published(f, y, old, ref, advantages, groups, config):
    """Loss, policy term, mean K and dL/df of the paper's formulas, float64 tensors in and out."""
    f = f.detach().double().requires_grad_()
    y, old, ref = (tensor.detach().double() for tensor in (y, old, ref))
    clip = config.adv_clip
    a = (advantages.double().clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0, 1)

    def error(prediction):
        residual = (prediction - y).flatten(1)
        weight = residual.detach().abs().mean(1).clamp(min=1e-5) if config.adaptive_weight else 1.0
        return residual.pow(2).mean(1) / weight

    reward = error(old) - error(f)
    groups = torch.zeros_like(groups) if config.centering == "batch" else groups
    same = (groups[:, None] == groups[None, :]).double()
    if math.isinf(config.temperature):
        weights = [same]
    elif config.temperature > 0:
        weights = [same * torch.exp(sign * a / config.temperature) for sign in (1, -1)]
    else:
        sides = [same * (sign * (a - 0.5) > 0) for sign in (1, -1)]
        weights = [torch.where(side.sum(1, keepdim=True) > 0, side, same) for side in sides]
    terms = []
    for weight in weights:
        share = weight / weight.sum(1, keepdim=True)
        mine = config.beta * (reward - share @ reward.detach())
        wanted = a - share @ a
        if config.loss_type == "mse":
            terms.append((mine - wanted).square())
        else:
            terms.append(torch.nn.functional.softplus(mine) - torch.sigmoid(wanted) * mine)
    policy = clip / config.beta * torch.stack(terms).mean()
    distance = (f - ref).flatten(1).pow(2).mean(1)
    least = 1e-4 / config.kl_coef
    share_of_anchor = least + a * (1 - least) if config.adaptive_kl else torch.ones_like(a)
    loss = policy + config.kl_coef * (share_of_anchor * distance).mean()
    (gradient,) = torch.autograd.grad(loss, f)
    return loss.detach(), policy.detach(), distance.detach().mean(), gradient


def micro_batch(dtype, seed=0, batch=8, latent=(4, 5, 3)):
    """What the script holds after its three forwards; noise is at least float32 there, whatever the predictions are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape or (batch, *latent), generator=generator, dtype=torch.float64)

    x0, noise = draw().to(dtype), draw().to(torch.promote_types(dtype, torch.float32))
    y = noise.double() - x0.double()
    return {
        "forward_prediction": (y + 0.6 * draw()).to(dtype),
        "old_prediction": (y + 0.7 * draw()).to(dtype),
        "ref_forward_prediction": (y + 0.5 * draw()).to(dtype),
        "noise": noise,
        "x0": x0,
        "advantages": 3 * draw(batch),
        "prompt_ids": torch.tensor([2**60 + i // 2 % 2 for i in range(batch)]),
        "timesteps": torch.tensor([T_VALUES[i // 4 % 2] for i in range(batch)]),
    }


def run(inputs, config, **more):
    f = inputs["forward_prediction"].detach().requires_grad_()
    loss, logs = crd.crd_loss(**{**inputs, "forward_prediction": f}, config=config, **more)
    loss.backward()
    return loss.detach(), logs, f.grad


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def assert_published(inputs, config):
    loss, logs, gradient = run(inputs, config)
    y = inputs["noise"].double() - inputs["x0"].double()
    pairs = list(zip(inputs["prompt_ids"].tolist(), inputs["timesteps"].tolist(), strict=True))
    groups = torch.tensor([pairs.index(pair) for pair in pairs])
    want_loss, want_policy, want_kl, want_gradient = published(
        inputs["forward_prediction"], y, inputs["old_prediction"], inputs["ref_forward_prediction"],
        inputs["advantages"], groups, config,
    )  # fmt: skip
    tolerance = TOLERANCE[gradient.dtype]
    assert gradient.dtype == inputs["forward_prediction"].dtype
    assert error(loss, want_loss) < tolerance
    assert error(gradient, want_gradient) < tolerance
    assert error(logs["total_loss"], want_loss) < tolerance
    assert error(logs["policy_loss"], want_policy) < tolerance
    assert error(logs["unweighted_policy_loss"], want_policy / config.adv_clip) < tolerance
    assert error(logs["kl_div"], want_kl) < tolerance
    assert error(logs["kl_div_loss"], want_kl) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_every_mode_and_dtype(mode, dtype):
    assert_published(micro_batch(dtype), CRDConfig(**mode))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(1, 7))
def test_random_cases(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    inputs = micro_batch(dtype, seed, batch=2 + seed, latent=(seed, 7, 3))
    inputs["timesteps"] = torch.tensor(T_VALUES)[torch.randint(2, (2 + seed,), generator=generator)]
    inputs["prompt_ids"] = torch.randint(3, (2 + seed,), generator=generator)
    mode = MODES[int(torch.randint(len(MODES), (), generator=generator))]
    beta, kl_coef, adv_clip = (0.5 + torch.rand(3, generator=generator) * torch.tensor([3.0, 1.0, 4.0])).tolist()
    assert_published(inputs, CRDConfig(beta=beta, kl_coef=kl_coef, adv_clip=adv_clip, **mode))


def test_autocast_changes_nothing_and_the_scaler_scales_the_gradient():
    inputs = micro_batch(torch.bfloat16)
    loss, _, gradient = run(inputs, CRDConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _, inside_gradient = run(inputs, CRDConfig())
    assert inside == loss and torch.equal(inside_gradient, gradient)
    f = inputs["forward_prediction"].detach().requires_grad_()
    (1024 * crd.crd_loss(**{**inputs, "forward_prediction": f})[0]).backward()
    assert torch.equal(f.grad, 1024 * gradient)


def test_scaling_for_accumulation_is_left_to_the_caller():
    """Two halves, each divided by two by the caller, make the whole when no group is in both."""
    inputs = micro_batch(torch.float64)
    loss, _, gradient = run(inputs, CRDConfig())
    f = inputs["forward_prediction"].detach().requires_grad_()
    total = 0.0
    for half in (slice(0, 4), slice(4, 8)):
        part = {name: tensor[half] for name, tensor in inputs.items()} | {"forward_prediction": f[half]}
        part_loss, _ = crd.crd_loss(**part)
        (part_loss / 2).backward()
        total += part_loss.item() / 2
    assert total == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(f.grad, gradient, rtol=1e-10, atol=1e-14)


def test_a_reduction_that_the_script_does_not_expect_is_refused():
    with pytest.raises(ValueError, match="config.reduction: expected 'mean', got 'sum'"):
        crd.crd_loss(**micro_batch(torch.float32), config=CRDConfig(reduction="sum"))


def test_a_timestep_of_its_own_for_every_sample_leaves_no_policy_gradient():
    inputs = micro_batch(torch.float32)
    inputs["timesteps"] = torch.linspace(100, 900, 8)
    _, logs, gradient = run(inputs, CRDConfig(kl_coef=0.0))
    assert logs["singleton_groups"] == 8 and not gradient.any()
    inputs["timesteps"] = torch.full((8,), 500.0)
    _, logs, gradient = run(inputs, CRDConfig(kl_coef=0.0))
    assert logs["singleton_groups"] == 0 and gradient.any()


# --- log entries ------------------------------------------------------------------------------------------


def test_log_entries_are_detached_scalars_of_the_latents():
    inputs = micro_batch(torch.float32)
    _, logs, _ = run(inputs, CRDConfig())
    assert all(value.shape == () and not value.requires_grad for value in logs.values())
    moved = inputs["forward_prediction"] - inputs["old_prediction"]
    torch.testing.assert_close(logs["old_deviate"], moved.square().mean())
    torch.testing.assert_close(logs["old_deviate_max"], moved.square().max())
    torch.testing.assert_close(logs["x0_norm"], inputs["x0"].square().mean())
    torch.testing.assert_close(logs["x0_norm_max"], inputs["x0"].square().max())
    off = inputs["old_prediction"] - inputs["ref_forward_prediction"]
    torch.testing.assert_close(logs["old_kl_div"], off.square().mean())
    _, fewer, _ = run(inputs, CRDConfig(), diagnostics=False)
    assert set(logs) - set(fewer) == {"x0_norm", "x0_norm_max", "old_deviate", "old_deviate_max", "old_kl_div"}


# --- group ids --------------------------------------------------------------------------------------------


def test_group_ids_are_as_many_as_pairs_beyond_float_precision():
    prompts = torch.cat([base + torch.arange(-300, 300) for base in (0, 2**53, 2**62, -(2**62))])
    for timesteps in (torch.linspace(1, 1000, 37), torch.linspace(0.001, 1, 37).double(), torch.arange(37)):
        ids = crd.group_ids(prompts.repeat_interleave(37), timesteps.repeat(len(prompts)))
        assert ids.dtype == torch.int64
        assert len(ids.unique()) == 37 * len(prompts)


def test_group_ids_of_neighbouring_floats_differ():
    t = torch.tensor(937.5)
    timesteps = torch.stack([t, torch.nextafter(t, torch.tensor(1e9)), t])
    ids = crd.group_ids(torch.full((3,), 7), timesteps)
    assert ids[0] == ids[2] != ids[1]
    assert len(crd.group_ids(torch.zeros(2, dtype=torch.int64), torch.tensor([0.0, -0.0])).unique()) == 1


def test_group_ids_do_not_depend_on_what_else_a_rank_holds():
    inputs = micro_batch(torch.float32)
    prompts, timesteps = inputs["prompt_ids"], inputs["timesteps"]
    order = torch.tensor([7, 2, 5, 0, 3, 6, 1, 4])
    together = crd.group_ids(prompts, timesteps)
    first, second = order[:3], order[3:]
    apart = torch.cat([crd.group_ids(prompts[part], timesteps[part]) for part in (first, second)])
    assert torch.equal(apart, together[order])


def test_group_ids_of_token_rows():
    rows = torch.randint(49408, (50, 256), generator=torch.Generator().manual_seed(0))
    rows[1] = rows[0].roll(1)
    rows[2] = rows[0]
    rows[3, :128], rows[3, 128:] = rows[0, 128:], rows[0, :128]
    ids = crd.group_ids(rows, torch.full((50,), 500.0))
    assert ids[2] == ids[0] and len(ids.unique()) == 49
    assert torch.equal(crd.group_ids(rows[5:7], torch.full((2,), 500.0)), ids[5:7])


def test_group_ids_refuse_what_would_merge():
    with pytest.raises(ValueError, match="expected int64 .* got torch.float32"):
        crd.group_ids(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"timesteps: expected shape \(2,\)"):
        crd.group_ids(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 10))


# --- order of training ------------------------------------------------------------------------------------


def test_grouped_order_keeps_batches_whole_and_timesteps_shared():
    rows, columns = crd.grouped_order(12, 10, 4, seed=5)
    assert sorted(rows.tolist()) == list(range(12))
    assert all(batch.tolist() == list(range(batch[0], batch[0] + 4)) for batch in rows.view(3, 4))
    assert columns.shape == (12, 10)
    assert all(torch.equal(row, columns[0]) for row in columns) and sorted(columns[0].tolist()) == list(range(10))
    again = crd.grouped_order(12, 10, 4, seed=5)
    assert torch.equal(again[0], rows) and torch.equal(again[1], columns)
    orders = {tuple(crd.grouped_order(12, 10, 4, seed=seed)[1][0].tolist()) for seed in range(20)}
    assert len(orders) > 15
    batches = Counter(int(crd.grouped_order(12, 10, 4, seed=seed)[0][0]) for seed in range(60))
    assert set(batches) == {0, 4, 8}
    with pytest.raises(ValueError, match="multiple of batch_size=5"):
        crd.grouped_order(12, 10, 5, seed=0)


# --- ranks ------------------------------------------------------------------------------------------------


def rank_main(rank: int, folder: Path) -> None:
    """One of two data-parallel ranks; each prompt has samples on both."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    inputs = {name: tensor[rank::2] for name, tensor in micro_batch(torch.float64).items()}
    together = run(inputs, CRDConfig(), process_group=dist.group.WORLD)
    alone = run(inputs, CRDConfig())
    torch.save({"together": together, "alone": alone}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(crd_fast.__file__).parents[1],
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    answers = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    loss, _, gradient = run(micro_batch(torch.float64), CRDConfig())
    torch.testing.assert_close((answers[0]["together"][0] + answers[1]["together"][0]) / 2, loss)
    for rank, answer in enumerate(answers):
        torch.testing.assert_close(answer["together"][2] / 2, gradient[rank::2])
        assert (answer["alone"][2] - answer["together"][2]).norm() > 1e-3 * gradient.norm()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
    # The answer is written; a library's thread may still be joinable, and that aborts the interpreter's exit.
    sys.stderr.flush()
    os._exit(0)
