"""Every Triton kernel compiled for every GPU generation we build for, which needs no GPU: `make kernels`, or

    python -m benchmarks.compiled_kernels [--architecture 90]

Prints registers, shared memory, spills and the width of global loads and stores; exits 1 when a kernel spills.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
WARPS = 4
TENSOR, VELOCITY = 0, 1  # crd_fast/kernels/residual.py

_RESIDUAL = {"ANCHORED": True, "GUIDED": True, "MASKED": False, "HAS_OLD": False}
_WITH_OLD = {**_RESIDUAL, "HAS_OLD": True}
_WHOLE = {"SCALED": False, "COUNTED": False}
_GRAD = {**_WHOLE, "HAS_ERROR": True, "HAS_UPSTREAM": True, "UPSTREAM_PER_SAMPLE": False}
_OBJECTIVE = {
    **dict.fromkeys(("beta", "kl_coef", "clip", "inverse_temperature"), "fp32"),
    **dict.fromkeys(("GROUPED", "WEIGHTED", "KL_WEIGHTED", "ADAPTIVE", "ADAPTIVE_KL", "ANCHORED"), True),
    "REDUCTION": 2,
}
_GENERATOR = {"extra_guidance": "fp32", "GUIDED": True}
_GENERATOR_SUMS = {**_GENERATOR, "p_invalid": "*i32", "HAS_X0": True, "SHIFTED": True}
_GENERATOR_GRADIENT = {**_GENERATOR, "HAS_UPSTREAM": True}
_LATENTS = (
    *("p_x0", "p_out", "p_predicted", "p_old", "p_target", "p_ref", "p_uncond", "p_grad"),
    *("p_ta", "p_score", "p_x_t"),
)
_COMMON = {
    **dict.fromkeys(("p_ids", "p_group_ids", "p_member_ids"), "*i64"),
    "p_mask": "*u8",
    "seed": "i64",
    "stream": "i32",
    "scale": "fp32",
    "BLOCK": 1024,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as a launch would compile it.

    special: argument -> type, or value of a constexpr; others are fp32 pointers and int32 numbers. latents: the type of
    latent-sized tensors. wide: latent-sized tensors that are read and written, 1024 elements a program, or None where
    no width is promised.
    """

    name: str
    module: str
    function: str
    special: dict[str, Any]
    latents: str = "fp32"
    wide: tuple[int, int] | None = None


def _samples(name: str, centering: int, gathered: bool, bce: bool) -> Kernel:
    special = {**_OBJECTIVE, "CENTERING": centering, "GATHERED": gathered, "BCE": bce, "ROWS": 16, "BLOCK": 64}
    return Kernel(name, "objective", "samples_kernel", special)


KERNELS = (
    Kernel("noise bf16", "noise", "noise_kernel", {"HAS_X0": True}, "bf16", (1, 1)),
    Kernel("noise fp32", "noise", "noise_kernel", {"HAS_X0": True}, "fp32", (1, 1)),
    Kernel("epsilon fp32", "noise", "noise_kernel", {"HAS_X0": False}, "fp32", (0, 1)),
    Kernel("sums bf16 seeded", "residual", "partial_sums_kernel", {**_RESIDUAL, "TARGET": VELOCITY}, "bf16", (4, 0)),
    Kernel("sums bf16 with old", "residual", "partial_sums_kernel", {**_WITH_OLD, "TARGET": TENSOR}, "bf16", (5, 0)),
    Kernel("sums fp32 given", "residual", "partial_sums_kernel", {**_RESIDUAL, "TARGET": TENSOR}, "fp32", (4, 0)),
    Kernel(
        "sums bf16 masked", "residual", "partial_sums_kernel", {**_RESIDUAL, "TARGET": VELOCITY, "MASKED": True}, "bf16"
    ),
    Kernel("finalise", "residual", "finalise_kernel", {**_WHOLE, "HAS_OLD": True, "BLOCK": 256}),
    Kernel("grad bf16 seeded", "residual", "grad_kernel", {**_RESIDUAL, **_GRAD, "TARGET": VELOCITY}, "bf16", (4, 1)),
    Kernel("grad fp32 given", "residual", "grad_kernel", {**_RESIDUAL, **_GRAD, "TARGET": TENSOR}, "fp32", (4, 1)),
    _samples("objective uniform", 0, False, False),
    _samples("objective softmax", 1, True, True),
    _samples("objective hard", 2, False, False),
    Kernel("objective totals", "objective", "totals_kernel", _OBJECTIVE),
    Kernel("generator sums bf16", "generator", "partial_sums_kernel", _GENERATOR_SUMS, "bf16", (6, 0)),
    Kernel("generator sums fp32", "generator", "partial_sums_kernel", _GENERATOR_SUMS, "fp32", (6, 0)),
    Kernel(
        "generator finalise", "generator", "finalise_kernel", {"p_invalid": "*i32", "p_count": "*i64", "BLOCK": 256}
    ),
    Kernel("generator grad bf16", "generator", "gradient_kernel", _GENERATOR_GRADIENT, "bf16", (4, 1)),
    Kernel("generator grad fp32", "generator", "gradient_kernel", _GENERATOR_GRADIENT, "fp32", (4, 1)),
)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses; loads and stores are counted by width in bits, in SASS."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    local_accesses: int
    loads: dict[int, int]
    stores: dict[int, int]

    @property
    def spills(self) -> bool:
        return bool(self.stack_bytes or self.local_bytes or self.local_accesses)


def compile_kernel(kernel: Kernel, architecture: int) -> Usage:
    """Compiles for sm_<architecture>, pointers and row strides aligned to 16 as tensors and latent sizes are."""
    import triton

    function = getattr(importlib.import_module(f"crd_fast.kernels.{kernel.module}"), kernel.function)
    rounding = importlib.import_module("crd_fast.kernels.configs").ROUNDING
    special = _COMMON | dict.fromkeys(_LATENTS, f"*{kernel.latents}") | kernel.special
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(function.arg_names):
        given = special.get(argument, "*fp32" if argument.startswith("p_") else "i32")
        signature[argument] = given if isinstance(given, str) else "constexpr"
        if not isinstance(given, str):
            constants[(index,)] = given
        elif argument.startswith("p_") or argument == "dim" or argument.endswith("_stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    built = triton.compile(source, target=target, options={"num_warps": WARPS, **rounding})
    return _usage(built.asm["cubin"], built.metadata.shared)


def _usage(cubin: bytes, dynamic_shared: int) -> Usage:
    resources, sass = _cuobjdump("--dump-resource-usage", cubin), _cuobjdump("-sass", cubin)

    def number(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", resources)
        if found is None:
            raise RuntimeError(f"cuobjdump's resource usage has no {name}: {resources!r}")
        return int(found[1])

    return Usage(
        registers=number("REG"),
        shared_bytes=number("SHARED") + dynamic_shared,
        stack_bytes=number("STACK"),
        local_bytes=number("LOCAL"),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        loads=_widths("LDG", sass),
        stores=_widths("STG", sass),
    )


def _widths(instruction: str, sass: str) -> dict[int, int]:
    counts: dict[int, int] = {}
    for suffixes in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        parts = suffixes.split(".")
        narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
        width = next((narrow[part] for part in parts if part in narrow), 32)
        width = next((int(part) for part in parts if part in ("64", "128", "256")), width)
        counts[width] = counts.get(width, 0) + 1
    return dict(sorted(counts.items()))


def _cuobjdump(option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, action="append", help="only this one")
    given = parser.parse_args(arguments)
    try:
        import triton  # noqa: F401
    except ImportError:
        print("Triton is not installed; `pip install 'crd-fast[triton]'`", file=sys.stderr)
        return 2
    print(f"{'kernel':20} {'arch':>6} {'registers':>9} {'shared':>7} {'spills':>6}  loads by bits, stores by bits")
    spilling = 0
    for kernel in KERNELS:
        for architecture in given.architecture or ARCHITECTURES:
            usage = compile_kernel(kernel, architecture)
            spilling += usage.spills
            widths = ["+".join(f"{n}x{bits}" for bits, n in w.items()) or "none" for w in (usage.loads, usage.stores)]
            print(
                f"{kernel.name:20} {f'sm_{architecture}':>6} {usage.registers:9} {usage.shared_bytes:7} "
                f"{'YES' if usage.spills else 'none':>6}  {widths[0]}, {widths[1]}"
            )
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
