"""Every kernel compiled for sm_80, sm_90 and sm_100, which needs no GPU: no spills, and 16 bytes a global access."""

from __future__ import annotations

import pytest

from benchmarks import compiled_kernels
from benchmarks.compiled_kernels import ARCHITECTURES, KERNELS, Usage, _widths

pytest.importorskip("triton", reason="Triton has no build for this platform")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_no_spills_and_wide_accesses(kernel, architecture):
    usage = compiled_kernels.compile_kernel(kernel, architecture)
    assert not usage.spills, usage
    if kernel.wide is None:
        return
    assert usage.registers <= 96, usage  # five programs of four warps on a multiprocessor
    # 1024 elements in 128 threads: 8 a thread, one 16-byte access of bf16 and two of fp32 for each latent-sized tensor
    each = 1 if kernel.latents == "bf16" else 2
    reads, writes = kernel.wide
    assert usage.loads.get(128, 0) == reads * each, usage
    assert usage.stores.get(128, 0) == writes * each, usage


def test_widths_are_read_from_sass():
    sass = "LDG.E.128 R4; LDG.E.128.CONSTANT R8; @P0 LDG.E R1; LDG.E.U8 R2; STG.E.64 [R2]; LDL R1"
    assert _widths("LDG", sass) == {8: 1, 32: 1, 128: 2}
    assert _widths("STG", sass) == {64: 1}


def test_any_use_of_local_memory_is_a_spill():
    fine = {"registers": 32, "shared_bytes": 0, "stack_bytes": 0, "local_bytes": 0, "local_accesses": 0}
    assert not Usage(**fine, loads={}, stores={}).spills
    for name in ("stack_bytes", "local_bytes", "local_accesses"):
        assert Usage(**{**fine, name: 1}, loads={}, stores={}).spills


def test_the_report_names_every_kernel(capsys):
    assert compiled_kernels.main(["--architecture", "90"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(KERNELS)
    assert all(any(line.startswith(kernel.name) for line in lines) for kernel in KERNELS)
