"""Every mishap gives one clear block, the exit code of the design, and no traceback unless asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionkd.cli._failures import explain
from visionkd.errors import DataError, InterruptedRunError, Problem, RequestError, WorkError


def chained() -> RuntimeError:
    error = RuntimeError("PytorchStreamWriter failed writing file data/3")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "runs/a/last.ckpt")
    return error


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's."""


CASES = [
    (RequestError("no such model", hint="Try another."), 2, ["error: no such model", "hint: Try another."]),
    (
        RequestError(
            [Problem("training.epochs", "must be at least 1 (given: 0)"), Problem("--method", "unknown", "Known: kd")]
        ),
        2,
        ["2 problems", "  - training.epochs: must be at least 1 (given: 0)", "  - --method: unknown. Known: kd"],
    ),
    (WorkError("the loss became NaN", hint="Lower --lr."), 1, ["error: the loss became NaN", "hint: Lower --lr."]),
    (DataError("class 'cat' is empty"), 1, ["error: class 'cat' is empty"]),
    (InterruptedRunError("a checkpoint was written", hint="visionkd distill --resume"), 130, ["stopped: a checkpoint"]),
    (KeyboardInterrupt(), 130, ["stopped: interrupted"]),
    (OSError(errno.ENOSPC, "No space left on device", "a.ckpt"), 1, ["no space left on the disk: a.ckpt", "--resume"]),
    (chained(), 1, ["no space left on the disk: runs/a/last.ckpt"]),
    (RuntimeError("Error: I/O error: No space left on device (os error 28)"), 1, ["no space left on the disk"]),
    (OSError(errno.EROFS, "Read-only file system", "runs"), 1, ["read-only: runs", "--out"]),
    (PermissionError(errno.EACCES, "Permission denied", "runs"), 1, ["permission denied: runs"]),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/a"),
        1,
        ["no such file or directory: /proc/a"],
    ),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/a"), 1, ["not a directory: f/a", "part of the path"]),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), 1, ["is a directory: a", "path of a file"]),
    (FileExistsError(errno.EEXIST, "File exists", "a"), 1, ["file exists: a", "another path"]),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a", None, "b"), 1, ["file name too long: a -> b", "--debug"]),
    (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, ["'torch'", "pip install 'visionkd[train]'"]),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, ["the GPU ran out of memory", "--batch-size"]),
    (MemoryError(), 1, ["the machine ran out of memory"]),
    (
        RuntimeError("DataLoader worker killed by signal: Bus error. insufficient shared memory (shm)"),
        1,
        ["shared memory"],
    ),
]


@pytest.mark.parametrize(
    ("error", "code", "expected"), CASES, ids=[f"{type(case[0]).__name__}-{n}" for n, case in enumerate(CASES)]
)
def test_known_failures(run, pretend, error: BaseException, code: int, expected: list[str]) -> None:
    def fail(**_: object) -> None:
        raise error

    pretend("train", fail)
    outcome = run("train", "--model", "a")
    assert outcome.code == code
    for text in expected:
        assert text in outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""


def test_an_unexpected_error_is_kept_in_a_file(run, pretend, tmp_path: Path) -> None:
    def fail(**_: object) -> None:
        raise ZeroDivisionError("by zero")

    pretend("train", fail)
    outcome = run("train", "--model", "my model")
    assert outcome.code == 1
    assert "error: internal error: ZeroDivisionError: by zero" in outcome.err
    assert "--debug" in outcome.err and "Traceback" not in outcome.err
    (file,) = (tmp_path / "cache" / "errors").iterdir()
    assert str(file) in outcome.err
    text = file.read_text(encoding="utf-8")
    assert "Traceback" in text and "visionkd train --model 'my model'" in text


@pytest.mark.parametrize("argv", [("--debug", "train", "--model", "a"), ("train", "--model", "a", "--debug")])
def test_debug_shows_the_traceback(run, pretend, tmp_path: Path, argv: tuple[str, ...]) -> None:
    def fail(**_: object) -> None:
        raise WorkError("lost the device")

    pretend("train", fail)
    outcome = run(*argv)
    assert outcome.code == 1
    assert "Traceback" in outcome.err and "error: lost the device" in outcome.err
    assert not (tmp_path / "cache").exists()


def test_notes_of_an_error_are_shown(run, pretend) -> None:
    def fail(**_: object) -> None:
        error = WorkError("lost the device")
        error.__notes__ = ["The log is in runs/a/log.txt."]  # what add_note does, from Python 3.11 on
        raise error

    pretend("train", fail)
    assert "The log is in runs/a/log.txt." in run("train", "--model", "a").err


def test_an_error_that_is_its_own_cause_ends() -> None:
    error = RuntimeError("a")
    error.__context__ = ValueError("b")
    error.__context__.__context__ = error
    assert explain(error).unexpected


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m visionkd --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_exits_with_130() -> None:
    code = (
        "import sys, os, signal\nfrom visionkd import workflows\nfrom visionkd.cli.main import main\n"
        "def slow(**_): os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(30)\n"
        "workflows.train = slow\nsys.exit(main(['train', '--model', 'a']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "stopped: interrupted" in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_a_library_looked_for_is_not_blamed() -> None:
    try:
        try:
            open("/nowhere/at/all", encoding="utf-8")
        except FileNotFoundError:
            raise KeyError("x")  # noqa: B904 - as a library would
    except KeyError as error:
        failure = explain(error)
    assert failure.unexpected and "nowhere" not in failure.problems[0]
