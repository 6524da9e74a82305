"""The two stages of an iteration, as losses: what a trainer differentiates, clips and steps.

"Diff-Instruct with Diffused Reward" (arXiv 2605.24001): Stage I several times, then Stage II once. The paper's training
code is not public; this follows its text.

Models are callables (x_t (B, *latent), t (B,)) -> prediction (B, *latent) of the schedule's own kind, with their
prompts and their precision inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast import checks
from crd_fast.didr.diffused_reward import Damping, DiffusedReward, Reward, diffused_reward, proxy_steps
from crd_fast.didr.generator import GeneratorOutput, generator_loss_of_predictions
from crd_fast.didr.noising import Seeds, noised
from crd_fast.didr.reference import WEIGHTINGS
from crd_fast.didr.ta import TAOutput, ta_loss, ta_loss_of_noised
from crd_fast.errors import ConfigError, nearest
from crd_fast.schedules import VP, Schedule

Generator = Callable[[Tensor], Tensor]
"""z -> clean latents (B, *latent)."""
Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, *latent), t (B,)) -> prediction (B, *latent)."""
REWARDS_AT = ("diffused", "endpoint")
DISTANCE_FLOOR = 0.01


@dataclass(frozen=True)
class DIDRConfig:
    """Settings of Stage II.

    beta: temperature of the reward, > 0: the optimum is the reference times exp(reward / beta).
    guidance_scale: w of the reference u + w (c - u), >= 0; 1 needs no unconditional prediction.
    weighting: "ikl", "bounded" or "dmd2", see `generator_loss`.
    reward_at: "diffused", the method: the reward adds its diffused score to the reference's. Or "endpoint", to compare
        with: the reward's gradient at the generator's own sample, whatever the time (Diff-Instruct++, arXiv 2410.18881:
        minimise E[-r(x0)] / beta beside the integral of KL to the reference); the settings below are not used then.
    guided_estimate: whether the estimate that is rewarded is guided as the reference is, which costs an unconditional
        pass with graph. Unguided estimates are those of a wider distribution than the one that is tilted.
    split, late_steps: steps of the rewarded estimate are 1 below this share of the time range and this many above, see
        `proxy_steps`.
    anchor: weight, >= 0, of the mean distance between the generator's samples and those that it made of the same noise
        when it started, root mean square over a sample's elements. A divergence estimated by a TA that lags lets the
        generator drift where nothing asks it to, towards fewer modes; the distance, which is not squared, lets few
        samples change much and holds the others. Ours: the paper has none.
    max_correction: where (sigma^2/alpha) s_r of a sample is longer than this many times its x0_ta - x0_ref, it is
        shortened to that; None leaves it. Bounds the pull of a reward whose gradient is large at some times.

    Raises:
        ConfigError (a ValueError): a value outside its range, naming the field.
    """

    beta: float
    guidance_scale: float = 1.0
    weighting: str = "ikl"
    reward_at: str = "diffused"
    guided_estimate: bool = False
    split: float = 0.4
    late_steps: int = 2
    max_correction: float | None = None
    anchor: float = 0.0

    def __post_init__(self) -> None:
        try:
            for name in ("beta", "guidance_scale", "split", "anchor"):
                checks.require_finite_number(name, getattr(self, name))
            most = (
                None
                if self.max_correction is None
                else checks.require_finite_number("max_correction", self.max_correction)
            )
        except ValueError as error:
            raise ConfigError(f"DIDRConfig.{error}") from None
        late = self.late_steps
        for name, fine, expected in (
            ("beta", self.beta > 0, "a number > 0"),
            ("guidance_scale", self.guidance_scale >= 0, "a number >= 0"),
            ("split", 0 <= self.split <= 1, "a share of the time range in [0, 1]"),
            ("late_steps", isinstance(late, int) and not isinstance(late, bool) and late >= 1, "an int >= 1"),
            ("guided_estimate", isinstance(self.guided_estimate, bool), "true or false"),
            ("anchor", self.anchor >= 0, "a number >= 0"),
            ("max_correction", most is None or most > 0, "a number > 0, or None"),
        ):
            if not fine:
                raise ConfigError(f"DIDRConfig.{name}: expected {expected}, got {getattr(self, name)!r}")
        for name, value, known in (
            ("weighting", self.weighting, WEIGHTINGS),
            ("reward_at", self.reward_at, REWARDS_AT),
        ):
            if value not in known:
                raise ConfigError(
                    f"DIDRConfig.{name}: expected one of {known}, got {value!r}{nearest(str(value), known)}"
                )


@dataclass(frozen=True)
class StageTwoOutput:
    """loss: scalar; it carries the graph, everything else is detached. generator: the divergence's part of it, with its
    metrics. reward: with its score, of the reference's estimates, or of x0 for "endpoint"; None without a reward.
    x0 (B, *latent): the generator's samples. distance (B,): from the start's, None without an anchor."""

    loss: Tensor
    generator: GeneratorOutput
    reward: DiffusedReward | None
    x0: Tensor
    distance: Tensor | None = None


def stage_one(
    generator: Generator,
    ta: Predict,
    z: Tensor,
    eps: Tensor | Seeds,
    t: Tensor,
    *,
    schedule: Schedule,
    kind: str | None = None,
) -> TAOutput:
    """Stage I: the TA's loss on fresh samples of the generator, which runs without graph. Gradients flow to the TA.

    z: what the generator takes. eps: (B, *latent) noise, or `Seeds`, from which it is made where it is needed and never
    stored. t: (B,) times, moved to the samples' device. kind: the error is taken of this, "eps", "v" or "x0", after the
    prediction was converted to it; None is the schedule's own.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or seeds for the velocity of a variance-preserving
            schedule, whose error needs the noise itself.
        ExtensionMissingError: see `crd_fast.ops`.
    """
    with torch.no_grad():
        x0 = generator(z)
        t = t.to(x0.device)
        made = None
        if isinstance(eps, Tensor):
            x_t = schedule.add_noise(x0, eps, t)
        else:
            x_t, made = noised(schedule, x0, eps, t)
    kind = kind or schedule.kind
    if made is not None and isinstance(schedule, VP) and kind == "v":
        raise ValueError(f"eps: expected a tensor, because the error of v under {schedule!r} needs it, got seeds")
    predicted = ta(x_t, t)
    if kind != schedule.kind:
        predicted = schedule.convert(predicted, x_t, t, to=kind)
    if isinstance(eps, Tensor):
        return ta_loss(predicted, x0, eps, t, schedule=schedule, kind=kind)
    assert made is not None
    return ta_loss_of_noised(predicted, made, kind=kind)


def stage_two(
    generator: Generator,
    ta: Predict,
    reference: Predict,
    reward: Reward | None,
    z: Tensor,
    eps: Tensor | Seeds,
    t: Tensor,
    *,
    schedule: Schedule,
    config: DIDRConfig,
    unconditional: Predict | None = None,
    damping: Damping | None = None,
    rewarded: Tensor | None = None,
    start: Generator | None = None,
) -> StageTwoOutput:
    """Stage II: the generator's loss. Gradients flow to the generator alone.

    The conditional prediction of the reference is made once, with graph, and serves both its clean estimate and the
    first step of the rewarded one. So does the unconditional one where `guided_estimate` is set.

    Args:
        generator: runs with graph. ta: the TA network. reference: the frozen reference's conditional prediction.
        reward: clean latents -> (B,) rewards with graph. None distils the reference as it is, which is how a one-step
            generator is made, or warmed up (Diff-Instruct, arXiv 2305.18455).
        z: what the generator takes. eps: (B, *latent) noise, or `Seeds`. t: (B,) times on the CPU, as `sample_times`
            gives them.
        schedule: of t. config: `DIDRConfig`.
        unconditional: the reference's prediction for the empty prompt, called where guidance_scale is not 1.
        damping: of the reward's score, see `diffused_reward`.
        rewarded: bool (B,) on the CPU, the samples that have a reward, which is called with these alone; None is all.
            The others learn the reference as it is, and their reward is told as NaN.
        start: the generator as it started, called without graph where config.anchor is not 0.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or no unconditional prediction or no `start` where it is
            needed.
    """
    if unconditional is None and config.guidance_scale != 1.0:
        raise ValueError(
            f"unconditional: expected the reference's prediction for the empty prompt because guidance_scale is "
            f"{config.guidance_scale}, got None"
        )
    if start is None and config.anchor != 0:
        raise ValueError(f"start: expected the generator as it started because anchor is {config.anchor}, got None")
    steps = proxy_steps(t, schedule, split=config.split, late=config.late_steps)
    if rewarded is not None:
        checks.require_per_sample("rewarded", rewarded, len(t), torch.device("cpu"), dtypes=(torch.bool,))
        steps = torch.where(rewarded, steps, 1)  # nobody looks at the others' estimates
    x0 = generator(z)
    t = t.to(x0.device)
    with torch.no_grad():
        x_t = schedule.add_noise(x0, eps, t) if isinstance(eps, Tensor) else noised(schedule, x0, eps, t)[0]
        ta_prediction = ta(x_t, t)
    other = unconditional if config.guidance_scale != 1.0 else None
    firsts: list[tuple[Tensor, Tensor | None]] = []  # predictions at (x_t, t)

    def denoise(x: Tensor, now: Tensor) -> Tensor:
        conditional = predicted = reference(x, now)
        without = None
        if other is not None and config.guided_estimate:
            without = other(x, now)
            predicted = without + config.guidance_scale * (conditional - without)
        firsts.append((conditional.detach(), None if without is None else without.detach()))
        return schedule.to_x0(predicted, x, now)

    found = None
    diffused = reward is not None and config.reward_at == "diffused"
    if reward is not None and rewarded is not None:
        reward = _reward_of_some(reward, rewarded, len(x0))
    if reward is not None and diffused:
        found = diffused_reward(
            x_t, t, denoise, reward, beta=config.beta, schedule=schedule, steps=steps, damping=damping
        )
        score = found.score
    else:
        score = torch.zeros_like(x0)
    with torch.no_grad():
        conditional, without = firsts[0] if firsts else (reference(x_t, t), None)
        if other is not None and without is None:
            without = other(x_t, t)
    out = generator_loss_of_predictions(
        x0,
        x_t,
        t,
        ta_prediction,
        conditional,
        score,
        schedule=schedule,
        unconditional=without,
        guidance_scale=config.guidance_scale,
        weighting=config.weighting,
        max_correction=config.max_correction,
    )
    loss = out.loss
    if reward is not None and not diffused:
        found = diffused_reward(x0.detach(), t, lambda x, _: x, reward, beta=config.beta, schedule=schedule)
        pull, nonfinite = _endpoint_loss(x0, found, config.beta)
        zeroed = torch.maximum(out.zeroed, nonfinite)
        out = dataclasses.replace(out, zeroed=zeroed, metrics=out.metrics | {"nonfinite": zeroed.sum()})
        loss = loss + pull
    distance = None
    if start is not None and config.anchor != 0:
        distance = _distance(x0, start, z)
        loss = loss + config.anchor * distance.mean()
        distance = distance.detach()
    if found is not None and rewarded is not None:
        told = torch.where(rewarded.to(found.reward.device), found.reward, torch.nan)
        found = dataclasses.replace(found, reward=told)
    return StageTwoOutput(loss=loss, generator=out, reward=found, x0=x0.detach(), distance=distance)


def _distance(x0: Tensor, start: Generator, z: Tensor) -> Tensor:
    """(B,) root mean square of x0 minus what the start makes of z, at least `DISTANCE_FLOOR`, where its slope falls to
    0. Elements that are not finite are no distance."""
    with torch.no_grad():
        origin = start(z)
    difference = x0 - checks.require_like("start(z)", origin, "x0", x0).to(x0.dtype)
    difference = torch.where(difference.isfinite(), difference, 0.0)
    return (difference.square().flatten(1).mean(1) + DISTANCE_FLOOR**2).sqrt()


def _reward_of_some(reward: Reward, rewarded: Tensor, batch: int) -> Reward | None:
    """The reward of the samples that have one and 0 of the others; None where there is none that has."""
    rows = rewarded.nonzero()[:, 0]
    if not len(rows):
        return None

    def scored(latents: Tensor) -> Tensor:
        there = rows.to(latents.device)
        values = reward(latents[there])
        checks.require_per_sample("reward(x0)", values, len(rows), latents.device)
        return values.new_zeros(batch).index_copy(0, there, values)

    return scored


def _endpoint_loss(x0: Tensor, found: DiffusedReward, beta: float) -> tuple[Tensor, Tensor]:
    """-r(x0) / beta, mean over samples and elements as the divergence's loss is; only x0 gets a gradient.

    Elements whose slope is not finite pull nowhere; with the loss comes how many there are of each sample, (B,). A
    reward that is not finite is left out of the loss.
    """
    finite = found.score.isfinite()
    pull = torch.where(finite, found.score, 0.0) * (x0 - x0.detach())  # zero, with the score as its slope
    reward = torch.where(found.reward.isfinite(), found.reward, 0.0)
    return -(pull.sum() + reward.sum() / beta) / x0.numel(), (~finite).flatten(1).sum(1)
