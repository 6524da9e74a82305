"""How many images a second the OCR reward reads, by number of workers:

    python -m benchmarks.ocr --out benchmarks/results/ocr_cpu

The images are words in three fonts on gradients with noise, 512 pixels wide. Finding the lines takes nearly all of the
time, and grows with the side of the image in which they are looked for (`detection_side`). Threads read in this
process, as `crd-fast score` does; processes beside it, as a training run does, and their start is left out. Medians of
several rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.tables import environment
from crd_fast.rewards.base import score_batch
from crd_fast.rewards.ocr import OcrReward, OcrSettings, RapidOcrReader
from crd_fast.rewards.scorer import RewardChoice, Scorer
from tests.rewards.written_words import pictures


def rate(read: Callable[[], object], count: int, rounds: int) -> float:
    """Images a second, the median of the rounds after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - began)
    return count / statistics.median(seconds[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 384], help="detection_side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="path without suffix: .json is written")
    given = parser.parse_args(arguments)
    images, prompts = pictures(hard=True)
    metadata = [{}] * len(prompts)
    rows = []
    for workers, side in itertools.product(given.workers, given.sides):
        settings = OcrSettings(workers=workers, detection_side=side)
        reward = OcrReward(RapidOcrReader(settings))
        threads = rate(lambda reward=reward: score_batch(reward, images, prompts, metadata), len(images), given.rounds)
        exact = score_batch(reward, images, prompts, metadata)["ocr_exact"].sum().item()
        with Scorer({"ocr": RewardChoice(settings)}) as scorer:

            def read(scorer: Scorer = scorer) -> None:
                scorer.submit(images, prompts, metadata)
                scorer.collect()

            processes = rate(read, len(images), given.rounds)
        rows.append(
            {"workers": workers, "detection_side": side, "threads": threads, "processes": processes, "exact": exact}
        )
        print(
            f"{workers} workers, detection_side {side}: threads {threads:.1f}, processes {processes:.1f} images a "
            f"second, {exact:.0f} of {len(images)} exact",
            flush=True,
        )
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": environment(torch.device("cpu")), "images_per_second": rows}
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
