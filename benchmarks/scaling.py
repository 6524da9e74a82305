"""Cost per element from small batches to 2^30 elements, in one long row and in many short ones:

    python -m benchmarks.scaling [--largest 30] [--device cpu]

Every operation is linear in batch and row length. The memory's own work is so within a cache, or beyond all of them,
but not from the one to the other; so a copy of one tensor stands beside each. Freed memory is kept for the next call:
clearing pages for a new block is the kernel's work, and takes longer than any of these operations. Exits 1 when an
operation takes more than twice as many copies at the largest size as at 2^24 elements.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

import crd_fast
from crd_fast.training.memory import keep_freed_memory

SMALLEST, COMPARED = 18, 24  # powers of two; at the second, fixed costs no longer count
ALLOWED = 2.0
ROW = 1 << 16  # of the many short rows


def operations(shape: tuple[int, int], device: torch.device) -> dict[str, Callable[[], object]]:
    """bf16, as large latents are: noising, statistics, and the loss with its gradient, the anchor included."""
    f, y, ref, other = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(4))
    sigma = torch.full((shape[0],), 0.5, device=device)
    advantages = torch.linspace(-1, 1, shape[0], device=device)
    old = crd_fast.residual_stats(y, f)
    f.requires_grad_()

    def loss() -> None:
        f.grad = None
        crd_fast.loss(f, y, old=old, advantages=advantages, ref=ref).loss.backward()

    return {
        "copy": lambda: other.copy_(ref),
        "noise": lambda: crd_fast.noise(y, sigma, seed=0),
        "residual_stats": lambda: crd_fast.residual_stats(y, ref),
        "loss": loss,
    }


def seconds(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    def once() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return min(once() for _ in range(rounds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=30, help="power of two, of elements in a tensor")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    if given.largest < COMPARED:
        parser.error(f"--largest: expected at least {COMPARED}, got {given.largest}")
    device = torch.device(given.device)
    keep_freed_memory()
    powers = (SMALLEST, COMPARED, given.largest)
    copies: dict[tuple[str, str, int], float] = {}
    print(f"{'elements':>8} {'rows':5} {'copy':>7}  nanoseconds an element; then how many copies a call takes")
    for power in powers:
        for layout, shape in (("one", (1, 1 << power)), ("many", ((1 << power) // ROW, ROW))):
            times = {name: seconds(run, device) for name, run in operations(shape, device).items()}
            copy = times.pop("copy")
            copies |= {(name, layout, power): duration / copy for name, duration in times.items()}
            shown = "  ".join(f"{name} {copies[name, layout, power]:6.2f}" for name in times)
            print(f"{f'2^{power}':>8} {layout:5} {copy / (1 << power) * 1e9:7.3f}  {shown}", flush=True)
    steep = [
        f"{name}, {layout} row(s): {count:.2f} copies at 2^{power}, "
        f"{copies[name, layout, COMPARED]:.2f} at 2^{COMPARED}"
        for (name, layout, power), count in copies.items()
        if power == given.largest and count > ALLOWED * copies[name, layout, COMPARED]
    ]
    for line in steep:
        print(f"not linear: {line}", file=sys.stderr)
    return 1 if steep else 0


if __name__ == "__main__":
    raise SystemExit(main())
