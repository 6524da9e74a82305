"""Everything worth knowing of a GPU in one go, within 8 minutes:

    python -m benchmarks.gpu_suite --out benchmarks/results/<name>
    python -m benchmarks.gpu_suite --out FOLDER --dry-run        # the same code path on the CPU, tiny

First every kernel against fp64 formulas, then compute-sanitizer over them where the tool is at hand, then the tables of
`benchmarks.tables` at SD3.5-M size and at 1 GB of inputs, then `benchmarks.step` on SD3.5-M. Writes one folder with
JSON, CSV and a plot for each size, and the step's table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import step, tables
from benchmarks.kernel_checks import check_kernels
from benchmarks.registry import WORKLOADS

SIZES = {"sd35m": (24, 16, 64, 64), "one_sample": (1, 16, 128, 128), "gigabyte": (128, 16, 256, 256)}
DRY_SIZES = {"tiny": (4, 4, 8, 8)}
STEP = ("sd35m", step.SIZES["sd35m"], ["public order", "crd-fast", "compiled", "kl_fraction .25, compiled, fp8"])
DRY_STEP = ("shapes", step.Sizes(24, 12, 12), ["public order", "crd-fast"])
CHECKED_SHAPES = [(1, 1), (2, 63), (7, 1000), (1, 2**20 + 3), (3, 16, 32, 32), (2, 9, 6), (2, 3, 4, 2, 5)]


def sanitize() -> dict[str, Any]:
    """compute-sanitizer over the kernel checks at small shapes, in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ran": False, "reason": "compute-sanitizer is not on PATH"}
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_suite", "--checks-only"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": "not done within 180 s"}
    return {"ran": True, "errors": result.returncode == 9, "summary": result.stdout.strip().splitlines()[-1:]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, at tiny sizes")
    parser.add_argument("--checks-only", action="store_true", help="the kernel checks at small shapes, nothing else")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; use --dry-run to try the suite on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.dry_run else "cuda")
    if given.checks_only:
        wrong = check_kernels(device, CHECKED_SHAPES[:3])
        print("\n".join(wrong) or "all kernels agree")
        return 1 if wrong else 0
    if given.out is None:
        parser.error("--out is needed, the folder for the results")
    started = time.perf_counter()
    shapes = CHECKED_SHAPES[:3] if given.dry_run else CHECKED_SHAPES
    wrong = check_kernels(device, shapes)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    print(f"kernel checks: {len(wrong)} wrong, {time.perf_counter() - started:.0f} s")
    facts = tables.environment(device) | {"kernels_wrong": wrong, "sanitizer": None if given.dry_run else sanitize()}
    refused: list[str] = []
    for name, shape in (DRY_SIZES if given.dry_run else SIZES).items():
        rows, failed = tables.run(shape, device, not given.dry_run, list(WORKLOADS))
        tables.show(rows)
        refused += failed
        if rows:
            tables.save(given.out / name, rows, facts)
    step_model, step_sizes, step_rows = DRY_STEP if given.dry_run else STEP
    dtype = torch.float32 if given.dry_run else torch.bfloat16
    step.write(given.out / "step", step_model, step_sizes, step_rows, device, dtype, rounds=1 if given.dry_run else 3)
    facts |= {"refused": refused, "seconds": time.perf_counter() - started}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "suite.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{given.out / 'suite.json'} after {facts['seconds']:.0f} s")
    return 1 if wrong or refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
