"""Fréchet distance between two sets of small images, in a fixed random feature space.

The metric is the Fréchet inception distance's (Heusel et al. 2017, arXiv 1706.08500, eq. 6), with a seeded
random convolutional network in the place of Inception: nothing is downloaded, a few hundred 64×64 images are
enough, and no reward can have been trained on the features. The numbers compare runs on the same images; they
are not FID values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crd_fast.errors import DataError

IMAGE_SIZE = 64
_CHANNELS = (3, 16, 32, 64)
_KERNELS = (5, 3, 3)
_LEAK = 0.2
_BRIGHTNESS_FILTERS = 4  # first-layer filters that see flat colour; the others sum to zero and see edges and noise only


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) float64 matrix with orthonormal rows, or columns where there are more rows."""
    draw = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float32)
    q, r = torch.linalg.qr(draw.double())
    # A QR is unique up to the signs of R's diagonal, which LAPACK builds choose differently.
    q = q * torch.sign(torch.diagonal(r))
    return q if rows >= columns else q.T


class RandomFeatures:
    """A fixed feature space for small RGB images: a random convolutional network with a spatial pyramid.

    Three layers of orthogonal filters with leaky rectifiers. Each layer contributes, per channel, the mean
    and the spread of its response in each quarter of the image and averaged over the quarters: means carry
    colours and layout, spreads carry edges, blur and noise, which means hardly see. A fixed orthonormal
    projection takes them to `dim`. Weights depend on `seed` only and live on the CPU; arithmetic is float64,
    so how a set is batched does not matter.

    Args:
        dim: features per image, 1 to 1120. A Fréchet distance needs more than `dim` images a side.
        seed: seed of the weights. Distances under different seeds are not comparable.
        batch_size: images per forward pass.
    """

    def __init__(self, dim: int = 64, seed: int = 20260314, batch_size: int = 64) -> None:
        pyramid = 2 * 5 * sum(_CHANNELS[1:])
        if not 1 <= dim <= pyramid:
            raise DataError(f"dim is {dim}, but the pyramid has {pyramid} features: use 1 <= dim <= {pyramid}")
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}: use at least 1")
        self.dim = dim
        self.seed = seed
        self.batch_size = batch_size
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        for inputs, outputs, kernel in zip(_CHANNELS, _CHANNELS[1:], _KERNELS, strict=False):
            fan_in = inputs * kernel * kernel
            weight = _orthonormal(outputs, fan_in, generator) * (2.0 * fan_in / outputs) ** 0.5 / kernel
            self._weights.append(weight.reshape(outputs, inputs, kernel, kernel))
            self._biases.append(0.2 * torch.randn(outputs, generator=generator, dtype=torch.float32).double())
        edges = self._weights[0][_BRIGHTNESS_FILTERS:]
        edges -= edges.mean(dim=(1, 2, 3), keepdim=True)
        self._projection = _orthonormal(pyramid, dim, generator)  # (pyramid, dim)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of a set of images.

        Args:
            images: (N, 3, 64, 64), any floating dtype and device, values in [0, 1].

        Returns:
            (N, dim) float64 on the CPU.

        Raises:
            DataError: wrong shape or dtype, no image, or values that are not finite or not in [0, 1].
        """
        expected = (3, IMAGE_SIZE, IMAGE_SIZE)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected or images.shape[0] == 0:
            raise DataError(f"images have shape {tuple(images.shape)}, expected (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE})")
        if not images.is_floating_point():
            raise DataError(f"images have dtype {images.dtype}, expected floating point in [0, 1]: divide by 255")
        features = []
        for start in range(0, images.shape[0], self.batch_size):
            batch = images[start : start + self.batch_size].detach().to(device="cpu", dtype=torch.float64)
            if not torch.isfinite(batch).all():
                raise DataError(f"images {start} to {start + len(batch) - 1} contain NaN or infinity")
            low, high = float(batch.min()), float(batch.max())
            if low < 0.0 or high > 1.0:
                raise DataError(f"images span [{low:.4g}, {high:.4g}], expected [0, 1]: rescale or clamp them")
            features.append(self._forward(batch))
        return torch.cat(features)

    def _forward(self, batch: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [0, 1] -> (B, dim)."""
        levels = []
        x = 2.0 * batch - 1.0
        for weight, bias in zip(self._weights, self._biases, strict=True):
            padding = weight.shape[-1] // 2
            x = F.pad(x, (padding,) * 4, mode="replicate")  # zeros would draw a frame around every image
            x = F.leaky_relu(F.conv2d(x, weight, bias, stride=2), _LEAK)
            mean = F.adaptive_avg_pool2d(x, 2)  # (B, C, 2, 2)
            variance = (F.adaptive_avg_pool2d(x.square(), 2) - mean.square()).clamp_min(0.0)
            levels += [_pyramid(mean), _pyramid(variance).sqrt()]
        return torch.cat(levels, dim=1) @ self._projection


def _pyramid(quarters: Tensor) -> Tensor:
    """(B, C, 2, 2) -> (B, 5C): the average over the quarters, then each of them."""
    return torch.cat([quarters.mean(dim=(2, 3)), quarters.flatten(1)], dim=1)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (covariance over N - 1).

    Args:
        features_a: (N_a, d), N_a > d.
        features_b: (N_b, d), N_b > d.

    Raises:
        DataError: shapes that do not match, values that are not finite, or a set of d samples or fewer, whose
            covariance is singular.
    """
    if features_a.dim() != 2 or features_b.dim() != 2 or features_a.shape[1] != features_b.shape[1]:
        raise DataError(
            f"features have shapes {tuple(features_a.shape)} and {tuple(features_b.shape)}, "
            "expected (N_a, d) and (N_b, d) with one d"
        )
    dim = features_a.shape[1]
    moments = []
    for side, features in (("first", features_a), ("second", features_b)):
        count = features.shape[0]
        if count <= dim:
            raise DataError(
                f"the {side} set has {count} samples of {dim} features: a Fréchet distance needs at least "
                f"{dim + 1} samples a side; add images or use RandomFeatures with a smaller dim"
            )
        x = features.detach().to(device="cpu", dtype=torch.float64)
        if not torch.isfinite(x).all():
            raise DataError(f"the {side} set of features contains NaN or infinity")
        mean = x.mean(dim=0)
        centred = x - mean
        moments.append((mean, centred.T @ centred / (count - 1)))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    return gaussian_frechet(mean_a, cov_a, mean_b, cov_b)


def gaussian_frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """||m_a - m_b||² + tr(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2}), float64 (Dowson and Landau 1982).

    The product is symmetrised before its root: S_a S_b is not symmetric and its root by a general solver
    picks up imaginary parts when the covariances are close to singular.

    Args:
        mean_a, mean_b: (d,) means.
        cov_a, cov_b: (d, d) symmetric positive semi-definite covariances.
    """
    mean_a, cov_a, mean_b, cov_b = (t.to(device="cpu", dtype=torch.float64) for t in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    product = root_a @ cov_b @ root_a
    eigenvalues = torch.linalg.eigvalsh(0.5 * (product + product.T))
    root_trace = eigenvalues.clamp_min(0.0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * root_trace
    return max(float(distance), 0.0)  # rounding can leave -1e-14 between equal Gaussians
