"""The DIDR trainer on tiny pipelines: what each stage moves, what steps depend on, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crd_fast.acceleration.compilation import CompileCounter, CompileMetrics
from crd_fast.didr import DIDRTrainer
from crd_fast.didr.draws import draw_step
from crd_fast.didr.metrics import EpochLog
from crd_fast.didr.networks import EMA, GENERATOR, TA
from crd_fast.didr.stages import DISTANCE_FLOOR, REWARDS_AT
from crd_fast.errors import ConfigError, NonFiniteError
from crd_fast.ranks import Ranks
from crd_fast.rollout import initial_noise
from crd_fast.training.models import load_backbone
from tests import pipelines
from tests.didr.tiny import Redness, added_noise, make_recipe, make_trainer, moved, save_pipeline, scramble, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("sd3", tmp_path_factory.mktemp("sd3"))


def gradients(trainer: DIDRTrainer) -> set[str]:
    """The networks that hold gradients."""
    networks = trainer.networks
    named = [(name.partition(".")[0], tensor) for name, tensor in networks.named_tensors().items()]
    named += [("reference", p) for n, p in networks.backbone.transformer.named_parameters() if "base" in n]
    named += [("vae", p) for p in networks.backbone.pipeline.vae.parameters()]
    named += [("reward", p) for p in trainer.reward.parameters()]  # type: ignore[attr-defined]
    return {name for name, tensor in named if tensor.grad is not None}


# --- the stages ---


@pytest.mark.parametrize("origin", [False, True], ids=["one_model", "two_models"])
@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_each_stage_moves_its_own_network_alone(folder: Path, parameters: str, origin: bool) -> None:
    trainer = make_trainer(make_recipe("sd3", folder, parameters=parameters), origin=origin)
    before = state(trainer)
    trainer._stage_one(trainer._draw(), EpochLog())
    assert moved(trainer, before) == {TA} and gradients(trainer) == set()

    before = state(trainer)
    assert trainer._stage_two(trainer._draw(), trainer.reward, EpochLog())
    assert moved(trainer, before) == {GENERATOR} and gradients(trainer) == set()


def test_no_gradient_is_kept_for_what_a_stage_does_not_move(folder: Path) -> None:
    """Looked at between the backward pass and the step that forgets gradients."""
    trainer = make_trainer(make_recipe("sd3", folder))
    scramble(trainer, GENERATOR, TA)
    (draw, _) = trainer._draw()
    trainer._backward(TA, trainer._ta_output(draw).loss, last=True)
    assert gradients(trainer) == {TA}
    trainer.optimizers[TA].skip()
    trainer._backward(GENERATOR, trainer._generator_loss(draw, trainer.reward).loss, last=True)
    assert gradients(trainer) == {GENERATOR}


def test_an_iteration_is_its_stages_and_the_average_follows(folder: Path) -> None:
    trainer = make_trainer(make_recipe("sd3", folder, steps=1, ta_ratio=3))
    scramble(trainer, GENERATOR, EMA)
    before = [t.detach().clone() for t in trainer.networks.own.tensors(EMA)]
    row = trainer.run_epoch()
    assert (row["step"], row["ta_step"], row["iteration"], trainer.draws) == (1, 3, 1, 4)
    now = zip(before, trainer.networks.own.tensors(EMA), trainer.networks.own.tensors(GENERATOR), strict=True)
    for was, average, generator in now:
        torch.testing.assert_close(average.detach(), 0.5 * was + 0.5 * generator.detach())


def test_warm_ups(folder: Path) -> None:
    """First the TA alone, one step an iteration; then both without the reward; then everything."""
    reward = Redness()
    trainer = make_trainer(make_recipe("sd3", folder, steps=1, ta_warmup=2, distil=1), reward)
    scramble(trainer, GENERATOR)
    before = state(trainer)
    rows = [trainer.run_epoch() for _ in range(2)]
    assert moved(trainer, before) == {TA} and reward.calls == 0
    assert [row["ta_step"] for row in rows] == [1, 2] and not any("gap" in row for row in rows)
    row = trainer.run_epoch()
    assert moved(trainer, before) == {TA, GENERATOR, EMA} and reward.calls == 0
    assert row["ta_step"] == 4 and row["gap"] > 0 and "reward" not in row
    row = trainer.run_epoch()
    assert reward.calls > 0 and row["correction"] > 0 and set(row["reward"]) == {"redness"}


def test_distilling_is_training_with_a_reward_that_likes_all_images_alike(folder: Path) -> None:
    trainer = make_trainer(make_recipe("sd3", folder))
    scramble(trainer, GENERATOR, TA)
    (draw, _) = trainer._draw()

    def gradient(reward: Any) -> list[Tensor]:
        loss = trainer._generator_loss(draw, reward).generator.loss
        return list(torch.autograd.grad(loss, trainer.networks.own.tensors(GENERATOR), allow_unused=True))

    rewarded, without = gradient(trainer.reward), gradient(None)
    with torch.no_grad():
        trainer.reward.colors.zero_()  # type: ignore[attr-defined]
    indifferent = gradient(trainer.reward)
    pairs = list(zip(without, indifferent, rewarded, strict=True))
    assert all(a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b, _ in pairs)
    assert any(a is not None and not torch.allclose(a, c, rtol=1e-2) for a, _, c in pairs)


def test_above_a_share_of_the_time_range_the_reward_is_left_out(folder: Path) -> None:
    sections = {"algorithm": {"reward_until": 0.5}, "decode": {"recompute": False}}
    reward = Redness()
    trainer = make_trainer(make_recipe("sd3", folder, sections, steps=1, batch=4, micro_batch=4), reward)
    scramble(trainer, GENERATOR, TA)
    (draw,) = trainer._draw()
    early = draw.shares < 0.5
    assert early.any() and not early.all()
    out = trainer._generator_loss(draw, reward)
    assert reward.calls == int(early.sum())  # decoded one at a time
    assert out.reward is not None and torch.equal(out.reward.reward.isfinite(), early)

    log = EpochLog()
    log.add(draw.shares, out)
    row = log._stage_two(torch.cat(log.samples), "redness")
    assert set(row["correction_ratio"]) <= {"early", "middle"}, "nothing is told of times without a reward"
    corrections = out.generator.correction
    torch.testing.assert_close(row["correction"], corrections[early].square().mean().sqrt().item())
    assert row["gap"] == pytest.approx(out.generator.gap.square().mean().sqrt().item())
    trainer = make_trainer(make_recipe("sd3", folder, sections | {"algorithm": {"reward_until": 0.01}}, steps=1))
    assert "reward" not in trainer.run_epoch()


def test_the_endpoints_reward_is_never_left_out(folder: Path) -> None:
    """A sweep compares both ways to use the reward under one recipe."""
    sections = {"algorithm": {"reward_until": 0.1, "reward_at": "endpoint"}, "decode": {"recompute": False}}
    reward = Redness()
    trainer = make_trainer(make_recipe("sd3", folder, sections, steps=1, batch=4, micro_batch=4), reward)
    row = trainer.run_epoch()
    assert reward.calls == 4 and row["correction"] == 0 and row["reward"]["redness"] != 0


def test_the_probe_sees_the_ta_learn(folder: Path) -> None:
    """The loss of the same samples before and after the steps that learned them and others."""
    trainer = make_trainer(make_recipe("sd3", folder, steps=1, ta_ratio=8, batch=4, micro_batch=4))
    scramble(trainer, GENERATOR)
    row = trainer.run_epoch()
    assert row["ta_loss_after"] < row["ta_loss_before"]


def test_the_learning_rates_rise(folder: Path) -> None:
    trainer = make_trainer(make_recipe("sd3", folder, steps=1, ta_ratio=1, warmup=4, lr=1e-2, ta_lr=4e-2))
    rows = [trainer.run_epoch() for _ in range(5)]
    assert [row["lr"] for row in rows] == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2])
    assert [row["ta_lr"] for row in rows] == pytest.approx([1e-2, 2e-2, 3e-2, 4e-2, 4e-2])


def test_the_learning_rates_fall_at_the_end(folder: Path) -> None:
    settings = {"epochs": 5, "steps": 1, "ta_ratio": 1, "cooldown": 0.6, "lr": 3e-2, "ta_lr": 6e-2}
    trainer = make_trainer(make_recipe("sd3", folder, **settings))
    rows = [trainer.run_epoch() for _ in range(5)]
    assert [row["lr"] for row in rows] == pytest.approx([3e-2, 3e-2, 3e-2, 2e-2, 1e-2])
    assert [row["ta_lr"] for row in rows] == pytest.approx([6e-2, 6e-2, 6e-2, 4e-2, 2e-2])


# --- what steps depend on ---


def test_a_graph_is_a_recompilation_once_every_stage_has_run(folder: Path) -> None:
    """Warm-ups compile their own graphs, and what comes after them more."""
    trainer = make_trainer(make_recipe("sd3", folder, steps=2, ta_warmup=2, distil=1))
    counter = CompileCounter("eager")
    trainer.compiling = CompileMetrics([counter])
    recompiled = []
    for graphs in (2, 5, 6, 6):
        counter.graphs = graphs
        recompiled.append(trainer.run_epoch()["recompiles"])
    assert recompiled == [0, 0, 1, 1]


def test_micro_batches_do_not_change_what_is_learned(folder: Path) -> None:
    def trained(micro_batch: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        trainer = make_trainer(make_recipe("sd3", folder, steps=1, micro_batch=micro_batch))
        scramble(trainer, GENERATOR)
        return trainer.tensors(), trainer.run_epoch()

    (whole, row), (cut, cut_row) = trained(4), trained(1)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    for name in ("ta_loss", "ta_loss_before", "ta_loss_after", "generator_loss", "gap", "correction"):
        assert cut_row[name] == pytest.approx(row[name], rel=1e-3), name


@pytest.mark.parametrize("decode", [{"micro_batch": 2}, {"recompute": False}, {"micro_batch": 4, "recompute": False}])
def test_how_pixels_are_made_does_not_change_gradients(folder: Path, decode: dict[str, Any]) -> None:
    def gradient(**decode: Any) -> list[Tensor]:
        trainer = make_trainer(make_recipe("sd3", folder, {"decode": decode}, micro_batch=4))
        scramble(trainer, GENERATOR, TA)
        (draw,) = trainer._draw()
        trainer._generator_loss(draw, trainer.reward).loss.backward()
        return [t.grad for t in trainer.networks.own.tensors(GENERATOR) if t.grad is not None]

    for got, expected in zip(gradient(**decode), gradient(micro_batch=1, recompute=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_a_trainer_continues_from_its_tensors_and_values(folder: Path) -> None:
    recipe = make_recipe("sd3", folder)
    whole = make_trainer(recipe)
    rows = [whole.run_epoch() for _ in range(3)]
    first = make_trainer(recipe)
    first.run_epoch()
    second = make_trainer(recipe)
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    second.set_values(first.values())
    for expected in rows[1:]:
        row = second.run_epoch()
        timed = ("seconds", "samples_per_second")
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in whole.tensors().items())


def test_noise_belongs_to_the_sample(folder: Path) -> None:
    """Ranks and micro-batches cut one batch; another step, or another seed, is another batch."""
    recipe = make_recipe("sd3", folder, batch=8, micro_batch=2)
    backbone = load_backbone(recipe.model, "fp32", torch.device("cpu"))
    embedded = backbone.encode_prompts(["a", "b", "c"])

    def parts(recipe: Any, number: int, rank: int = 0, world: int = 1) -> list[Any]:
        return draw_step(recipe, backbone, embedded, number, Ranks(rank, world))

    def tensors(draw: Any) -> dict[str, Tensor]:
        eps = added_noise(torch.zeros_like(draw.z), draw)
        return {"z": draw.z, "eps": eps, "t": draw.t, "prompt_ids": draw.prompt_ids}

    whole = parts(recipe, 3)
    spread = [draw for pair in zip(parts(recipe, 3, 0, 2), parts(recipe, 3, 1, 2), strict=True) for draw in pair]
    for name in ("z", "eps", "t", "prompt_ids"):
        together = torch.cat([tensors(draw)[name] for draw in whole])
        assert torch.equal(together, torch.cat([tensors(draw)[name] for draw in spread])), name
    drawn = [tensors(draw) for number in (3, 4) for draw in parts(recipe, number)]
    noises = torch.cat([torch.cat([found["z"], found["eps"]]) for found in drawn])
    assert len(noises.flatten(1).unique(dim=0)) == len(noises) == 32
    seeded = parts(make_recipe("sd3", folder, {"run": {"seed": 1}}, batch=8, micro_batch=2), 3)
    assert not torch.equal(seeded[0].z, whole[0].z) and not torch.equal(seeded[0].t, whole[0].t)


# --- numbers that are not finite ---


class Broken(Redness):
    """NaN for some prompts, or for all."""

    def __init__(self, *prompts: str) -> None:
        super().__init__()
        self.prompts = prompts

    def differentiable_scores(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        scores = super().differentiable_scores(images, prompts, metadata)
        factors = [math.nan if not self.prompts or prompt in self.prompts else 1.0 for prompt in prompts]
        return scores * torch.tensor(factors)


@pytest.mark.parametrize("reward_at", REWARDS_AT)
def test_a_sample_without_a_score_is_left_out_and_counted(folder: Path, reward_at: str) -> None:
    sections = {"algorithm": {"reward_at": reward_at}}
    trainer = make_trainer(make_recipe("sd3", folder, sections, steps=1, micro_batch=1), Broken("2 squares"))
    row = trainer.run_epoch()
    elements = math.prod(trainer.networks.backbone.latent_shape)
    assert row["nonfinite"] in (elements, 2 * elements) and row["skipped_steps"] == {GENERATOR: 0, TA: 0}
    assert row["step"] == 1 and math.isfinite(row["gap"]) and math.isfinite(row["reward"]["redness"])


@pytest.mark.parametrize("reward_at", REWARDS_AT)
def test_steps_without_any_score_are_skipped_and_end_the_run(folder: Path, reward_at: str) -> None:
    sections = {"algorithm": {"reward_at": reward_at}}
    trainer = make_trainer(make_recipe("sd3", folder, sections, steps=1, max_skipped=3), Broken())
    before = state(trainer)
    rows = [trainer.run_epoch() for _ in range(2)]
    assert moved(trainer, before) == {TA}
    assert [row["skipped_steps"][GENERATOR] for row in rows] == [1, 1] and rows[1]["step"] == 0
    with pytest.raises(NonFiniteError, match="3 optimiser steps of the generator in a row .*lower train.lr"):
        trainer.run_epoch()


def test_a_gradient_that_is_not_finite_is_not_stepped(folder: Path) -> None:
    trainer = make_trainer(make_recipe("sd3", folder, steps=1, max_skipped=2))
    with torch.no_grad():
        trainer.networks.own.tensors(GENERATOR)[0].fill_(math.inf)
    before = state(trainer)
    with pytest.raises(NonFiniteError, match="2 optimiser steps of the ta in a row"):
        trainer.run_epoch()
    assert moved(trainer, before) == set()


# --- it learns ---


def test_the_generator_follows_the_reward(folder: Path) -> None:
    """Images become redder by a reward that is red, and only by it."""

    def change(beta: float) -> float:
        algorithm = {"beta": beta, "guidance_scale": 1.0, "weighting": "bounded", "late_steps": 1}
        decode = {"micro_batch": 8, "recompute": False}
        trainer = make_trainer(
            make_recipe("sd3", folder, {"algorithm": algorithm, "decode": decode}, steps=12, batch=8, micro_batch=8)
        )
        z = initial_noise(trainer.networks.backbone, torch.arange(1 << 40, (1 << 40) + 32), 0)
        conditioning = trainer.conditioning[torch.arange(32) % 3]

        def redness() -> float:
            with torch.no_grad():
                images = trainer.networks.backbone.decode(trainer.generator.sample(GENERATOR, z, conditioning))
                return trainer.reward.differentiable_scores(images, [""] * 32, [{}] * 32).mean().item()

        before = redness()
        trainer.run_epoch()
        return redness() - before

    assert change(1e-4) > 0.004 > 10 * abs(change(1e6))


# --- wrong input ---


def test_a_batch_that_cannot_be_shared_out(folder: Path) -> None:
    with pytest.raises(ConfigError, match="train.batch is 6, .* use a micro_batch of 1, 2, 3, 6"):
        make_trainer(make_recipe("sd3", folder, batch=6, micro_batch=4))


# --- the anchor ---


@pytest.mark.parametrize("origin", [False, True], ids=["one_model", "two_models"])
@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_the_anchor_is_the_generator_as_it_started(folder: Path, tmp_path: Path, parameters: str, origin: bool) -> None:
    """With a model of its own it is that model, not the reference; at the first step it is no distance away."""
    own: bool | str = str(pipelines.family("sd3").save(tmp_path / "own", seed=1)) if origin else False
    trainer = make_trainer(
        make_recipe("sd3", folder, {"algorithm": {"anchor": 0.1}}, parameters=parameters), origin=own
    )
    draw = trainer._draw()[0]
    start = trainer.generator.sample(GENERATOR, draw.z, draw.conditioning).detach()
    out = trainer._generator_loss(draw, trainer.reward)
    assert out.distance is not None
    torch.testing.assert_close(out.distance, torch.full((len(draw),), DISTANCE_FLOOR), rtol=1e-3, atol=0)
    before = state(trainer)
    for _ in range(3):
        trainer._stage_two(trainer._draw(), trainer.reward, EpochLog())
    assert moved(trainer, before) == {GENERATOR}
    out = trainer._generator_loss(draw, trainer.reward)
    expected = ((out.x0 - start).square().flatten(1).mean(1) + DISTANCE_FLOOR**2).sqrt()
    torch.testing.assert_close(out.distance, expected, rtol=1e-4, atol=1e-6)
    assert out.distance.min() > 1.5 * DISTANCE_FLOOR


def test_a_strong_anchor_holds_the_generator_and_rows_tell_how_far_it_is(folder: Path) -> None:
    distances = []
    for anchor in (0.01, 10.0):
        trainer = make_trainer(make_recipe("sd3", folder, {"algorithm": {"anchor": anchor}}, steps=8))
        distances.append(trainer.run_epoch()["start_distance"])
    assert distances[1] < 0.7 * distances[0]
    assert "start_distance" not in make_trainer(make_recipe("sd3", folder)).run_epoch()
