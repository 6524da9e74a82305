"""References and rewards whose noised densities, scores and optima are known in closed form, in float64.

Nothing here calls the package's DIDR. alpha and sigma broadcast against x; every latent element is one more independent
sample of a one-dimensional problem, so a row of many elements is a quadrature over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """p_ref = N(mean, variance)."""

    mean: float = 0.0
    variance: float = 1.0

    def noised(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return alpha * self.mean, alpha**2 * self.variance + sigma**2

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean, variance = self.noised(alpha, sigma)
        return -(x - mean) / variance

    def gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """K: slope of the denoiser."""
        return alpha * self.variance / (alpha**2 * self.variance + sigma**2)

    def left(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """V: variance of x0 given x_t."""
        return self.variance * sigma**2 / (alpha**2 * self.variance + sigma**2)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.mean + self.gain(alpha, sigma) * (x - alpha * self.mean)

    def tilted_linear(self, slope: float) -> Gaussian:
        """The optimum for r / beta = slope x."""
        return Gaussian(self.mean + self.variance * slope, self.variance)

    def tilted_quadratic(self, kappa: float, y: float) -> Gaussian:
        """The optimum for r / beta = -kappa/2 (x - y)^2."""
        variance = self.variance / (1 + kappa * self.variance)
        return Gaussian(variance * (self.mean / self.variance + kappa * y), variance)

    def quadratic_drs(self, x: Tensor, alpha: Tensor, sigma: Tensor, kappa: float, y: float) -> Tensor:
        scale = 1 + kappa * self.left(alpha, sigma)
        return -kappa * self.gain(alpha, sigma) * (self.denoise(x, alpha, sigma) - y) / scale


@dataclass(frozen=True)
class Mixture:
    """A one-dimensional Gaussian mixture."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        parts = []
        for weight, mean, variance in zip(self.weights, self.means, self.variances, strict=True):
            spread = alpha**2 * variance + sigma**2
            parts.append(
                math.log(weight / sum(self.weights))
                - (x - alpha * mean) ** 2 / (2 * spread)
                - 0.5 * torch.log(2 * math.pi * spread)
            )
        return torch.logsumexp(torch.stack(parts), 0)

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_density(leaf, alpha, sigma).sum(), leaf)
        return slope

    def tilted_linear(self, slope: float) -> Mixture:
        """The optimum for r / beta = slope x."""
        parts = list(zip(self.weights, self.means, self.variances, strict=True))
        return Mixture(
            tuple(w * math.exp(slope * m + slope**2 * c / 2) for w, m, c in parts),
            tuple(m + c * slope for _, m, c in parts),
            self.variances,
        )


def normal_grid(side: int) -> tuple[Tensor, Tensor]:
    """Two (side^2,) quadratures of independent standard normals, with exact first, second and mixed moments."""
    u = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    nodes = torch.special.ndtri(u)
    nodes = nodes / nodes.square().mean().sqrt()
    first, second = torch.meshgrid(nodes, nodes, indexing="ij")
    return first.reshape(-1), second.reshape(-1)


def sdxl_alphas_cumprod() -> Tensor:
    """SDXL's "scaled_linear" betas, 0.00085 to 0.012 over 1000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def column(values: Tensor) -> Tensor:
    return values[:, None]
