"""Fits the polynomials of the Box-Muller transform in philox.h and prints them as C++ constants.

Each polynomial is the minimax fit of its function's remainder, weighted so that the relative error of the
*whole* function is minimised, found by Lawson's iteratively reweighted least squares on Chebyshev points.
Coefficients are rounded to fp32 one at a time, lowest power first, and the rest refitted around the rounded
one. Needs mpmath and numpy.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import numpy as np

mp.mp.dps = 40
POINTS = 2000
LAWSON_STEPS = 400
LOG_DEGREE, SIN_DEGREE, COS_DEGREE = 7, 2, 3


def minimax(x: np.ndarray, y: np.ndarray, weight: np.ndarray, powers: list[int]) -> np.ndarray:
    """Coefficients c minimising max |weight * (sum_i c_i x^powers_i - y)|."""
    scale = np.abs(x).max()
    basis = np.stack([(x / scale) ** p for p in powers], axis=1)
    lawson = np.ones_like(x)
    best, best_error = np.zeros(len(powers)), np.inf
    for _ in range(LAWSON_STEPS):
        row = np.sqrt(lawson) * weight
        c = np.linalg.lstsq(basis * row[:, None], y * row, rcond=None)[0]
        error = np.abs(weight * (basis @ c - y))
        if error.max() < best_error:
            best, best_error = c, error.max()
        lawson = lawson * error
        lawson /= lawson.sum()
    return best / scale ** np.array(powers)


def fit(name: str, remainder: Callable, weight: Callable, low: float, high: float, degree: int) -> None:
    """Prints fp32 coefficients of degree `degree` on [low, high], with the relative error that is left."""
    nodes = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    x = (low + high) / 2 + (high - low) / 2 * nodes
    y = np.array([float(remainder(mp.mpf(v))) for v in x])
    w = np.array([float(weight(mp.mpf(v))) for v in x])
    rounded: list[np.float32] = []
    left = y.copy()
    for i in range(degree + 1):
        c = np.float32(minimax(x, left, w, list(range(i, degree + 1)))[0])
        rounded.append(c)
        left = left - np.float64(c) * x**i
    print(f"// {name}: relative error {np.abs(w * left).max():.2e}")
    for i, c in enumerate(rounded):
        print(f"constexpr float {name}{i} = {float(c).hex()}f;  // {float(c):.9g}")


def split(name: str, value: mp.mpf, high_bits: int) -> None:
    """Prints `value` as the sum of two fp32 numbers, the first with `high_bits` significant bits."""
    exponent = mp.floor(mp.log(abs(value), 2)) - (high_bits - 1)
    high = mp.nint(value / mp.mpf(2) ** exponent) * mp.mpf(2) ** exponent
    low = np.float32(float(value - high))
    print(f"constexpr float {name}High = {float(high).hex()}f;")
    print(f"constexpr float {name}Low = {float(low).hex()}f;")


def main() -> None:
    # -2 ln(1 + f) = -2 f + f^2 + f^3 P(f) for 1 + f in [sqrt(1/2), sqrt(2)).
    def log_remainder(f: mp.mpf) -> mp.mpf:
        return (-2 * mp.log1p(f) + 2 * f - f * f) / f**3

    def log_weight(f: mp.mpf) -> mp.mpf:
        return abs(f**3 / (2 * mp.log1p(f)))

    fit("kLog", log_remainder, log_weight, float(mp.sqrt(0.5)) - 1, float(mp.sqrt(2)) - 1, LOG_DEGREE)
    split("kMinusTwoLn2", -2 * mp.log(2), 24)

    # sin(2 pi t) = 2 pi t + t^3 S(t^2) and cos(2 pi t) = 1 + t^2 C(t^2) for |t| <= 1/8; s = t^2.
    def sin_remainder(s: mp.mpf) -> mp.mpf:
        t = mp.sqrt(s)
        return (mp.sin(2 * mp.pi * t) - 2 * mp.pi * t) / t**3

    def sin_weight(s: mp.mpf) -> mp.mpf:
        t = mp.sqrt(s)
        return t**3 / mp.sin(2 * mp.pi * t)

    def cos_remainder(s: mp.mpf) -> mp.mpf:
        return (mp.cos(2 * mp.pi * mp.sqrt(s)) - 1) / s

    def cos_weight(s: mp.mpf) -> mp.mpf:
        return s / mp.cos(2 * mp.pi * mp.sqrt(s))

    fit("kSin", sin_remainder, sin_weight, 0.0, 1 / 64, SIN_DEGREE)
    split("kTwoPi", 2 * mp.pi, 24)
    fit("kCos", cos_remainder, cos_weight, 0.0, 1 / 64, COS_DEGREE)


if __name__ == "__main__":
    main()
