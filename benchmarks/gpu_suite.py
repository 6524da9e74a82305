"""Everything worth knowing of a GPU in one go, within 8 minutes:

    python -m benchmarks.gpu_suite --out benchmarks/results/<name>
    python -m benchmarks.gpu_suite --out FOLDER --dry-run        # the same code path on the CPU, tiny

First every kernel against fp64 formulas, then compute-sanitizer over them where the tool is at hand, then the tables of
`benchmarks.tables` at SD3.5-M size and at 1 GB of inputs, then `benchmarks.step` on SD3.5-M. Writes one folder with
JSON, CSV and a plot for each size, and the step's table.
"""

from __future__ import annotations

import argparse
import itertools
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
from benchmarks.registry import WORKLOADS
from crd_fast import ops, reference
from crd_fast.reference import ResidualInputs

SIZES = {"sd35m": (24, 16, 64, 64), "one_sample": (1, 16, 128, 128), "gigabyte": (128, 16, 256, 256)}
DRY_SIZES = {"tiny": (4, 4, 8, 8)}
STEP = ("sd35m", step.SIZES["sd35m"], ["public order", "crd-fast", "compiled", "kl_fraction .25, compiled, fp8"])
DRY_STEP = ("shapes", step.Sizes(24, 12, 12), ["public order", "crd-fast"])
CHECKED_SHAPES = [(1, 1), (2, 63), (7, 1000), (1, 2**20 + 3), (3, 16, 32, 32), (2, 9, 6), (2, 3, 4, 2, 5)]


def residual_cases(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[tuple[str, ResidualInputs]]:
    """Every combination of dtype, target, anchor and mask, at every shape."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for shape, dtype, prediction, masked in itertools.product(shapes, dtypes, (None, "v", "x0", "eps"), (False, True)):

        def tensor(shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        seeded = prediction is not None
        mask = torch.rand(shape, generator=generator) < 0.6 if masked else None
        inputs = ResidualInputs(
            predicted=tensor(),
            target=None if seeded else tensor(),
            x0=tensor() if seeded else None,
            sigma=torch.rand(shape[0], generator=generator).to(device) if seeded else None,
            sample_ids=torch.arange(shape[0], device=device) + 2**40 if seeded else None,
            seed=-12345,
            stream=7,
            ref=tensor(),
            ref_uncond=tensor(),
            guidance_scale=4.5,
            mask=None if mask is None else mask.to(device),
            prediction=prediction or "v",
            old=tensor() if masked == seeded else None,
        )
        cases.append((f"{shape} {dtype} {prediction or 'tensor'}{' masked' if masked else ''}", inputs))
    return cases


def check_kernels(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """What differs from the fp64 formulas by more than fp32 arithmetic explains, or is not the same twice."""
    wrong = []

    def require(close: bool, message: str) -> None:
        if not close:
            wrong.append(message)

    for shape in shapes:
        ids = torch.arange(shape[0], device=device) - 1
        truth = reference.epsilon(ids.cpu(), shape, -3, 2**31 - 1, torch.float32)
        drawn = ops.epsilon(ids, shape, -3, 2**31 - 1, torch.float32).cpu()
        ulp = torch.nextafter(truth.abs(), torch.tensor(torch.inf)) - truth.abs()
        require(bool(((drawn - truth).abs() <= 4 * ulp).all()), f"normals {shape}: more than 4 ulp off")
    for name, inputs in residual_cases(device, shapes):
        weights = torch.rand(2, len(inputs.predicted), device=device)
        doubled = inputs._replace(predicted=inputs.predicted.double())
        statistics, again = ops.residual_stats(*inputs), ops.residual_stats(*inputs)
        labels = ("E", "M", "K", "old E", "old M")
        formulas = reference.residual_stats(doubled)
        for label, value, twice, truth in zip(labels, statistics, again, formulas, strict=True):
            require(torch.allclose(value.double(), truth, rtol=2e-5, atol=1e-7), f"{label} {name}")
            require(torch.equal(value, twice), f"{label} {name}: not the same twice")
        gradient = ops.residual_grad(*inputs, *weights, None)
        truth = reference.residual_grad(doubled, *weights.double())
        eps = torch.finfo(gradient.dtype).eps
        bound = eps * truth.abs() + 1e-5 * truth.abs().flatten(1).amax(1).view(-1, *(1,) * (truth.ndim - 1))
        tiny = torch.finfo(gradient.dtype).smallest_normal
        require(bool(((gradient.double() - truth).abs() <= bound + tiny).all()), f"gradient {name}")
    return wrong


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
