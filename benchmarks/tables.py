"""Tables of every operation against the formula it replaces: `make bench`, or

    python -m benchmarks.tables [--shape 24,16,64,64] [--device cpu] [--out FOLDER]

Prints time, ratio, bandwidth and memory; with --out also writes operations.csv, operations.json and bandwidth.png.
Exits 1 when an operation's check fails, or with --require when a figure is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.registry import DTYPES, WORKLOADS

# On 2 cores at 24 x 16 x 64 x 64: how many times faster than the eager formula, and how many latent tensors of memory.
REQUIRED_RATIO = {
    ("noise", "fp32"): 4.0,
    ("noise", "bf16"): 6.0,
    ("residual_stats", "fp32"): 10.0,
    ("residual_stats", "bf16"): 10.0,
    ("loss forward+backward", "fp32"): 6.0,
    ("loss forward+backward", "bf16"): 10.0,
    ("generator forward+backward", "fp32"): 3.0,
    ("generator forward+backward", "bf16"): 6.0,
}
REQUIRED_MEMORY = 1.1


def rows_of(
    name: str, dtype: str, shape: tuple[int, ...], device: torch.device, bandwidth: float, compile_eager: bool
) -> list[dict[str, Any]]:
    """A row for every side. Raises AssertionError when the check fails: then there is nothing to report."""
    work = WORKLOADS[name](shape, DTYPES[dtype], device)
    work.check()
    runs = {"eager": work.eager, "crd_fast": work.ours}
    if compile_eager:
        runs["torch.compile"] = work.compiled()
    times = measure.side_by_side(runs, device)
    latent = math.prod(shape) * torch.empty((), dtype=DTYPES[dtype]).element_size()
    rows = []
    cached = measure.fits_cache(work.bytes, device)
    for side, run in runs.items():
        median = statistics.median(times[side])
        on_device = measure.device_work(run, device)
        rows.append(
            {
                "operation": name,
                "dtype": dtype,
                "shape": "x".join(map(str, shape)),
                "side": side,
                "milliseconds": 1e3 * median,
                "speedup_over_eager": measure.ratio(times, "eager", side),
                "gigabytes_per_second": None if cached else work.bytes / median / 1e9,
                "share_of_copy": None if cached else work.bytes / median / bandwidth,
                "gigaflops": work.flops / median / 1e9,
                "peak_latents": measure.peak_bytes(run, device, work.forget) / latent,
                "launches": None if on_device is None else on_device.launches,
                "device_milliseconds": None if on_device is None else 1e3 * on_device.seconds,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    print(
        f"{'operation':30} {'dtype':5} {'side':14} {'ms':>9} {'x eager':>8} {'GB/s':>7} {'of copy':>8} {'memory':>7} "
        f"{'launches':>8} {'ms on GPU':>9}"
    )
    for row in rows:
        print(
            f"{row['operation']:30} {row['dtype']:5} {row['side']:14} {row['milliseconds']:9.3f} "
            f"{row['speedup_over_eager']:8.2f} {shown(row['gigabytes_per_second'], '.1f'):>7} "
            f"{shown(row['share_of_copy'], '.0%'):>8} {row['peak_latents']:7.2f} {shown(row['launches'], 'd'):>8} "
            f"{shown(row['device_milliseconds'], '.3f'):>9}"
        )


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What falls short of the figures above."""
    short = []
    for row in rows:
        if row["side"] != "crd_fast":
            continue
        wanted = REQUIRED_RATIO.get((row["operation"], row["dtype"]))
        if wanted is not None and row["speedup_over_eager"] < wanted:
            share = row["share_of_copy"]
            short.append(
                f"{row['operation']} {row['dtype']}: {row['speedup_over_eager']:.2f}x eager, wanted {wanted:g}x"
                + ("" if share is None else f"; it runs at {share:.0%} of copy bandwidth")
            )
        if row["operation"].startswith("loss") and row["peak_latents"] > REQUIRED_MEMORY:
            short.append(
                f"{row['operation']} {row['dtype']}: {row['peak_latents']:.2f} latents of memory, "
                f"wanted {REQUIRED_MEMORY:g}"
            )
    return short


def environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        import triton

        facts |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    return facts


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save(folder: Path, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "operations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "operations.json").write_text(json.dumps({"environment": facts, "rows": list(rows)}, indent=1) + "\n")
    _plot(folder / "bandwidth.png", rows, facts)


def _plot(path: Path, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["share_of_copy"] is not None]
    if not rows:  # all of it lies in the cache
        return
    sides = list(dict.fromkeys(row["side"] for row in rows))
    groups = list(dict.fromkeys((row["operation"], row["dtype"]) for row in rows))
    figure, axes = plt.subplots(figsize=(10, 0.6 * len(groups) + 1.5), layout="constrained")
    height = 0.8 / len(sides)
    for number, side in enumerate(sides):
        shares = [
            next(r["share_of_copy"] for r in rows if (r["operation"], r["dtype"], r["side"]) == (*group, side))
            for group in groups
        ]
        places = [index + (number - (len(sides) - 1) / 2) * height for index in range(len(groups))]
        axes.barh(places, shares, height, label=side)
    axes.axvline(1.0, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(groups)), [f"{operation}, {dtype}" for operation, dtype in groups])
    axes.invert_yaxis()
    axes.set_xlabel("least bytes moved per second, as a share of copy bandwidth (1 = speed of light)")
    axes.set_title(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(
    shape: tuple[int, ...], device: torch.device, compile_eager: bool, names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and the operations whose check failed, or that failed themselves."""
    if compile_eager:
        torch._dynamo.reset()  # or the first shape's code would be followed by code for any shape
    bandwidth = measure.copy_bandwidth(max(math.prod(shape), 1 << 24), device)
    print(f"copy {bandwidth / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for name in names:
        for dtype in DTYPES:
            try:
                rows += rows_of(name, dtype, shape, device, bandwidth, compile_eager)
            except AssertionError as error:
                refused.append(f"{name} {dtype}: {error}")
            except Exception as error:  # such as too little memory: the others are measured all the same
                traceback.print_exc()
                refused.append(f"{name} {dtype}: {type(error).__name__}: {error}")
    return rows, refused


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected a batch and latent sizes as in 24,16,64,64, got {text!r}")
    return shape


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_shape, default="24,16,64,64", help="batch and latent, comma separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for CSV, JSON and the plot")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--require", action="store_true", help="exit 1 when a figure is missed")
    parser.add_argument("--only", choices=list(WORKLOADS), action="append", help="this operation; may be repeated")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    rows, refused = run(given.shape, device, not given.no_compile, given.only or list(WORKLOADS))
    show(rows)
    for line in refused:
        print(f"refused, its check failed: {line}", file=sys.stderr)
    if given.out and rows:
        save(given.out, rows, environment(device))
    short = missed(rows) if given.require else []
    for line in short:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if refused or short else 0


if __name__ == "__main__":
    raise SystemExit(main())
