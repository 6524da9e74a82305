"""Every kernel compiled for sm_80, sm_90 and sm_100, which needs no GPU: no spills, and 16 bytes a global access."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

ARCHITECTURES = (80, 90, 100)
TENSOR, VELOCITY = 0, 1
RESIDUAL = {
    "p_ids": "*i64",
    "p_mask": "*u8",
    "seed": "i64",
    "stream": "i32",
    "scale": "fp32",
    "ANCHORED": True,
    "GUIDED": True,
    "MASKED": False,
    "BLOCK": 1024,
}


def residual(dtype, target, **others):
    latents = dict.fromkeys(("p_predicted", "p_target", "p_ref", "p_uncond"), f"*{dtype}")
    return {**RESIDUAL, **latents, "TARGET": target, **others}


def grad(dtype, target, **others):
    return residual(dtype, target, p_grad=f"*{dtype}", SCALED=False, COUNTED=False, HAS_ERROR=True, **others)


OBJECTIVE = {
    **dict.fromkeys(("beta", "kl_coef", "clip", "inverse_temperature"), "fp32"),
    **dict.fromkeys(("p_group_ids", "p_member_ids"), "*i64"),
    **dict.fromkeys(("GROUPED", "WEIGHTED", "KL_WEIGHTED", "ADAPTIVE", "ADAPTIVE_KL", "ANCHORED"), True),
    "REDUCTION": 2,
}


def samples(centering, gathered):
    return {**OBJECTIVE, "CENTERING": centering, "GATHERED": gathered, "BCE": centering == 1, "ROWS": 16, "BLOCK": 64}


# name -> (module, kernel, the arguments that are not fp32 pointers or int32 numbers)
KERNELS = {
    "noise bf16": ("noise", "noise_kernel", {"p_x0": "*bf16", "p_out": "*bf16", "HAS_X0": True}),
    "noise fp32": ("noise", "noise_kernel", {"HAS_X0": True}),
    "epsilon fp32": ("noise", "noise_kernel", {"HAS_X0": False}),
    "sums bf16 seeded": ("residual", "partial_sums_kernel", residual("bf16", VELOCITY)),
    "sums fp32 given": ("residual", "partial_sums_kernel", residual("fp32", TENSOR)),
    "sums bf16 masked": ("residual", "partial_sums_kernel", residual("bf16", VELOCITY, MASKED=True)),
    "finalise": ("residual", "finalise_kernel", {"SCALED": False, "COUNTED": False, "BLOCK": 256}),
    "grad bf16 seeded": ("residual", "grad_kernel", grad("bf16", VELOCITY)),
    "grad fp32 given": ("residual", "grad_kernel", grad("fp32", TENSOR)),
    "objective uniform": ("objective", "samples_kernel", samples(0, False)),
    "objective softmax": ("objective", "samples_kernel", samples(1, True)),
    "objective hard": ("objective", "samples_kernel", samples(2, False)),
    "objective totals": ("objective", "totals_kernel", OBJECTIVE),
}


def compiled(name, architecture):
    """SASS and resource usage of a kernel, arguments aligned to 16 as tensors and latent sizes are."""
    module, kernel_name, special = KERNELS[name]
    kernel = getattr(importlib.import_module(f"crd_fast.kernels.{module}"), kernel_name)
    special = {"p_ids": "*i64", "seed": "i64", "stream": "i32", "BLOCK": 1024} | special
    rounding = importlib.import_module("crd_fast.kernels.configs").ROUNDING
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        given = special.get(argument, "*fp32" if argument.startswith("p_") else "i32")
        signature[argument] = given if isinstance(given, str) else "constexpr"
        if not isinstance(given, str):
            constants[(index,)] = given
        elif argument.startswith("p_") or argument == "dim" or argument.endswith("_stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, **rounding}).asm


def cuobjdump(option, cubin, folder):
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    result = subprocess.run([tool, option, folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return result.stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_no_spills(name, architecture, tmp_path):
    asm = compiled(name, architecture)
    usage = cuobjdump("--dump-resource-usage", asm["cubin"], tmp_path)
    assert re.search(r"REG:\d+ STACK:0 ", usage), usage
    assert "LOCAL:0 " in usage, usage
    sass = cuobjdump("-sass", asm["cubin"], tmp_path)
    assert not re.findall(r"\b(?:LDL|STL)\b", sass)
    if "masked" in name or "objective" in name or name == "finalise":
        return
    wide = re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", sass)
    # 1024 elements in 128 threads: 8 a thread, one 16-byte load of bf16 and two of fp32 for each latent-sized tensor
    tensors = 0 if "epsilon" in name else 1 if "noise" in name else 4
    assert len(wide) == tensors * (1 if "bf16" in name else 2), sass
    if "sums" not in name:
        stores = re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", sass)
        assert len(stores) == (1 if "bf16" in name else 2)
