"""What the wheel holds, and that it works from elsewhere; needs the build tools but no network."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def run_python(program, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: setuptools leaves a build folder in the source tree and takes stale modules from it.
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("crd_fast", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    pip("wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target))
    (path,) = target.glob("crd_fast-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if re.fullmatch(r"crd_fast/_C\..*so", n)]
    for name in ("__init__.py", "py.typed", "_C.pyi", "kernels/__init__.py"):
        assert f"crd_fast/{name}" in names
    assert {name.split("/")[0] for name in names} == {"crd_fast", "crd_fast-0.1.0.dist-info"}


def test_wheel_has_every_module_of_the_checkout(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "crd_fast").rglob("*.py")}
    kernels = ROOT / "kernels" / "crd_kernels"
    modules |= {f"crd_fast/kernels/{path.relative_to(kernels).as_posix()}" for path in kernels.rglob("*.py")}
    assert modules - names == set()


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read("crd_fast-0.1.0.dist-info/METADATA"))
        entry_points = archive.read("crd_fast-0.1.0.dist-info/entry_points.txt").decode()
        assert "crd_fast-0.1.0.dist-info/licenses/LICENSE" in archive.namelist()
    assert metadata["Name"] == "crd-fast"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.6" in metadata.get_all("Requires-Dist")
    assert {"train", "rewards", "fp8", "xformers", "triton", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert "crd-fast = crd_fast.cli:console" in entry_points


def test_wheel_works_from_elsewhere(installed, tmp_path):
    program = """
import crd_fast, crd_fast.kernels, torch
from crd_fast import native
out = torch.empty(2, 10)
native.epsilon(torch.arange(2), 0, 0, out)
print(crd_fast.__file__, crd_fast.kernels.__file__, native.extension().__file__, sep="\\n")
"""
    # The target comes before the editable install of the environment.
    result = run_python(program, tmp_path, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    for path in result.stdout.split():
        assert Path(path).is_relative_to(installed), path


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_kernels_is_never_ours(where, tmp_path):
    program = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec is not None else None)
"""
    result = run_python(program, ROOT if where == "checkout" else tmp_path)
    assert result.returncode == 0, result.stderr
    origin = result.stdout.strip()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels"), origin
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_package_of_others_is_not_shadowed(tmp_path):
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("NAME = 'other'\n")
    result = run_python("import kernels; print(kernels.NAME)", ROOT, PYTHONPATH=str(other.parent))
    assert result.stdout.strip() == "other", result.stderr


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_mapped_package_imports_in_the_editable_install(where, tmp_path):
    program = "import crd_fast.kernels as k; print(k.__file__)"
    result = run_python(program, ROOT if where == "checkout" else tmp_path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "kernels" / "crd_kernels" / "__init__.py"
