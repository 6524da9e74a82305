from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from crd_fast.acceleration.fp8 import FrozenFP8Linear
from crd_fast.acceleration.noise_ratio import check_reference_noise, gradient_cosine, reference_noise_ratio
from crd_fast.errors import ConfigError


def test_ratio_is_that_of_mean_squares_over_the_first_samples() -> None:
    reference, noise, step = (torch.randn(100, 4, 3, 3) for _ in range(3))
    noise *= torch.linspace(0.1, 3, 100).reshape(-1, 1, 1, 1)  # so that the choice of samples matters
    for count, sizes in ((64, [10] * 10), (64, [64, 36]), (64, [100]), (20, [7] * 14 + [2]), (100, [50, 50])):
        taken: list[int] = []

        def bf16(batch: Tensor, taken: list[int] = taken) -> Tensor:
            taken.append(len(batch))
            return reference[batch]

        ratio = reference_noise_ratio(
            bf16,
            lambda batch: (reference + noise)[batch],
            lambda batch: (reference + step)[batch],
            torch.arange(100).split(sizes),
            samples=count,
        )
        expected = noise[:count].double().square().mean() / step[:count].double().square().mean()
        assert ratio == pytest.approx(expected.item(), rel=1e-6)
        assert sum(taken) - taken[-1] < count  # nothing is predicted in vain


def test_fewer_samples_than_asked_for_are_all_used() -> None:
    ratio = reference_noise_ratio(
        lambda batch: torch.zeros(2, 5),
        lambda batch: torch.full((2, 5), 0.1, dtype=torch.bfloat16),
        lambda batch: torch.full((2, 5), float(batch)),
        [1, 2],
    )
    assert ratio == pytest.approx(torch.tensor(0.1).bfloat16().item() ** 2 / 2.5, rel=1e-9)


def test_no_graph_is_made() -> None:
    weight = torch.randn(3, requires_grad=True)
    seen: list[Tensor] = []

    def predict(batch: Tensor) -> Tensor:
        seen.append(batch * weight)
        return seen[-1]

    reference_noise_ratio(predict, predict, lambda batch: batch + 1, [torch.randn(4, 3)])
    assert len(seen) == 2 and not any(tensor.requires_grad for tensor in seen)


def test_a_trained_model_that_has_not_moved_and_predictions_that_are_not_finite() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)

    def ratio(bf16: Tensor, fp8: Tensor, trained: Tensor) -> float:
        return reference_noise_ratio(lambda _: bf16, lambda _: fp8, lambda _: trained, [None])

    assert ratio(zeros, ones, zeros) == math.inf
    assert ratio(zeros, zeros, zeros) == 0
    for bad in (math.nan, math.inf):
        wrong = torch.tensor([[0.0, bad, 0.0]]).expand(2, 3)
        for case in ((wrong, ones, zeros), (zeros, wrong, ones), (zeros, ones, wrong), (zeros, wrong, zeros)):
            assert math.isnan(ratio(*case))
    with pytest.raises(ValueError, match="no sample"):
        reference_noise_ratio(lambda _: zeros, lambda _: zeros, lambda _: ones, [])
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 1\), \(2, 3\)"):
        ratio(zeros, zeros[:, :1], ones)  # would broadcast


def test_guidance_multiplies_the_noise() -> None:
    """The reason for the check: at scale s, c + (s - 1)(c - u) of two rounded predictions is far noisier than c."""
    torch.manual_seed(1)
    layer = nn.Linear(256, 256, dtype=torch.bfloat16).requires_grad_(False)
    fp8 = FrozenFP8Linear.from_linear(layer)
    conditional, unconditional = torch.randn(2, 64, 256, dtype=torch.bfloat16)

    def guided(model: nn.Module, scale: float) -> Tensor:
        c, u = model(conditional).float(), model(unconditional).float()
        return u + scale * (c - u)

    def ratio(scale: float) -> float:
        plain = guided(layer, 1.0)
        return reference_noise_ratio(
            lambda _: guided(layer, scale),
            lambda _: guided(fp8, scale),
            # as far from the reference at any scale
            lambda _: guided(layer, scale) + plain,
            [None],
        )

    # c and u are independent here: s^2 + (s - 1)^2 times the variance
    assert ratio(4.5) / ratio(1.0) == pytest.approx(4.5**2 + 3.5**2, rel=0.1)


def test_the_limit_and_what_to_set() -> None:
    check_reference_noise(0.0)
    check_reference_noise(0.0499)
    check_reference_noise(0.2, limit=0.3)
    for ratio, found in (
        (0.05, r"5\.0% of its squared distance"),
        (0.123, r"12\.3% of its squared distance .* 5\.0% is the limit"),
        (math.inf, "equals the reference so far"),
        (math.nan, "NaN or infinite"),
    ):
        with pytest.raises(ConfigError, match=rf"{found}.*: set precision\.ref=bf16"):
            check_reference_noise(ratio)


def test_cosine_is_that_of_all_tensors_together() -> None:
    a, b = ([torch.randn(3, 4), torch.randn(7)] for _ in range(2))
    whole = torch.cosine_similarity(*(torch.cat([t.flatten() for t in side]) for side in (a, b)), dim=0)
    assert gradient_cosine(a, b) == pytest.approx(whole.item(), rel=1e-5)
    assert gradient_cosine(a, [t * 3 for t in a]) == pytest.approx(1, abs=1e-7)
    assert gradient_cosine(a, [-t for t in a]) == pytest.approx(-1, abs=1e-12)
    assert gradient_cosine([torch.tensor([1.0, 0])], [torch.tensor([0, 1e30])]) == 0
    # squares beyond fp32, and tensors of different magnitude
    large = [torch.full((2,), 1e30), torch.full((2,), 1e-3)]
    assert gradient_cosine(large, large) == pytest.approx(1, abs=1e-12)
    assert math.isnan(gradient_cosine([torch.tensor([math.nan])], [torch.ones(1)]))
    with pytest.raises(ValueError, match="2 and 1 tensors"):
        gradient_cosine(a, b[:1])
    with pytest.raises(ValueError, match="same tensors, in one order"):
        gradient_cosine(a, b[::-1])
    with pytest.raises(ValueError, match="no direction"):
        gradient_cosine(a, [torch.zeros_like(t) for t in a])
