"""Time, memory and launches of a call. Times are compared within a round, so that a machine's moods cancel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device, least: float = 0.02) -> float:
    """Mean seconds of one call, over as many calls as take `least` seconds."""
    calls = 0
    _synchronize(device)
    started = time.perf_counter()
    while True:
        run()
        calls += 1
        if device.type == "cuda" and calls % 16:
            continue
        _synchronize(device)
        elapsed = time.perf_counter() - started
        if elapsed >= least:
            return elapsed / calls


def side_by_side(runs: Mapping[str, Run], device: torch.device, rounds: int = 15) -> dict[str, list[float]]:
    """Seconds of each side in every round; the sides take turns."""
    for run in runs.values():  # compilers, caches, lazy libraries
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def peak_bytes(run: Run, device: torch.device, forget: Run = lambda: None) -> int:
    """Most memory that a call holds at any moment beyond what was there before it.

    forget: drops what an earlier call left behind; its release inside the measured call would count as room.
    """
    run()
    forget()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class DeviceWork:
    """What a GPU does in one call: launches of kernels, copies and fills, and the seconds that they take together."""

    launches: int
    seconds: float


def device_work(run: Run, device: torch.device) -> DeviceWork | None:
    """None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return DeviceWork(len(events), 1e-6 * sum(event.time_range.elapsed_us() for event in events))


def fits_cache(size: int, device: torch.device) -> bool:
    """Whether so many bytes may still lie in a GPU's cache at the next call, which makes them no matter of memory."""
    return device.type == "cuda" and size < 4 * torch.cuda.get_device_properties(device).L2_cache_size


def copy_bandwidth(elements: int, device: torch.device) -> float:
    """Bytes per second of `copy_` between two fp32 tensors, read and written bytes together."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    times = side_by_side({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / statistics.median(times)
