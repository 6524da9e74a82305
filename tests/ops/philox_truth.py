"""Philox4x32-10 and Box-Muller written again, in numpy integers and fp64: the truth of the noise tests."""

from __future__ import annotations

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox_words(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds on counters (N, 4); returns words (N, 4), all uint64 holding 32-bit values."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    for r in range(10):
        k0 = np.uint64((key[0] + r * 0x9E3779B9) % 2**32)
        k1 = np.uint64((key[1] + r * 0xBB67AE85) % 2**32)
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def normals_of_words(words: np.ndarray) -> np.ndarray:
    """fp64 Box-Muller on words (N, 4) -> normals (N, 4); exact zeros where cosine or sine vanishes."""
    out = np.empty(words.shape, dtype=np.float64)
    for pair in (0, 2):
        uniform = ((words[:, pair] >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
        turn24 = (words[:, pair + 1] >> np.uint64(8)).astype(np.int64)
        turn = turn24 * 2.0**-24
        radius = np.sqrt(-2.0 * np.log(uniform))
        out[:, pair] = np.where(turn24 % 2**23 == 2**22, 0.0, radius * np.cos(2 * np.pi * turn))
        out[:, pair + 1] = np.where(turn24 % 2**23 == 0, 0.0, radius * np.sin(2 * np.pi * turn))
    return out


def words_of_sample(sample_id: int, dim: int, seed: int, stream: int) -> np.ndarray:
    """Words (ceil(dim / 4), 4) of one sample, by the counter layout of the noise definition."""
    blocks = (dim + 3) // 4
    counter = np.empty((blocks, 4), dtype=np.uint64)
    counter[:, 0] = np.arange(blocks, dtype=np.uint64) & LOW
    counter[:, 1] = stream % 2**32
    counter[:, 2] = sample_id % 2**32
    counter[:, 3] = sample_id % 2**64 >> 32
    return philox_words(counter, (seed % 2**32, seed % 2**64 >> 32))


def epsilon_truth(sample_ids: list[int], dim: int, seed: int, stream: int) -> np.ndarray:
    """fp64 normals (len(sample_ids), dim)."""
    rows = [normals_of_words(words_of_sample(i, dim, seed, stream)).reshape(-1)[:dim] for i in sample_ids]
    return np.stack(rows)


def ulps(value: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|value - truth| in units of the fp32 spacing at the truth; a zero truth demands a zero."""
    spacing = np.spacing(np.maximum(np.abs(truth), np.finfo(np.float32).tiny).astype(np.float32))
    return np.abs(value.astype(np.float64) - truth) / spacing.astype(np.float64)
