"""Who may change a label store, and which journals nobody writes to any more. No torch here.

``.lock`` is held while shards, sessions or the manifest change. Each process that may write holds a
``session-<id>.lock`` of its own for as long as it has the store open, and writes to ``journal-<id>.log``. A session
whose lock can be had is over, however it ended. Sessions begin and are looked at under ``.lock`` only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait until no other process changes the store, and keep others from changing it meanwhile."""
    with FileLock(str(directory / _LOCK)):
        yield


class Session:
    """The right of one process to a journal, until it closes or dies.

    Args:
        directory: The store; its ``.lock`` is held.
        name: A name that no other session has.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.journal = directory / f"journal-{name}.log"
        self._directory = directory
        self._file = _session_file(directory, name)
        self._lock = FileLock(str(self._file), timeout=0, thread_local=False)
        self._lock.acquire()
        self._sealed = 0

    def seal(self) -> None:
        """Give the journal up, so that whoever merges next takes it."""
        self.journal.rename(self._directory / f"sealed-{self.name}-{self._sealed:05d}.log")
        self._sealed += 1

    def close(self) -> None:
        self._file.unlink(missing_ok=True)
        self._lock.release(force=True)


@dataclass(frozen=True)
class Unowned:
    """Journals that nobody writes to any more, the oldest first."""

    journals: tuple[Path, ...]
    in_use: bool


@contextlib.contextmanager
def unowned(directory: Path, *, own: str | None = None) -> Iterator[Unowned]:
    """Claim what dead sessions and sealed journals left; remove the claimed locks at the end.

    Args:
        directory: The store; its ``.lock`` is held.
        own: Name of the caller's session, which is left alone.
    """
    taken, in_use = [], False
    journals = list(directory.glob("sealed-*.log"))
    names = {file.stem.removeprefix("session-") for file in directory.glob("session-*.lock")}
    names |= {file.stem.removeprefix("journal-") for file in directory.glob("journal-*.log")}
    try:
        for name in sorted(names - {own}):
            lock = FileLock(str(_session_file(directory, name)), timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                in_use = True
                continue
            taken.append((name, lock))
            journals.extend(directory.glob(f"journal-{name}.log"))
        yield Unowned(tuple(sorted(journals, key=_age)), in_use)
    finally:
        for name, lock in taken:
            if not (directory / f"journal-{name}.log").exists():  # else it could not be merged, as on a full disk
                _session_file(directory, name).unlink(missing_ok=True)
            lock.release(force=True)


def _session_file(directory: Path, name: str) -> Path:
    return directory / f"session-{name}.lock"


def _age(file: Path) -> tuple[int, str]:
    return file.stat().st_mtime_ns, file.name
