"""Both stages: what they move, what they leave alone, and what alternating them ends at."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import crd_fast
from crd_fast.didr import (
    DIDRConfig,
    Seeds,
    diffused_reward_score,
    generator_loss,
    reference_x0,
    sample_times,
    stage_one,
    stage_two,
    ta_loss,
    ta_loss_of_noised,
)
from crd_fast.didr.noising import noised
from crd_fast.didr.stages import DISTANCE_FLOOR
from crd_fast.errors import ConfigError
from crd_fast.schedules import VP, RectifiedFlow

from .closed_forms import sdxl_alphas_cumprod

FLOW = RectifiedFlow()
SDXL = VP(sdxl_alphas_cumprod())
SCHEDULES = [FLOW, SDXL]


class Predictor(nn.Module):
    """A small network that reads x and the share of the time range."""

    def __init__(self, schedule, width=64):
        super().__init__()
        self.schedule = schedule
        layers = [nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t):
        share = (t / self.schedule.horizon)[:, None].to(x.dtype)
        waves = torch.sin(3 * share), torch.cos(3 * share)
        return self.layers(torch.cat((x, share, torch.logit(share) / 4, *waves), 1))


class OneStep(nn.Module):
    """A small generator, close to the identity at first."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        return z + self.layers(z)


class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x0):
        return self.layer(x0)[:, 0]


def world(schedule, batch=6):
    torch.manual_seed(1)
    networks = {
        "generator": OneStep(), "ta": Predictor(schedule), "reference": Predictor(schedule),
        "unconditional": Predictor(schedule), "reward": Scored(),
    }  # fmt: skip
    t = sample_times(batch, schedule=schedule, seed=0, step=0)
    return networks, torch.randn(batch, 2), torch.randn(batch, 2), t


def step(networks, loss):
    """One step of every network that the loss reaches, whether it should or not."""
    optimizer = torch.optim.AdamW([p for n in networks.values() for p in n.parameters()], lr=1e-2)
    loss.backward()
    optimizer.step()


def changed(networks, before):
    pairs = {name: (networks[name].state_dict(), before[name].state_dict()) for name in networks}
    return {name for name, (now, then) in pairs.items() if not all(torch.equal(now[key], then[key]) for key in now)}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_stage_one_moves_the_ta_and_nothing_else(schedule):
    networks, z, eps, t = world(schedule)
    before = copy.deepcopy(networks)
    out = stage_one(networks["generator"], networks["ta"], z, eps, t, schedule=schedule)
    step(networks, out.loss)
    assert changed(networks, before) == {"ta"}
    assert all(p.grad is None for n in ("generator", "reference", "reward") for p in networks[n].parameters())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weighting", ["ikl", "bounded", "dmd2"])
@pytest.mark.parametrize("reward_at", ["diffused", "endpoint"])
def test_stage_two_moves_the_generator_and_nothing_else(schedule, weighting, reward_at):
    networks, z, eps, t = world(schedule)
    before = copy.deepcopy(networks)
    config = DIDRConfig(beta=0.5, guidance_scale=4.0, weighting=weighting, reward_at=reward_at)
    out = stage_two(**networks, z=z, eps=eps, t=t, schedule=schedule, config=config)
    step(networks, out.loss)
    assert changed(networks, before) == {"generator"}
    others = ("ta", "reference", "unconditional", "reward")
    assert all(p.grad is None for name in others for p in networks[name].parameters())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("guidance_scale", "guided_estimate"), [(1.0, False), (4.0, False), (4.0, True)])
def test_stages_are_their_parts(schedule, guidance_scale, guided_estimate):
    networks, z, eps, t = world(schedule)
    generator, ta, reference = networks["generator"], networks["ta"], networks["reference"]
    x0 = generator(z)
    x_t = schedule.add_noise(x0.detach(), eps, t)
    one = stage_one(generator, ta, z, eps, t, schedule=schedule)
    assert torch.equal(one.loss, ta_loss(ta(x_t, t), x0, eps, t, schedule=schedule).loss)

    config = DIDRConfig(beta=0.5, guidance_scale=guidance_scale, guided_estimate=guided_estimate)
    two = stage_two(**networks, z=z, eps=eps, t=t, schedule=schedule, config=config)

    def denoise(x, t):
        conditional = reference(x, t)
        if not guided_estimate:
            return schedule.to_x0(conditional, x, t)
        without = networks["unconditional"](x, t)
        return schedule.to_x0(without + guidance_scale * (conditional - without), x, t)

    s_r = diffused_reward_score(
        x_t,
        t,
        denoise,
        networks["reward"],
        beta=0.5,
        schedule=schedule,
        steps=torch.where(t < 0.4 * schedule.horizon, 1, 2),
    )
    x0_ta = schedule.to_x0(ta(x_t, t), x_t, t)
    x0_ref = reference_x0(
        reference(x_t, t), x_t, t, schedule=schedule,
        unconditional=networks["unconditional"](x_t, t), guidance_scale=guidance_scale,
    )  # fmt: skip
    want = generator_loss(x0, x_t, t, x0_ta, x0_ref, s_r, schedule=schedule)
    torch.testing.assert_close(two.reward.score, s_r, rtol=0, atol=0)
    torch.testing.assert_close(two.loss, want.loss, rtol=1e-4, atol=0)
    assert torch.equal(two.x0, x0.detach()) and not two.x0.requires_grad
    (grad,) = torch.autograd.grad(two.loss, generator.layers[0].weight)
    (want_grad,) = torch.autograd.grad(want.loss, generator.layers[0].weight)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("reward_at", ["diffused", "endpoint"])
def test_samples_without_a_reward_learn_the_reference(schedule, reward_at):
    """As if the two kinds of samples had come in two batches."""
    networks, z, eps, t = world(schedule)
    config = DIDRConfig(beta=0.5, guidance_scale=4.0, reward_at=reward_at)
    rewarded = torch.tensor([True, False, False, True, True, False])
    asked = []

    def counting(x0):
        asked.append(len(x0))
        return networks["reward"](x0)

    def gradient(rows, reward, mask):
        given = networks | {"reward": reward}
        out = stage_two(**given, z=z[rows], eps=eps[rows], t=t[rows], schedule=schedule, config=config, rewarded=mask)
        return out, torch.autograd.grad(out.loss, networks["generator"].layers[0].weight)[0]

    out, together = gradient(torch.ones(6, dtype=torch.bool), counting, rewarded)
    assert asked == [3]
    assert torch.equal(out.reward.reward.isfinite(), rewarded) and (out.reward.score[~rewarded] == 0).all()
    with_reward, some = gradient(rewarded, counting, None)
    torch.testing.assert_close(out.reward.reward[rewarded], with_reward.reward.reward)
    torch.testing.assert_close(together, (some + gradient(~rewarded, None, None)[1]) / 2, rtol=1e-4, atol=1e-6)

    none, alone = gradient(~rewarded, counting, torch.zeros(3, dtype=torch.bool))
    assert none.reward is None and asked == [3, 3]
    assert torch.equal(alone, gradient(~rewarded, None, None)[1])


@pytest.mark.parametrize("wrong", [torch.ones(6), torch.ones(5, dtype=torch.bool), [True] * 6])
def test_which_samples_have_a_reward_is_said_one_by_one(wrong):
    networks, z, eps, t = world(FLOW)
    with pytest.raises(ValueError, match=r"rewarded: expected shape \(6,\), bool, on cpu, got"):
        stage_two(**networks, z=z, eps=eps, t=t, schedule=FLOW, config=DIDRConfig(beta=0.5), rewarded=wrong)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(FLOW, None), (FLOW, "eps"), (FLOW, "x0"), (SDXL, None), (SDXL, "x0")],
    ids=lambda value: repr(value),
)
def test_noise_from_seeds_is_the_noise_that_they_make(schedule, kind):
    networks, z, _, t = world(schedule)
    seeds = Seeds(7, torch.arange(6) * 3 + 2**33, stream=4)
    eps = crd_fast.noise(torch.zeros(6, 2), torch.ones(6), seed=7, sample_ids=seeds.sample_ids, stream=4).x_t
    generator, ta = networks["generator"], networks["ta"]
    given, made = (stage_one(generator, ta, z, source, t, schedule=schedule, kind=kind) for source in (eps, seeds))
    torch.testing.assert_close(made.errors, given.errors, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.loss, list(ta.parameters())) for out in (given, made)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)

    config = DIDRConfig(beta=0.5, guidance_scale=4.0, weighting="bounded")
    two = [stage_two(**networks, z=z, eps=source, t=t, schedule=schedule, config=config) for source in (eps, seeds)]
    torch.testing.assert_close(two[1].loss, two[0].loss, rtol=1e-3, atol=1e-6)
    assert not torch.equal(
        made.errors, stage_one(generator, ta, z, Seeds(8, seeds.sample_ids), t, schedule=schedule).errors
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_noise_from_seeds_of_float64_samples_keeps_their_precision(schedule):
    """Also at times that are not float64 themselves."""
    x0, ids = torch.randn(6, 2, dtype=torch.float64), torch.arange(6)
    t = sample_times(6, schedule=schedule, seed=3, step=0)
    x_t, made = noised(schedule, x0, Seeds(7, ids), t)
    torch.testing.assert_close(x_t, schedule.add_noise(x0, made.epsilon(torch.float64), t), rtol=0, atol=1e-14)


def test_the_velocity_of_a_variance_preserving_schedule_needs_the_noise():
    networks, z, _, t = world(SDXL)
    with pytest.raises(ValueError, match="eps: expected a tensor, because the error of v under .* got seeds"):
        stage_one(networks["generator"], networks["ta"], z, Seeds(0, torch.arange(6)), t, schedule=SDXL, kind="v")
    noised = crd_fast.noise(torch.zeros(6, 2), torch.full((6,), 0.5), seed=0)
    with pytest.raises(ValueError, match="kind: expected one of .*got 'epsilon'; did you mean 'eps'"):
        ta_loss_of_noised(torch.zeros(6, 2), noised, kind="epsilon")


def test_a_long_correction_is_shortened_to_a_share_of_the_gap():
    networks, z, eps, t = world(FLOW)
    plain, limited = (
        stage_two(
            **networks,
            z=z,
            eps=eps,
            t=t,
            schedule=FLOW,
            config=DIDRConfig(beta=1.0, guidance_scale=4.0, max_correction=most),
        ).generator
        for most in (None, 0.5)
    )
    long = plain.correction > 0.5 * plain.gap
    assert 0 < long.sum() < len(long)
    torch.testing.assert_close(limited.correction, torch.where(long, 0.5 * plain.gap, plain.correction))
    assert torch.equal(limited.gap, plain.gap)


@pytest.mark.parametrize("reward_at", ["diffused", "endpoint"])
def test_the_anchor_is_the_mean_distance_from_the_start_and_its_gradient(reward_at):
    networks, z, eps, t = world(FLOW)
    generator, start = networks["generator"], OneStep()
    weight = generator.layers[0].weight
    given = {"z": z, "eps": eps, "t": t, "schedule": FLOW}
    config = {"beta": 0.5, "guidance_scale": 4.0, "reward_at": reward_at}
    without = stage_two(**networks, **given, config=DIDRConfig(**config), start=start)
    out = stage_two(**networks, **given, config=DIDRConfig(**config, anchor=0.3), start=start)
    distance = ((generator(z) - start(z).detach()).square().mean(1) + DISTANCE_FLOOR**2).sqrt()
    assert without.distance is None and torch.equal(out.distance, distance.detach())
    torch.testing.assert_close(out.loss, without.loss + 0.3 * distance.mean())
    found = torch.autograd.grad(out.loss, [weight, *start.parameters()], allow_unused=True)
    (wanted,) = torch.autograd.grad(without.loss + 0.3 * distance.mean(), weight)
    torch.testing.assert_close(found[0], wanted)
    assert found[1:] == (None,) * len(found[1:])


def test_at_the_start_the_anchor_pulls_nowhere_and_what_is_not_finite_neither():
    networks, z, eps, t = world(FLOW)
    generator = networks["generator"]
    weight = generator.layers[0].weight
    given = {"z": z, "eps": eps, "t": t, "schedule": FLOW}
    plain = stage_two(**networks, **given, config=DIDRConfig(beta=1.0))
    (wanted,) = torch.autograd.grad(plain.loss, weight)
    for start in (copy.deepcopy(generator), lambda z: torch.full_like(z, torch.nan)):
        out = stage_two(**networks, **given, config=DIDRConfig(beta=1.0, anchor=5.0), start=start)
        assert torch.equal(torch.autograd.grad(out.loss, weight)[0], wanted)
        assert torch.equal(out.distance, torch.full((6,), DISTANCE_FLOOR))


def test_an_anchor_needs_the_start():
    networks, z, eps, t = world(FLOW)
    with pytest.raises(
        ValueError, match=r"start: expected the generator as it started because anchor is 0.1, got None"
    ):
        stage_two(**networks, z=z, eps=eps, t=t, schedule=FLOW, config=DIDRConfig(beta=1.0, anchor=0.1))


def test_endpoint_reward_is_the_divergence_and_the_rewards_own_gradient():
    networks, z, eps, t = world(FLOW)
    generator, reward = networks["generator"], networks["reward"]
    weight = generator.layers[0].weight
    config = DIDRConfig(beta=0.5, guidance_scale=4.0, weighting="bounded", reward_at="endpoint")
    out = stage_two(**networks, z=z, eps=eps, t=t, schedule=FLOW, config=config)
    distilled = stage_two(**networks | {"reward": None}, z=z, eps=eps, t=t, schedule=FLOW, config=config)
    x0 = generator(z)
    want = distilled.loss - reward(x0).sum() / 0.5 / x0.numel()
    torch.testing.assert_close(out.loss, want)
    (grad,), (want_grad,) = torch.autograd.grad(out.loss, weight), torch.autograd.grad(want, weight)
    torch.testing.assert_close(grad, want_grad)
    assert torch.equal(out.reward.reward, reward(x0).detach()) and torch.equal(out.reward.x0, x0.detach())
    assert torch.equal(out.generator.correction, torch.zeros(6))


def test_calls_of_each_network():
    """One forward of the reference serves its estimate and the reward's first step; no unconditional one at scale 1."""
    networks, z, eps, _ = world(FLOW)
    calls = dict.fromkeys(networks, 0)
    for name, network in networks.items():
        network.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    early, late = torch.full((6,), 0.3), torch.full((6,), 0.6)
    for t, scale, guided, passes, without in (
        (early, 1.0, False, 1, 0),
        (early, 4.0, False, 1, 1),
        (late, 1.0, False, 2, 0),
        (late, 4.0, False, 2, 1),
        (late, 4.0, True, 2, 2),
        (late, 1.0, True, 2, 0),
    ):
        calls.update(dict.fromkeys(calls, 0))
        config = DIDRConfig(beta=1.0, guidance_scale=scale, guided_estimate=guided)
        stage_two(**networks, z=z, eps=eps, t=t, schedule=FLOW, config=config)
        assert calls == {"generator": 1, "ta": 1, "reference": passes, "unconditional": without, "reward": 1}


def test_samples_without_a_reward_take_no_steps_of_the_rewarded_estimate():
    networks, z, eps, _ = world(FLOW)
    t = torch.tensor([0.3, 0.6, 0.3, 0.6, 0.3, 0.6])
    asked = []
    networks["reference"].register_forward_hook(lambda *_: asked.append(1))
    given = {"z": z, "eps": eps, "t": t, "schedule": FLOW, "config": DIDRConfig(beta=1.0)}
    out = stage_two(**networks, **given, rewarded=t < 0.5)
    assert len(asked) == 1
    every = stage_two(**networks, **given)
    assert len(asked) == 3
    assert torch.equal(out.reward.score[t < 0.5], every.reward.score[t < 0.5])


@pytest.mark.parametrize("reward_at", ["diffused", "endpoint"])
def test_a_reward_that_is_not_finite_takes_its_sample_alone(reward_at):
    """The others move as if it had a gradient that is finite, whatever that is."""
    networks, z, eps, t = world(FLOW)
    weight = networks["generator"].layers[-1].bias
    config = DIDRConfig(beta=0.5, reward_at=reward_at)

    def run(factor):
        def reward(x0):
            return networks["reward"](x0) * torch.tensor([1.0, 1.0, factor, 1.0, 1.0, 1.0])

        out = stage_two(
            **networks | {"reward": reward}, z=z, eps=eps, t=t, schedule=FLOW, config=config
        )  # fmt: skip
        return out, torch.autograd.grad(out.loss, weight)[0]

    (broken, gradient), (fine, _) = run(float("nan")), run(1.0)
    assert broken.generator.zeroed.tolist() == [0, 0, 2, 0, 0, 0] and fine.generator.zeroed.sum() == 0
    assert broken.generator.metrics["nonfinite"] == 2
    assert broken.loss.isfinite() and gradient.isfinite().all() and gradient.any()


def test_guidance_without_an_unconditional_prediction():
    networks, z, eps, t = world(FLOW)
    networks.pop("unconditional")
    with pytest.raises(ValueError, match="unconditional: expected .* because guidance_scale is 4.0, got None"):
        stage_two(**networks, z=z, eps=eps, t=t, schedule=FLOW, config=DIDRConfig(beta=1.0, guidance_scale=4.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "DIDRConfig.beta: expected a number > 0, got 0.0"),
        ({"beta": "1"}, "DIDRConfig.beta: expected a finite number"),
        ({"guidance_scale": -1.0}, "DIDRConfig.guidance_scale: expected a number >= 0"),
        ({"guidance_scale": math.inf}, "DIDRConfig.guidance_scale: expected a finite number"),
        ({"split": 1.5}, "DIDRConfig.split: expected a share"),
        ({"late_steps": 0}, "DIDRConfig.late_steps: expected an int >= 1"),
        ({"late_steps": 2.0}, "DIDRConfig.late_steps: expected an int >= 1"),
        ({"reward_at": "end"}, "DIDRConfig.reward_at: expected one of .*did you mean 'endpoint'"),
        ({"guided_estimate": 1}, "DIDRConfig.guided_estimate: expected true or false"),
        ({"anchor": -0.1}, "DIDRConfig.anchor: expected a number >= 0"),
        ({"anchor": math.nan}, "DIDRConfig.anchor: expected a finite number"),
        ({"max_correction": 0.0}, "DIDRConfig.max_correction: expected a number > 0, or None"),
        ({"weighting": "iklq"}, "DIDRConfig.weighting: expected one of .*did you mean 'ikl'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        DIDRConfig(**{"beta": 1.0} | changes)


# --- trained ---

SHARES = torch.tensor([0.35, 0.65])
CENTERS = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])
VARIANCE = 0.3
SLOPE = 2.0  # reward 2 y: each component moves by VARIANCE SLOPE / beta along y and keeps its share


def mixture_velocity(x, t):
    """The best velocity for the mixture, under rectified flow."""
    alpha, sigma = (level[:, None] for level in FLOW.levels(t, x.dtype))
    spread = alpha**2 * VARIANCE + sigma**2  # (B, 1)
    away = x[:, None, :] - alpha[:, :, None] * CENTERS  # (B, 2, 2)
    weight = (SHARES.log() - away.square().sum(-1) / (2 * spread)).softmax(1)  # (B, 2)
    score = -(weight[..., None] * away).sum(1) / spread
    return FLOW.convert(score, x, t, to="v", kind="score")


def test_alternating_stages_reach_the_tilted_mixture():
    """A learned TA and a learned generator in two dimensions, from noise to p_ref exp(r / beta).

    The reward is linear and does not tell the components apart, so the proxy with one step is exact and the optimum is
    the mixture moved by 0.6: shares (0.35, 0.65), mean (0.45, 0.6), deviation 0.548 of y.
    """
    torch.manual_seed(0)
    generator, ta = OneStep(), Predictor(FLOW)
    rates = {generator: 1e-3, ta: 3e-3}
    adam = {n: torch.optim.Adam(n.parameters(), lr=rate, betas=(0.5, 0.99)) for n, rate in rates.items()}
    config = DIDRConfig(beta=1.0, weighting="bounded", late_steps=1)
    noise = torch.Generator().manual_seed(0)
    iterations, warm_up, ratio, batch, drawn = 600, 200, 3, 256, 0

    def draw():
        nonlocal drawn
        drawn += 1
        z, eps = torch.randn(2, batch, 2, generator=noise)
        return z, eps, sample_times(batch, schedule=FLOW, seed=0, step=drawn)

    for i in range(iterations):
        for _ in range(ratio if i else warm_up):
            adam[ta].zero_grad()
            stage_one(generator, ta, *draw(), schedule=FLOW).loss.backward()
            adam[ta].step()
        adam[generator].zero_grad()
        out = stage_two(
            generator, ta, mixture_velocity, lambda x0: SLOPE * x0[:, 1], *draw(), schedule=FLOW, config=config
        )
        out.loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        adam[generator].step()
        for network, optimizer in adam.items():
            optimizer.param_groups[0]["lr"] = rates[network] * min(1.0, 2 * (1 - i / iterations) + 0.02)

    with torch.no_grad():
        x0 = generator(torch.randn(20000, 2, generator=noise))
    right = x0[:, 0] > 0
    assert right.float().mean().item() == pytest.approx(0.65, abs=0.06)
    assert x0[:, 0].mean().item() == pytest.approx(0.45, abs=0.15)
    assert x0[:, 1].mean().item() == pytest.approx(0.6, abs=0.05)
    assert x0[:, 1].std().item() == pytest.approx(VARIANCE**0.5, abs=0.05)
    for side, center in ((~right, -1.5), (right, 1.5)):
        assert x0[side, 0].mean().item() == pytest.approx(center, abs=0.2)
        assert x0[side, 1].mean().item() == pytest.approx(0.6, abs=0.1)
