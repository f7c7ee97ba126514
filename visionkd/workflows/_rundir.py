"""The run directory: lock, status, log, finished stages. See docs/concepts.md for its layout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from visionkd.config.load import dump_config
from visionkd.config.schema import RunConfig
from visionkd.config.search import SearchConfig
from visionkd.errors import InterruptedRunError, Problem, RequestError, VisionKDError, WorkError
from visionkd.files import write_text
from visionkd.types import Listener, Progress

#: Settings that may differ when a run is resumed, since they do not change the trained weights.
_FREE_ON_RESUME = (
    "compute",
    "data.workers",
    "data.cache",
    "export",
    "report",
    "training.checkpoint_every_s",
    "data.max_unreadable",
    "evaluations",
)
_WAIT_S = 0.5


class RunDirectory:
    """One run on disk. Only the process of rank 0 writes.

    Use :func:`open_run`, which creates, locks and finishes it.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self._status: dict[str, Any] = _read_json(path / "status.json") or {"state": "new", "stages": {}, "metrics": {}}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def status(self) -> Mapping[str, Any]:
        return self._status

    def update(self, **values: Any) -> None:
        """Change ``status.json``; metrics are merged, everything else is replaced."""
        metrics = {**self._status.get("metrics", {}), **values.pop("metrics", {})}
        self._status.update(values, metrics=metrics, updated=_now())
        if self.writes:
            write_text(self.path / "status.json", json.dumps(self._status, indent=2) + "\n")

    def take_metrics(self) -> dict[str, Any]:
        """Return the metrics so far and begin anew; :meth:`update` writes what is left."""
        return self._status.pop("metrics", {})

    def log(self, text: str) -> None:
        """Append a line to ``log.txt``."""
        if self.writes:
            with open(self.path / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"{_now()} {text}\n")

    def is_done(self, stage: str) -> bool:
        """Whether a stage was finished, by this process or the one that is resumed."""
        return self._status["stages"].get(stage) == "done"

    def mark_done(self, stage: str) -> None:
        """Remember that a stage is finished."""
        self.update(stages={**self._status["stages"], stage: "done"})

    def wait_for(self, stage: str, *, timeout_s: float = 24 * 3600.0) -> None:
        """Wait, on other ranks, until rank 0 has finished a stage."""
        self._wait(lambda: self.is_done(stage), f"the stage '{stage}'", timeout_s)

    def wait_for_path(self, path: Path, *, timeout_s: float = 3600.0) -> None:
        """Wait until rank 0 has made a file or directory."""
        self._wait(path.exists, str(path), timeout_s)

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            state = self._status.get("state")
            if state in ("failed", "interrupted") or time.monotonic() > end:
                raise WorkError(f"The process of rank 0 did not finish {what} (state: {state}).")
            time.sleep(_WAIT_S)
            self._status = _read_json(self.path / "status.json") or self._status


class RunListener(Listener):
    """Passes everything on to the caller's listener, and keeps messages and progress in the run directory."""

    def __init__(self, run: RunDirectory, listener: Listener) -> None:
        self.run = run
        self.listener = listener

    def message(self, text: str, *, level: str = "info") -> None:
        self.run.log(f"{level}: {text}" if level != "info" else text)
        said = list(self.run.status.get("messages", ()))
        if [level, text] not in said:
            self.run.update(messages=[*said, [level, text]])
        if self.run.writes:
            self.listener.message(text, level=level)  # type: ignore[arg-type]

    def stage(self, name: str, title: str, number: int, total: int) -> None:
        self.run.log(f"stage {number}/{total}: {title}")
        self.run.update(stage=name)
        if self.run.writes:
            self.listener.stage(name, title, number, total)

    def progress(self, progress: Progress) -> None:
        if self.run.writes:
            self.listener.progress(progress)

    def epoch_end(self, progress: Progress) -> None:
        values = ", ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
        self.run.log(f"{progress.stage}: epoch {progress.epoch}/{progress.epochs}: {values}")
        if self.run.writes:
            self.listener.epoch_end(progress)


@contextlib.contextmanager
def open_run(
    path: Path, *, config: RunConfig | SearchConfig, command: str, resume: bool, overwrite: bool, listener: Listener
) -> Iterator[tuple[RunDirectory, RunListener]]:
    """Create or reopen the run in ``path``, hold its lock, and record how the block ended.

    Raises:
        RequestError: If the directory is taken, locked by another process, or resumed with other settings.
    """
    writes = is_rank_zero()
    lock: Any = contextlib.nullcontext()
    if writes:
        _check_taken(path, resume=resume, overwrite=overwrite)
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path / ".lock"), timeout=0)
    try:
        with lock:
            if writes and resume:
                _check_same(path, config)
            if writes and overwrite:
                _clear(path)
            run = RunDirectory(path, writes=writes)
            if writes:
                _write_config(path / "config.yaml", config, command)
                if resume and run.status.get("state") == "done":
                    listener.message("This run was finished already; what it made is used again")
                run.update(state="running", pid=os.getpid(), error=None, exit_code=None)
                run.log(f"start: {command}")
            with _recording(run):
                yield run, RunListener(run, listener)
    except Timeout:
        holder = (_read_json(path / "status.json") or {}).get("pid", "unknown")
        raise RequestError(
            f"Another process is working in {path} (pid {holder}).",
            hint="Wait for it, or give another directory with --out.",
        ) from None


def _write_config(file: Path, config: RunConfig | SearchConfig, command: str) -> None:
    """Write the settings under the command that started the run; one that resumes it says nothing about them."""
    header = f"# {command}"
    if file.is_file():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        header = first if first.startswith("# ") else header
    write_text(file, f"{header}\n{dump_config(config)}")


@contextlib.contextmanager
def _recording(run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, InterruptedRunError))
        code = 130 if interrupted else error.exit_code if isinstance(error, VisionKDError) else 1
        text = str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # the disk may be what failed
            run.update(state="interrupted" if interrupted else "failed", exit_code=code, error=text)
            run.log(f"{'interrupted' if interrupted else 'failed'}: {text}")
        raise
    run.update(state="done", exit_code=0)
    run.log("done")


def read_run_config(path: Path) -> str:
    """Return the text of a run's ``config.yaml``.

    Raises:
        RequestError: If there is no run to resume.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise RequestError(
            f"There is no run to resume in {path}: it holds no config.yaml.", hint="Start it without --resume."
        )
    return file.read_text(encoding="utf-8")


def is_rank_zero() -> bool:
    """Whether this process is the only one, or the first, of a run."""
    names = ("RANK", "SLURM_PROCID") if "LOCAL_RANK" not in os.environ else ("RANK", "LOCAL_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _check_taken(path: Path, *, resume: bool, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise RequestError(Problem("--out", f"{path} is a file", "Give a directory."))
    if resume:
        read_run_config(path)
    elif path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()):
        is_run = (path / "status.json").is_file()
        if not is_run:
            raise RequestError(Problem("--out", f"{path} holds other files", "Give a new or empty directory."))
        if not overwrite:
            raise RequestError(
                f"{path} already holds a run, and nothing is written over unasked.",
                hint="Continue it with --resume, start again with --overwrite, or give another directory with --out.",
            )


def _check_same(path: Path, config: RunConfig | SearchConfig) -> None:
    before = _flat(yaml.safe_load(read_run_config(path)) or {})
    after = _flat(config.model_dump(mode="json"))
    problems = [
        Problem(key, f"is {after.get(key)!r}, but the run was started with {before.get(key)!r}")
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(_FREE_ON_RESUME)
    ]
    if problems:
        raise RequestError(
            problems, hint="Resume with the same settings (--resume --out DIR is enough), or start a new run."
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {key: value for name, part in values.items() for key, value in _flat(part, f"{prefix}{name}.").items()}
    if isinstance(values, list) and values:
        return {
            key: value for name, part in enumerate(values) for key, value in _flat(part, f"{prefix}{name}.").items()
        }
    return {prefix.rstrip("."): values}


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
