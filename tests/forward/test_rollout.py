"""The rollout's solvers on a flow whose end is known: dx/dsigma = a(sigma) x, with a rate of its own for each prompt.

With a(sigma) = rate (1 + 2 sigma), x(0) = x(1) exp(-2 rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.errors import ConfigError
from crd_fast.rollout import SOLVERS, generate

Grid = Callable[[int], Tensor]


class Rate(nn.Module):
    config = SimpleNamespace()

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, sigma: Tensor, rate: Tensor) -> Tensor:
        return self.factor * rate.view(-1, 1, 1, 1) * (1 + 2 * sigma.view(-1, 1, 1, 1)) * x


def shifted(steps: int) -> Tensor:
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 3 * sigma / (1 + 2 * sigma)


def alternating(steps: int) -> Tensor:
    """Every other step is three times as long as the one before, however many there are."""
    lengths = torch.ones(steps, dtype=torch.float64)
    lengths[1::2] = 3
    return 1 - torch.cat([torch.zeros(1), (lengths / lengths.sum()).cumsum(0)])


class Flow(Backbone):
    """The analytic flow behind the interface that every family has."""

    family = "analytic"
    latent_shape = (2, 3, 3)

    def __init__(self, grid: Grid = shifted, scale: float = 1.0) -> None:
        parts = SimpleNamespace(transformer=Rate(), vae=nn.Identity(), set_progress_bar_config=lambda disable: None)
        super().__init__(parts, LoadOptions())
        self._grid, self._scale = grid, scale

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> Flow:
        return cls()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"rate": torch.tensor([float(prompt) for prompt in prompts])})

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.transformer(x_t, sigma, conditioning.tensors["rate"])

    def rollout_sigmas(self, steps: int) -> Tensor:
        return self._grid(steps).float()

    def start_scale(self, steps: int) -> float:
        return self._scale

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        return latents


class DistilledFlow(Flow):
    guidance = "distilled"


def start(rows: int = 3) -> Tensor:
    return torch.randn(rows, *Flow.latent_shape, generator=torch.Generator().manual_seed(2))


def end(x: Tensor, rate: float) -> Tensor:
    return x * math.exp(-2 * rate)


def error(solver: str, grid: Grid, steps: int) -> float:
    flow = Flow(grid)
    clean = generate(flow, flow.encode_prompts(["0.8"] * 3), start(), steps=steps, solver=solver)
    return (clean - end(start(), 0.8)).abs().max().item()


@pytest.mark.parametrize("grid", [shifted, alternating])
@pytest.mark.parametrize(("solver", "factor"), [("euler", 2), ("multistep", 4)])
def test_order_of_convergence(solver: str, factor: int, grid: Grid) -> None:
    """Halving the steps divides the error by 2 and by 4, also where steps do not become alike."""
    errors = [error(solver, grid, steps) for steps in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(factor, rel=0.1)


def test_euler_steps_by_hand() -> None:
    flow = Flow(lambda steps: torch.tensor([1.0, 0.5, 0.0]))
    clean = generate(flow, flow.encode_prompts(["0.5"] * 3), start(), steps=2)
    # slopes 0.5 * 3 at 1 and 0.5 * 2 at 0.5
    torch.testing.assert_close(clean, start() * (1 - 0.5 * 1.5) * (1 - 0.5 * 1.0))


def test_one_step_is_the_same_for_both_solvers() -> None:
    flow = Flow()
    ends = [generate(flow, flow.encode_prompts(["0.2"] * 3), start(), steps=1, solver=name) for name in SOLVERS]
    assert torch.equal(*ends)


def test_every_sample_follows_its_own_prompt() -> None:
    flow = Flow()
    clean = generate(flow, flow.encode_prompts(["0.1", "0.5", "-0.3"]), start(), steps=512, solver="multistep")
    expected = torch.stack([end(x, rate) for x, rate in zip(start(), (0.1, 0.5, -0.3), strict=True)])
    torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-5)


def test_the_start_is_scaled_to_the_first_level() -> None:
    flow, scaled = Flow(), Flow(scale=1.75)
    embedded = flow.encode_prompts(["0.3"] * 3)
    torch.testing.assert_close(
        generate(scaled, embedded, start(), steps=4), generate(flow, embedded, 1.75 * start(), steps=4)
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_combines_the_two_rates(solver: str) -> None:
    """u + w (c - u) of rates 0.2 and 0.5 with w = 3 is the rate 1.1, whichever solver combines it."""
    flow = Flow()
    guided = generate(
        flow,
        flow.encode_prompts(["0.5"] * 3),
        start(),
        steps=6,
        guidance_scale=3.0,
        solver=solver,
        unconditional=flow.encode_prompts(["0.2"]),
    )
    alone = generate(flow, flow.encode_prompts(["1.1"] * 3), start(), steps=6, solver=solver)
    torch.testing.assert_close(guided, alone, rtol=1e-5, atol=1e-6)


def test_without_guidance_the_unconditional_embeddings_are_not_used() -> None:
    flow = Flow()
    embedded, other = flow.encode_prompts(["0.5"] * 3), flow.encode_prompts(["nan"])
    plain = generate(flow, embedded, start(), steps=4)
    for scale in (None, flow.unguided_scale):
        assert torch.equal(plain, generate(flow, embedded, start(), steps=4, guidance_scale=scale, unconditional=other))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_samples_do_not_depend_on_the_batch(solver: str, guidance: float | None) -> None:
    flow = Flow()
    embedded, unconditional = flow.encode_prompts(["0.1", "0.2", "0.3", "0.4", "0.5"]), flow.encode_prompts(["0.7"])
    x = start(5)

    def samples(batch: int | None, seen: list[int]) -> Tensor:
        return generate(
            flow,
            embedded,
            x,
            steps=5,
            guidance_scale=guidance,
            solver=solver,
            unconditional=unconditional,
            batch=batch,
            on_batch=seen.append,
        )

    whole = samples(None, [])
    for batch, expected in ((1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])):
        seen: list[int] = []
        assert torch.equal(samples(batch, seen), whole) and seen == expected
    assert len({sample.sum().item() for sample in whole}) == 5


def test_no_gradients_and_an_untouched_start() -> None:
    flow = Flow()
    x = start()
    clean = generate(flow, flow.encode_prompts(["0.5"] * 3), x, steps=2)
    assert not clean.requires_grad and torch.equal(x, start()) and flow.transformer.factor.requires_grad is False


def test_an_unknown_solver_is_refused() -> None:
    flow = Flow()
    with pytest.raises(ValueError, match="solver is 'heun': expected one of euler, multistep"):
        generate(flow, flow.encode_prompts(["1"] * 3), start(), steps=2, solver="heun")


def test_guidance_without_an_unconditional_prediction_is_refused() -> None:
    flow = Flow()
    with pytest.raises(ValueError, match="guidance_scale is 2.5: give the unconditional embeddings"):
        generate(flow, flow.encode_prompts(["1"] * 3), start(), steps=2, guidance_scale=2.5)


def test_guidance_that_the_family_does_not_have_is_refused() -> None:
    flow = DistilledFlow()
    with pytest.raises(ConfigError, match="guidance_scale is 2.5, but analytic was distilled"):
        generate(
            flow,
            flow.encode_prompts(["1"] * 3),
            start(),
            steps=2,
            guidance_scale=2.5,
            unconditional=flow.encode_prompts(["0"]),
        )
