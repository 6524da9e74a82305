"""Everything worth knowing of a GPU in one go:

    python -m benchmarks.gpu_suite --out benchmarks/results/<name>
    python -m benchmarks.gpu_suite --out FOLDER --parts checks tables   # some of it, where time is short
    python -m benchmarks.gpu_suite --out FOLDER --dry-run               # the same code path on the CPU, tiny

`checks`: every kernel against fp64 formulas; this compiles some three hundred kernels first. `sanitizer`:
compute-sanitizer over the checks at small shapes, where the tool is at hand. `tables`: those of `benchmarks.tables` at
SD3.5-M size, for one large sample and at 1 GB of inputs. `step`: `benchmarks.step` on SD3.5-M, which needs the training
extra. Writes one folder with JSON, CSV and a plot for each size, the step's table, and `suite.json` after every part: a
part that fails is named there and does not take the others with it. Exits 1 where a part failed, a kernel is wrong, the
sanitizer found something or an operation was refused.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.kernel_checks import check_kernels
from benchmarks.registry import WORKLOADS
from crd_fast.whole_files import write_json

SIZES = {"sd35m": (24, 16, 64, 64), "one_sample": (1, 16, 128, 128), "gigabyte": (128, 16, 256, 256)}
DRY_SIZES = {"tiny": (4, 4, 8, 8)}
STEP_ROWS = ["public order", "crd-fast", "compiled", "kl_fraction .25, compiled, fp8"]
PARTS = ("checks", "sanitizer", "tables", "step")
CHECKED_SHAPES = [(1, 1), (2, 63), (7, 1000), (1, 2**20 + 3), (3, 16, 32, 32), (2, 9, 6), (2, 3, 4, 2, 5)]


def sanitize() -> dict[str, Any]:
    """compute-sanitizer over the kernel checks at small shapes, in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ran": False, "reason": "compute-sanitizer is not on PATH"}
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_suite", "--checks-only"]
    # with PyTorch's own pool of memory, what is written past a tensor lies in the pool and is not found
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=environment)
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": "not done within 180 s"}
    told = (result.stdout.strip() or result.stderr.strip()).splitlines()[-1:]
    if result.returncode not in (0, 9):
        return {"ran": False, "reason": f"exit code {result.returncode}", "summary": told}
    return {"ran": True, "errors": result.returncode == 9, "summary": told}


def measure_step(folder: Path, dry_run: bool, device: torch.device) -> None:
    """An epoch's updates, `benchmarks.step`, at SD3.5-M size; tiny in a dry run."""
    from benchmarks import step  # it needs diffusers and peft, which nothing else here does

    if dry_run:
        step.write(folder, "shapes", step.Sizes(24, 12, 12), STEP_ROWS[:2], device, torch.float32, rounds=1)
    else:
        step.write(folder, "sd35m", step.SIZES["sd35m"], STEP_ROWS, device, torch.bfloat16, rounds=3)


class Suite:
    """The parts on one device, and what is known so far."""

    def __init__(self, out: Path, device: torch.device, dry_run: bool) -> None:
        self.out, self.device, self.dry_run = out, device, dry_run
        self.started = time.perf_counter()
        self.facts: dict[str, Any] = tables.environment(device) | {"kernels_wrong": [], "sanitizer": None}
        self.facts |= {"refused": [], "failed": {}, "seconds": {}}

    def run(self, parts: Sequence[str]) -> int:
        """Exit code."""
        todo: dict[str, Callable[[], None]] = {
            "checks": self._check,
            "sanitizer": self._sanitize,
            "tables": self._measure,
            "step": lambda: measure_step(self.out / "step", self.dry_run, self.device),
        }
        facts = self.facts
        for part in parts:
            began = time.perf_counter()
            try:
                todo[part]()
            except Exception as error:
                traceback.print_exc()
                facts["failed"][part] = f"{type(error).__name__}: {error}"
            facts["seconds"][part] = time.perf_counter() - began
            self._write()
        print(f"{self.out / 'suite.json'} after {time.perf_counter() - self.started:.0f} s")
        unclean = facts["sanitizer"] is not None and facts["sanitizer"].get("errors")
        return 1 if facts["kernels_wrong"] or unclean or facts["refused"] or facts["failed"] else 0

    def _check(self) -> None:
        began = time.perf_counter()
        wrong = check_kernels(self.device, CHECKED_SHAPES[:3] if self.dry_run else CHECKED_SHAPES)
        for line in wrong:
            print(f"wrong: {line}", file=sys.stderr)
        print(f"kernel checks: {len(wrong)} wrong, {time.perf_counter() - began:.0f} s")
        self.facts["kernels_wrong"] = wrong

    def _sanitize(self) -> None:
        self.facts["sanitizer"] = {"ran": False, "reason": "a dry run"} if self.dry_run else sanitize()

    def _measure(self) -> None:
        for name, shape in (DRY_SIZES if self.dry_run else SIZES).items():
            rows, failed = tables.run(shape, self.device, not self.dry_run, list(WORKLOADS))
            tables.show(rows)
            self.facts["refused"] += [f"{name}: {line}" for line in failed]
            for line in failed:
                print(f"refused: {name}: {line}", file=sys.stderr)
            if rows:
                tables.save(self.out / name, rows, self.facts)

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "suite.json", self.facts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="some of it")
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
    return Suite(given.out, device, given.dry_run).run(given.parts)


if __name__ == "__main__":
    raise SystemExit(main())
