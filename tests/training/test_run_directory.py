"""Which directory a run gets, and that it has it alone."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from crd_fast.errors import ConfigError
from crd_fast.training import run_directory
from crd_fast.training.run_directory import RunDirectory


def with_run(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("")
    return path


def test_two_processes_never_run_in_one_directory(tmp_path: Path) -> None:
    """Neither a new run nor one that continues, until the first is over."""
    path = tmp_path / "run"
    script = f"""
from crd_fast.training.run_directory import RunDirectory
directory = RunDirectory.open({str(path)!r}, "shapes", resume=False)
print("open", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=rf"run is in use by process {other.pid} on .*name another run.dir"):
            RunDirectory.open(str(path), "shapes", resume=False)
        (path / "config.yaml").write_text("")
        with pytest.raises(ConfigError, match="is in use by process"):
            RunDirectory.open(str(path), "shapes", resume=True)
        other.kill()
    RunDirectory.open(str(path), "shapes", resume=True).release()


def test_what_is_released_can_be_opened_again(tmp_path: Path) -> None:
    path = with_run(tmp_path / "run")
    first = RunDirectory.open(str(path), "shapes", resume=True)
    with pytest.raises(ConfigError, match="in use"):
        RunDirectory.open(str(path), "shapes", resume=True)
    first.release()
    with pytest.raises(ConfigError, match="already holds a run"):
        RunDirectory.open(str(path), "shapes", resume=False)
    RunDirectory.open(str(path), "shapes", resume=True).release()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "flock", missing)
    with pytest.warns(UserWarning, match=r"cannot be locked \(Function not implemented\): nothing keeps a second run"):
        RunDirectory.open(str(tmp_path / "run"), "shapes", resume=False).release()


def test_runs_that_start_in_one_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory.time, "strftime", lambda form: "20261130-041500")
    opened = [RunDirectory.open(None, "shapes", resume=False) for _ in range(3)]
    assert [directory.path.name for directory in opened] == [
        "shapes-20261130-041500",
        "shapes-20261130-041500-2",
        "shapes-20261130-041500-3",
    ]


def test_resuming_takes_the_newest_run_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that somebody has named after it, nor one of a recipe whose name begins alike, nor an empty folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run of recipe shapes under runs/"):
        RunDirectory.open(None, "shapes", resume=True)
    for name in ("20261129-235959", "20261130-041500", "20261130-041500-2", "20261130-041500-10", "mine"):
        with_run(tmp_path / "runs" / f"shapes-{name}")
    with_run(tmp_path / "runs" / "shapes-didr-20261201-000000")
    (tmp_path / "runs" / "shapes-20261202-000000").mkdir()
    assert RunDirectory.open(None, "shapes", resume=True).path.name == "shapes-20261130-041500-10"
