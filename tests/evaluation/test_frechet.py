"""The Fréchet distance against closed forms, and its feature space against damage done to images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crd_fast.errors import DataError
from crd_fast.evaluation.frechet import RandomFeatures, frechet_distance, gaussian_frechet

PINNED = [0.0157526, -0.22935, -0.1705366, -0.1460873]


def _scenes(count: int, seed: int, *, discs: bool | None = None) -> Tensor:
    """(count, 3, 64, 64) soft-edged discs and squares in four colours on a dark ground."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[0.9, 0.25, 0.25], [0.25, 0.7, 0.35], [0.3, 0.45, 0.9], [0.9, 0.8, 0.25]])
    grid = torch.arange(64.0)
    images = torch.full((count, 3, 64, 64), 0.07)
    for i in range(count):
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            x, y = torch.randint(10, 54, (2,), generator=generator).tolist()
            radius = float(torch.randint(6, 12, (1,), generator=generator))
            colour = colours[torch.randint(0, 4, (1,), generator=generator)].view(3, 1, 1)
            disc = bool(torch.randint(0, 2, (1,), generator=generator))
            dx, dy = (grid - x)[None, :], (grid - y)[:, None]
            inside = (
                radius - (dx.square() + dy.square()).sqrt()
                if (disc if discs is None else discs)
                else radius - torch.maximum(dx.abs(), dy.abs())
            )
            mask = (inside + 0.5).clamp(0, 1)
            images[i] = images[i] * (1 - mask) + colour * mask
    return images


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These convolutions are too small to share: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def features() -> RandomFeatures:
    return RandomFeatures()


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    return _scenes(200, 1)


@pytest.fixture(scope="module")
def reference(features: RandomFeatures, scenes: Tensor) -> Tensor:
    return features(scenes)


@pytest.fixture(scope="module")
def floor(features: RandomFeatures, reference: Tensor) -> float:
    """Distance of two finite sets of one distribution."""
    return frechet_distance(reference, features(_scenes(200, 2)))


def _blur(images: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-12.0, 13.0)
    kernel = torch.exp(-0.5 * (x / sigma).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).repeat(3, 1, 1, 1)
    padded = functional.pad(images, (12, 12, 12, 12), mode="replicate")
    rows = functional.conv2d(padded, kernel, groups=3)
    return functional.conv2d(rows, kernel.transpose(2, 3), groups=3).clamp(0, 1)


def _noise(images: Tensor, sigma: float) -> Tensor:
    draw = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * draw).clamp(0, 1)


def _redder(images: Tensor, shift: float) -> Tensor:
    return (images + torch.tensor([shift, 0.0, 0.0]).view(1, 3, 1, 1)).clamp(0, 1)


def test_one_dimensional_gaussians_have_the_closed_form() -> None:
    """(m_a - m_b)² + (s_a - s_b)²."""
    one = torch.ones(1)
    value = gaussian_frechet(0.5 * one, torch.diag(4.0 * one), 2.0 * one, torch.diag(9.0 * one))
    assert value == pytest.approx(1.5**2 + (2 - 3) ** 2, abs=1e-12)


def test_commuting_covariances_have_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    a = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    b = torch.tensor([0.2, 0.5, 0.3, 4.0, 1.0, 1.0], dtype=torch.float64)
    mean_a, mean_b = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    expected = float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    value = gaussian_frechet(mean_a, basis @ a.diag() @ basis.T, mean_b, basis @ b.diag() @ basis.T)
    assert value == pytest.approx(expected, abs=1e-7)


def test_two_by_two_covariances_that_do_not_commute() -> None:
    """In two dimensions tr(sqrt(M)) = sqrt(tr M + 2 sqrt(det M)) with M = S_a S_b."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    trace, determinant = float((a @ b).trace()), float(torch.linalg.det(a) * torch.linalg.det(b))
    expected = 7.0 - 2.0 * math.sqrt(trace + 2.0 * math.sqrt(determinant))
    assert gaussian_frechet(zero, a, zero, b) == pytest.approx(expected, abs=1e-12)


def test_sample_moments_match_a_shift_and_scale_computed_by_hand() -> None:
    """b = 3 a + c: the sample covariances are S and 9 S, so the distance is |m_b - m_a|² + 4 tr S."""
    a = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = 3.0 * a + torch.arange(5.0, dtype=torch.float64)
    expected = float((b.mean(0) - a.mean(0)).square().sum() + 4.0 * a.var(0).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_identity_symmetry_and_rotation_invariance() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(150, 8, generator=generator, dtype=torch.float64) @ mix + 0.3
    turn = torch.linalg.qr(mix)[0]
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_too_few_samples_say_how_many_are_needed() -> None:
    enough, few = torch.randn(70, 64), torch.randn(64, 64)
    assert math.isfinite(frechet_distance(enough, torch.randn(65, 64)))
    with pytest.raises(ValueError, match="second set has 64 samples.*at least 65 samples"):
        frechet_distance(enough, few)
    with pytest.raises(DataError, match="first set has 64 samples"):
        frechet_distance(few, enough)


def test_shapes_and_values_that_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(70, 4\) and \(70, 5\)"):
        frechet_distance(torch.randn(70, 4), torch.randn(70, 5))
    broken = torch.randn(70, 4)
    broken[3, 1] = float("nan")
    with pytest.raises(DataError, match="first set of features contains NaN"):
        frechet_distance(broken, torch.randn(70, 4))


def test_features_have_the_promised_shape_and_do_not_depend_on_batching(features: RandomFeatures) -> None:
    images = _scenes(10, 5)
    whole = features(images)
    assert whole.shape == (10, 64) and whole.dtype == torch.float64 and not whole.requires_grad
    parts = RandomFeatures(batch_size=3)(images)
    torch.testing.assert_close(whole, parts, rtol=0.0, atol=1e-12)
    assert torch.equal(features(images.double()), features(images.double()))


def test_weights_follow_the_seed_and_leave_the_global_generator_alone(features: RandomFeatures) -> None:
    images = _scenes(4, 6)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = RandomFeatures()
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(again(images), features(images))
    assert not torch.allclose(RandomFeatures(seed=1)(images), features(images), atol=1e-3)


def test_features_of_a_fixed_image_stay_what_they_were(features: RandomFeatures) -> None:
    """Committed distances are comparable only while the feature space is the same on every machine."""
    ramp = torch.arange(64.0).div(63).expand(64, 64)
    image = torch.stack([ramp, ramp.T, 0.5 * (ramp + ramp.T)])[None]
    expected = torch.tensor(PINNED, dtype=torch.float64)
    torch.testing.assert_close(features(image)[0, :4], expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "levels"),
    [(_blur, (0.7, 1.5, 3.0)), (_noise, (0.03, 0.08, 0.2)), (_redder, (0.03, 0.08, 0.2))],
)
def test_distance_grows_with_damage(
    features: RandomFeatures,
    scenes: Tensor,
    reference: Tensor,
    floor: float,
    damage: Callable[[Tensor, float], Tensor],
    levels: tuple[float, ...],
) -> None:
    distances = [frechet_distance(reference, features(damage(scenes, level))) for level in levels]
    assert 1e-9 < distances[0] < distances[1] < distances[2]
    assert distances[2] > 2 * floor


def test_distance_sees_layout(features: RandomFeatures, scenes: Tensor, reference: Tensor, floor: float) -> None:
    mirrored = torch.cat([scenes[..., :32], scenes[..., :32].flip(-1)], dim=-1)
    assert frechet_distance(reference, features(mirrored)) > 4 * floor


def test_distance_tells_discs_from_squares(features: RandomFeatures) -> None:
    discs = features(_scenes(200, 3, discs=True))
    more_discs, squares = features(_scenes(200, 4, discs=True)), features(_scenes(200, 5, discs=False))
    assert frechet_distance(discs, squares) > 1.3 * frechet_distance(discs, more_discs)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 32, 32), r"shape \(2, 3, 32, 32\), expected \(N, 3, 64, 64\)"),
        (torch.rand(0, 3, 64, 64), "shape"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "divide by 255"),
        (torch.full((2, 3, 64, 64), float("nan")), "NaN"),
        (torch.full((2, 3, 64, 64), 1.5), "rescale or clamp"),
    ],
)
def test_images_that_are_refused(features: RandomFeatures, images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        features(images)


@pytest.mark.parametrize("dim", [0, 1121])
def test_dimensions_that_are_refused(dim: int) -> None:
    with pytest.raises(DataError, match="1 <= dim <= 1120"):
        RandomFeatures(dim=dim)
