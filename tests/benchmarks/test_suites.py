"""The benchmark programs run here at tiny sizes: what they write, and what they refuse to write."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import crd_fast
from benchmarks import gpu_suite, kernel_checks, learning_curves, measure, public_step, registry, tables

CPU = torch.device("cpu")


def test_the_gpu_suite_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--dry-run", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "suite.json").read_text())
    assert facts["kernels_wrong"] == [] and facts["refused"] == [] and facts["torch"] == torch.__version__
    assert facts["failed"] == {} and set(facts["seconds"]) == set(gpu_suite.PARTS)
    rows = list(csv.DictReader((tmp_path / "tiny" / "operations.csv").open()))
    assert {(row["operation"], row["dtype"], row["side"]) for row in rows} == {
        (name, dtype, side)
        for name in registry.WORKLOADS
        for dtype in registry.DTYPES
        for side in ("eager", "crd_fast")
    }
    assert all(float(row["milliseconds"]) > 0 and float(row["share_of_copy"]) > 0 for row in rows)
    assert (tmp_path / "tiny" / "bandwidth.png").read_bytes()[:4] == b"\x89PNG"
    assert "kernel checks: 0 wrong" in capsys.readouterr().out
    step = json.loads((tmp_path / "step" / "step.json").read_text())
    assert [row["row"] for row in step["rows"]] == ["public order", "crd-fast"]
    # the same passes on both sides, so the same arithmetic within what the loss itself takes
    public, ours = (row["tflops_per_second"] * row["seconds"] for row in step["rows"])
    assert ours == pytest.approx(public, rel=0.1) and all(row["peak_mib"] > 0 for row in step["rows"])


def test_a_part_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(*arguments: object) -> registry.Workload:
        raise torch.OutOfMemoryError("no room")

    def fail(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setitem(registry.WORKLOADS, "noise", small)
    monkeypatch.setattr(gpu_suite, "measure_step", fail)
    monkeypatch.setenv("PATH", "")  # no git
    assert gpu_suite.main(["--dry-run", "--out", str(tmp_path), "--parts", "tables", "step"]) == 1
    facts = json.loads((tmp_path / "suite.json").read_text())
    assert facts["failed"] == {"step": "ModuleNotFoundError: No module named 'diffusers'"} and facts["commit"] is None
    assert facts["refused"] == [f"tiny: noise {dtype}: OutOfMemoryError: no room" for dtype in registry.DTYPES]
    rows = json.loads((tmp_path / "tiny" / "operations.json").read_text())["rows"]
    assert {row["operation"] for row in rows} == set(registry.WORKLOADS) - {"noise"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, {"ran": True, "errors": False, "summary": ["told"]}),
        (9, {"ran": True, "errors": True, "summary": ["told"]}),
        (255, {"ran": False, "reason": "exit code 255", "summary": ["told"]}),
    ],
)
def test_a_sanitizer_that_does_not_run_is_not_clean(
    code: int, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n[ $PYTORCH_NO_CUDA_MEMORY_CACHING = 1 ] && echo told\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu_suite.sanitize() == expected
    suite = gpu_suite.Suite(tmp_path / "out", CPU, dry_run=True)
    monkeypatch.setattr(suite, "_sanitize", lambda: suite.facts.update(sanitizer=gpu_suite.sanitize()))
    assert suite.run(["sanitizer"]) == (1 if code == 9 else 0)


def test_shares_of_bandwidth_are_shown_where_memory_is_what_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "fits_cache", lambda size, device: True)
    rows, refused = tables.run((2, 4, 8, 8), CPU, False, ["residual_stats"])
    assert not refused and all(row["share_of_copy"] is row["gigabytes_per_second"] is None for row in rows)
    tables.show(rows)
    tables.save(tmp_path, rows, tables.environment(CPU))
    assert "%" not in capsys.readouterr().out and not (tmp_path / "bandwidth.png").exists()


def test_the_baseline_of_the_step_computes_our_loss() -> None:
    torch.manual_seed(0)
    f, x0, old, c, u = torch.randn(5, 12, 4, 8, 8)
    advantages, groups = torch.randn(12), torch.arange(3).repeat_interleave(4)
    fwd = crd_fast.noise(x0, torch.full((12,), 0.4), seed=0)
    gradients = []
    ours = crd_fast.loss(
        f.requires_grad_(), fwd, old=old, advantages=advantages, group_ids=groups, ref=c, ref_uncond=u,
        guidance_scale=4.5,
    ).loss  # fmt: skip
    theirs = public_step.plain_loss(f, fwd.target(), old, c, u, advantages, groups, 4.5)
    for value in (ours, theirs):
        gradients.append(torch.autograd.grad(value, f)[0])
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_without_a_gpu_the_suite_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", "nowhere"]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "operation", "reported"),
    [
        ("ops", "residual_grad", "gradient "),
        ("ops", "noise", "noise "),
        ("didr_ops", "generator_gradient", "generator gradient "),
    ],
)
def test_a_kernel_that_is_off_is_reported(
    module: str, operation: str, reported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = getattr(kernel_checks, module)
    right = getattr(ops, operation)
    monkeypatch.setattr(ops, operation, lambda *arguments: 1.001 * right(*arguments))
    wrong = kernel_checks.check_kernels(CPU, [(2, 63)])
    assert wrong and all(line.startswith(reported) for line in wrong)


def test_an_objective_that_is_off_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_checks.ops.objective

    def off(*arguments: object) -> tuple[torch.Tensor, ...]:
        loss, parts, samples, slopes, metrics = right(*arguments)
        return loss, parts, samples, 1.001 * slopes, metrics

    monkeypatch.setattr(kernel_checks.ops, "objective", off)
    wrong = kernel_checks.check_kernels(CPU, [(2, 63)])
    assert len(wrong) > 20 and all(line.startswith("objective's slopes temperature ") for line in wrong)
    for kind in ("temperature 0.0", "bce", "none", "batch 300", "grouped", "weighted", "gathered"):
        assert any(kind in line for line in wrong)


def test_no_number_without_a_passing_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = registry.WORKLOADS["noise"]

    def failing(*arguments: object) -> registry.Workload:
        def check() -> None:
            raise AssertionError("the sides differ")

        return replace(honest(*arguments), check=check)  # type: ignore[arg-type]

    monkeypatch.setitem(registry.WORKLOADS, "noise", failing)
    arguments = ["--shape", "2,64", "--no-compile", "--only", "noise", "--out", str(tmp_path / "out")]
    assert tables.main(arguments) == 1
    printed = capsys.readouterr()
    assert "refused, its check failed: noise fp32: the sides differ" in printed.err
    assert "crd_fast" not in printed.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", ["24,a", "24", "0,4", ""])
def test_a_shape_that_is_none_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tables.main(["--shape", shape])
    assert f"expected a batch and latent sizes as in 24,16,64,64, got {shape!r}" in capsys.readouterr().err


def test_a_missed_figure_is_named() -> None:
    row = {
        "operation": "loss forward+backward",
        "dtype": "bf16",
        "side": "crd_fast",
        "speedup_over_eager": 9.5,
        "share_of_copy": 0.8,
        "peak_latents": 1.3,
    }
    assert [line.split(": ")[1] for line in tables.missed([row])] == [
        "9.50x eager, wanted 10x; it runs at 80% of copy bandwidth",
        "1.30 latents of memory, wanted 1.1",
    ]
    assert tables.missed([row | {"speedup_over_eager": 10.0, "peak_latents": 1.1}]) == []


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1 << 20)

    def together() -> list[torch.Tensor]:
        return [torch.empty(1 << 20) for _ in range(3)]

    assert measure.peak_bytes(one_after_the_other, CPU) == 4 << 20
    assert measure.peak_bytes(together, CPU) == 12 << 20


def test_learning_curves_are_held_against_the_spread_over_seeds() -> None:
    base = {0: [0.1, 0.2, 0.5], 1: [0.1, 0.3, 0.7]}  # last thirds .5 and .7: deviation .1414
    curves = {
        "bf16": base,
        "fp8": {0: [0.1, 0.2, 0.6], 1: [0.1, 0.3, 0.8]},
        "2 ranks": {0: [0, 0, 0.7], 1: [0, 0, 0.9]},
    }
    found = learning_curves.verdict(curves)
    assert found["bf16"]["seed_standard_deviation"] == pytest.approx(0.02**0.5)
    assert found["fp8"]["difference"] == pytest.approx(0.1) and found["fp8"]["within_seed_noise"]
    assert found["2 ranks"]["difference"] == pytest.approx(0.2) and not found["2 ranks"]["within_seed_noise"]


def test_finished_learning_curves_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant in learning_curves.VARIANTS:
        for seed in (0, 1):
            run = tmp_path / "runs" / f"{variant.replace(' ', '-')}-{seed}"
            run.mkdir(parents=True)
            rewards = [0.1, 0.2, 0.5 + 0.2 * seed + (0.5 if variant == "fp8" else 0.01)]
            lines = [json.dumps({"reward": {"geneval": reward}}) for reward in rewards]
            (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--seeds", "0", "1", "--epochs", "3", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert learning_curves.main(arguments) == 1  # fp8 is made to differ
    result = json.loads((tmp_path / "out.json").read_text())
    assert not result["variants"]["fp8"]["within_seed_noise"] and result["variants"]["2 ranks"]["within_seed_noise"]
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG" and "difference 0.4900" in capsys.readouterr().out
