"""From an exception to one clear block on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from visionkd import __version__
from visionkd.cli.console import is_main_process
from visionkd.errors import InterruptedRunError, RequestError, VisionKDError

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130
_TRAIN_MODULES = frozenset(
    "torch torchvision timm lightning torchmetrics safetensors onnx onnxscript onnxruntime tensorboard matplotlib "
    "jinja2".split()
)
_FULL = "there is no space left on the disk"
_OSERRORS = {
    errno.ENOSPC: (
        _FULL,
        "Free some space, or choose another disk with --out; a stopped run continues with --resume --out DIR.",
    ),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, or choose another place with --out."),
    errno.EROFS: ("the place to write to is read-only", "Choose a writable directory with --out."),
    errno.EACCES: ("permission denied", "Check the owner and the permissions, or choose another directory with --out."),
    errno.EPERM: ("permission denied", "Check the owner and the permissions, or choose another directory with --out."),
}


#: Only where the error itself, not its cause, is one of these: a library may look for a file and do without it.
_CHECK = "Check the path; --debug shows what it was wanted for."
_PLACES = {
    errno.ENOENT: "Check the path, and that the directory above it exists; --debug shows what it was wanted for.",
    errno.ENOTDIR: "A part of the path is a file; give another path.",
    errno.EISDIR: "A file is wanted there; give the path of a file, or move the directory away.",
    errno.EEXIST: "Give another path, or move what is there away.",
}


@dataclass(frozen=True)
class Failure:
    """What a user is told.

    Attributes:
        problems: One or more lines on what is wrong.
        hint: What to do next.
        exit_code: 1 the work failed, 2 the request was wrong, 130 interrupted.
        unexpected: Whether this is a mistake of the program, so that the traceback has to be kept.
    """

    problems: tuple[str, ...]
    exit_code: int
    hint: str | None = None
    unexpected: bool = False
    notes: tuple[str, ...] = field(default=())


def explain(error: BaseException) -> Failure:
    """Return what to tell the user about ``error``."""
    notes = tuple(getattr(error, "__notes__", ()))
    if isinstance(error, RequestError):
        problems = tuple(map(str, error.problems)) or (error.message,)
        return Failure(problems, error.exit_code, error.hint, notes=notes)
    if isinstance(error, VisionKDError):
        return Failure((error.message,), error.exit_code, error.hint, notes=notes)
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "visionkd"
        return Failure((error.format_message(),), error.exit_code, f"See '{where} --help'.")
    if isinstance(error, click.ClickException):
        return Failure((error.format_message(),), error.exit_code)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return Failure(("interrupted",), INTERRUPTED, notes=notes)
    for cause in _chain(error):
        known = _explain_known(cause)
        if known is not None:
            return Failure((known[0],), known[2], known[1], notes=notes)
    if isinstance(error, OSError) and error.errno and error.filename is not None:
        return Failure((_place(error),), FAILED, _PLACES.get(error.errno, _CHECK), notes=notes)
    text = " ".join(str(error).split())
    short = f"internal error: {type(error).__name__}{': ' if text else ''}{text[:300]}"
    return Failure(
        (short,), FAILED, "Run the command again with --debug for the traceback.", unexpected=True, notes=notes
    )


def _explain_known(error: BaseException) -> tuple[str, str, int] | None:
    """Return message, hint and exit code for mishaps of the machine, which libraries report in their own ways."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in _OSERRORS:
        message, hint = _OSERRORS[error.errno]
        return f"{message}: {error.filename}" if error.filename else message, hint, FAILED
    if "No space left on device" in text or "os error 28" in text:
        return _FULL, _OSERRORS[errno.ENOSPC][1], FAILED
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _TRAIN_MODULES:
        hint = "Install what training and export need: pip install 'visionkd[train]'"
        return f"this command needs the package '{error.name}', which is not installed", hint, WRONG_REQUEST
    if "shared memory" in text and ("Bus error" in text or "shm" in text):
        return (
            "the data loader ran out of shared memory",
            "Use -o data.workers=0, or give the container a larger /dev/shm.",
            FAILED,
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        where = "the GPU" if "CUDA" in text else "the machine"
        return (
            f"{where} ran out of memory",
            "Use a smaller --batch-size, a smaller img_size, or --precision bf16.",
            FAILED,
        )
    return None


def _place(error: OSError) -> str:
    names = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, os.PathLike))
    ]
    reason = (error.strerror or type(error).__name__).lower()
    return f"{reason}: {' -> '.join(names) or error.filename}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, which is where a library hides the operating system's answer."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def report(error: BaseException, *, debug: bool, argv: list[str]) -> int:
    """Print ``error`` as one block and return the exit code."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(error.format_message(), err=True)  # a group without a command: its help is the answer
        return WRONG_REQUEST
    failure = explain(error)
    if debug:
        click.echo("".join(traceback.format_exception(type(error), error, error.__traceback__)), err=True, nl=False)
    stopped = isinstance(error, (KeyboardInterrupt, click.Abort, InterruptedRunError))
    rank = "" if is_main_process() else "[another process of the run] "
    head = rank + click.style("stopped:" if stopped else "error:", fg="yellow" if stopped else "red", bold=True)
    if len(failure.problems) == 1:
        click.echo(f"{head} {failure.problems[0]}", err=True)
    else:
        click.echo(f"{head} {len(failure.problems)} problems with this request", err=True)
        for problem in failure.problems:
            click.echo("  - " + problem.replace("\n", "\n    "), err=True)
    for text in failure.notes:
        click.echo(f"  {text}", err=True)
    if failure.unexpected and not debug:
        file = _keep_traceback(error, argv)
        if file is not None:
            click.echo(f"  The traceback is in {file}; please add it to a bug report.", err=True)
    if failure.hint and not (failure.unexpected and debug):
        click.echo(f"{click.style('hint:', fg='cyan', bold=True)} {failure.hint}", err=True)
    return failure.exit_code


def _keep_traceback(error: BaseException, argv: list[str]) -> Path | None:
    """Write the traceback to a file: the failure of a long run may not come again."""
    cache = Path(os.environ.get("VISIONKD_CACHE") or Path.home() / ".cache" / "visionkd")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    text = "\n".join(
        [
            f"visionkd {__version__}, Python {sys.version.split()[0]} on {sys.platform}",
            f"$ visionkd {shlex.join(argv)}",
            "".join(traceback.format_exception(type(error), error, error.__traceback__)),
        ]
    )
    for directory in (cache / "errors", Path(tempfile.gettempdir()) / "visionkd-errors"):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / name
            file.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return file
    return None
