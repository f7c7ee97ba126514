"""Where pulled models lie: complete or absent, one folder for each artifact as its card describes it. No torch.

$VISIONKD_CACHE/zoo/models/NAME/ARTIFACT-KEY/    the files; KEY changes with the card's hashes
$VISIONKD_CACHE/zoo/parts/SHA256.part            what was fetched so far of a file
$VISIONKD_CACHE/zoo/locks/                       one lock for each artifact and each file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from visionkd.errors import DownloadError, RequestError, WorkError
from visionkd.hub.card import Card, CheckpointArtifact

LIMIT_VARIABLE = "VISIONKD_ZOO_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0
#: A model that was asked for this recently is let be: its process may not have opened it yet.
_IN_USE_S = 3600.0
#: A folder that was being filled or removed, and the artifact's folder that it was meant to be.
_LEFT = re.compile(r"\.(.+-[0-9a-f]{12})\.")
#: What a conversion adds to the files it reads; raise it to have the packages written anew.
_CONVERSION = 1


@dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Attributes:
        model: Name of the model; empty for the part of a file, and for what a killed process left.
        artifact: Which form of it, with the key of its card.
        path: Its folder or file.
        size_bytes: Bytes on disk.
        used_at: When it was asked for last, in seconds since 1970.
    """

    model: str
    artifact: str
    path: Path
    size_bytes: int
    used_at: float


def cache_root() -> Path:
    """Return ``$VISIONKD_CACHE/zoo``, by default ``~/.cache/visionkd/zoo``."""
    root = os.environ.get("VISIONKD_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "visionkd") / "zoo"


def limit_bytes() -> int:
    """Return how large the cache may grow: ``VISIONKD_ZOO_CACHE_GB`` in 10^9 bytes, 20 without it.

    Raises:
        RequestError: If the variable is no positive number.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    try:
        limit_gb = float(text) if text else DEFAULT_LIMIT_GB
    except ValueError:
        limit_gb = -1.0
    if not 0.0 < limit_gb < 1e9:
        raise RequestError(f"{LIMIT_VARIABLE} must be a positive number of GB (given: {text})")
    return int(limit_gb * 1e9)


def artifact_directory(card: Card, artifact: str) -> Path:
    """Return the folder of an artifact, whether it was pulled or not."""
    return cache_root() / "models" / card.name / f"{artifact}-{_key(card, artifact)}"


def part_file(sha256: str) -> Path:
    """Return where a file is collected until it is whole."""
    return cache_root() / "parts" / f"{sha256}.part"


def touch(directory: Path) -> None:
    """Note that an artifact was asked for now; a cache that may only be read is let be."""
    with contextlib.suppress(OSError):
        os.utime(directory)


@contextlib.contextmanager
def locked(name: str, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock called ``name``; yields False where ``wait`` is off and another process holds it.

    Args:
        name: Name of the lock.
        wait: Whether to wait for it.
        on_wait: Called once if another process holds it.

    Raises:
        DownloadError: If the cache cannot be written.
        WorkError: If the file system has no locks.
    """
    from filelock import FileLock, Timeout

    path = cache_root() / "locks" / f"{name}.lock"
    lock = FileLock(str(path), thread_local=False)
    held = True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held = wait
            if wait:
                if on_wait is not None:
                    on_wait()
                lock.acquire()
    except OSError as error:
        raise write_error(error) from error
    except NotImplementedError as error:
        raise WorkError(
            f"the file system of '{cache_root()}' has no file locks", hint="Set VISIONKD_CACHE to a local folder."
        ) from error
    try:
        yield held
    finally:
        if held:
            lock.release()


def entries() -> list[Entry]:
    """Return what is in the cache, the longest unused first."""
    found = []
    root = cache_root()
    for directory in root.glob("models/*/*"):
        if directory.is_dir():
            found.append(_entry("" if directory.name.startswith(".") else directory.parent.name, directory))
    for part in root.glob("parts/*"):
        found.append(_entry("", part))
    return sorted(found, key=lambda entry: (entry.used_at, str(entry.path)))


def prune(limit: int | None = None, *, keep: Path | None = None, even_recent: bool = False) -> list[Entry]:
    """Remove the longest unused models until the cache is no larger than ``limit``.

    What another process is pulling is let be, and what was asked for within the last hour unless ``even_recent``.

    Args:
        limit: Bytes that may stay; None takes :func:`limit_bytes`, 0 empties the cache.
        keep: A folder that stays in any case.
        even_recent: Remove also what was asked for a moment ago.

    Returns:
        What was removed.
    """
    limit = limit_bytes() if limit is None else limit
    present = entries()
    total = sum(entry.size_bytes for entry in present)
    removed = []
    for entry in present:
        if total <= limit:
            break
        if entry.path == keep or (not even_recent and time.time() - entry.used_at < _IN_USE_S):
            continue
        if _remove(entry):
            removed.append(entry)
            total -= entry.size_bytes
    return removed


def write_error(error: OSError) -> DownloadError:
    """Return what it means that the cache cannot be written."""
    return DownloadError(
        f"the zoo's cache '{cache_root()}' cannot be written: {(error.strerror or str(error)).lower()}",
        hint="Make room (visionkd zoo prune), or set VISIONKD_CACHE to a folder with room that you may write to.",
    )


def discard(path: Path) -> None:
    """Remove a folder in one step, so that nobody meets half of it."""
    aside = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.{time.monotonic_ns()}.removed")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def lock_name(directory: Path) -> str:
    """Return the name of the lock of an artifact's folder."""
    return f"{directory.parent.name}.{directory.name}"


def _remove(entry: Entry) -> bool:
    left = _LEFT.match(entry.path.name)
    if left is not None:
        name = lock_name(entry.path.with_name(left[1]))
    else:
        name = lock_name(entry.path) if entry.model else entry.path.name.partition(".")[0]
    with locked(name, wait=False) as free:
        if not free:
            return False
        try:
            if entry.path.is_dir():
                discard(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise WorkError(f"'{entry.path}' cannot be removed: {(error.strerror or str(error)).lower()}") from error
    return True


def _entry(model: str, path: Path) -> Entry:
    files = path.rglob("*") if path.is_dir() else [path]
    size = 0
    for file in files:
        with contextlib.suppress(OSError):  # removed meanwhile
            size += file.stat().st_size if file.is_file() else 0
    try:
        used_at = path.stat().st_mtime
    except OSError:
        used_at = 0.0
    return Entry(model, path.name, path, size, used_at)


def _key(card: Card, artifact: str) -> str:
    found = card.artifacts[artifact]
    parts = {"format": found.format, "files": [(file.name, file.sha256) for file in found.files]}
    if isinstance(found, CheckpointArtifact):  # what the package is made from beside the file
        chosen = ("architecture", "preprocessing", "classes", "num_classes", "task")
        parts |= {"card": card.model_dump(mode="json", include=set(chosen)), "keys": found.keys, "by": _CONVERSION}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
