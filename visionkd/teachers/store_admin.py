"""Look after label stores: list, verify and remove them. No torch here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from visionkd.errors import Problem, RequestError, WorkError, did_you_mean
from visionkd.teachers._manifest import (
    MANIFEST,
    manifest_values,
    read_manifest,
    store_directories,
)
from visionkd.teachers._shards import SHARD_NAME, DamagedError, read_header, read_shard

_OURS = re.compile(
    rf"{SHARD_NAME.pattern}|(journal|sealed)-[0-9a-f-]+\.log|session-[0-9a-f]+\.lock|\.v\d+-\d+\.shard\..*\.tmp"
    rf"|\.{re.escape(MANIFEST)}\..*\.tmp"
)
_LIST = "See 'visionkd data cache list'."


@dataclass(frozen=True)
class StoreInfo:
    """A label store at a glance.

    Attributes:
        id: Name of its directory.
        teachers: Names of the teachers.
        data: Name of the data.
        storage: ``full``, or ``top-10`` and the like; empty where a newer version wrote it.
        views: Views that have labels.
        labels: Labels in all.
        size_mb: Size of all files, in units of 10^6 bytes.
        last_used: UTC time of the last run that opened it for writing.
        path: Directory.
    """

    id: str
    teachers: tuple[str, ...]
    data: str
    storage: str
    views: int
    labels: int
    size_mb: float
    last_used: str
    path: Path


@dataclass(frozen=True)
class StoreReport:
    """What a check of a store found.

    Attributes:
        id: Name of its directory.
        shards: Shards that are sound.
        labels: Labels in these.
        damaged: Shards that are not, with the reason.
        path: Directory.
    """

    id: str
    shards: int
    labels: int
    damaged: tuple[tuple[str, str], ...]
    path: Path


def list_stores(root: Path | None = None) -> tuple[StoreInfo, ...]:
    """Return the stores of the cache, the last used first.

    Args:
        root: Where to look instead.
    """
    found = [store_info(directory) for directory in store_directories(root)]
    return tuple(sorted(found, key=lambda info: info.last_used, reverse=True))


def find_store(name: str) -> Path:
    """Return the directory of a store.

    Args:
        name: Its id, the beginning of one, or a path.

    Raises:
        RequestError: If there is none, or several begin so.
    """
    known = {directory.name: directory for directory in store_directories()}
    begin = [each for each in known if each.startswith(name)]
    if name in known or len(begin) == 1:
        return known[name if name in known else begin[0]]
    path = Path(name).expanduser()
    if manifest_values(path) is not None:
        return path
    if begin:
        raise RequestError(Problem("STORE", f"'{name}' begins the names of {', '.join(begin)}", "Write more of it."))
    what = "is no label store" if path.exists() else "is neither a label store nor a directory"
    raise RequestError(Problem("STORE", f"'{name}' {what}", f"{did_you_mean(name, known)} {_LIST}".strip()))


def store_info(directory: Path) -> StoreInfo:
    """Return what a store holds, from its manifest and the headers of its shards.

    Raises:
        RequestError: If it is no store.
    """
    values = manifest_values(directory)
    if values is None:
        raise RequestError(Problem("STORE", f"'{directory}' is no label store", _LIST))
    about = values["about"] if isinstance(values.get("about"), dict) else {}
    teachers = about.get("teachers") or ()
    kept = {"full": "full", "top_k": f"top-{values.get('top_k')}"}.get(str(values.get("storage")), "")
    views: set[int] = set()
    labels, size = 0, 0
    for file in _files(directory):
        with contextlib.suppress(OSError, DamagedError):  # it may go while we look
            size += file.stat().st_size
            if SHARD_NAME.fullmatch(file.name):
                header = read_header(file)
                views.add(header.view)
                labels += header.present
    used = datetime.fromtimestamp((directory / MANIFEST).stat().st_mtime, timezone.utc)
    return StoreInfo(
        id=directory.name,
        teachers=(teachers,) if isinstance(teachers, str) else tuple(map(str, teachers)),
        data=str(about.get("data") or ""),
        storage=kept,
        views=len(views),
        labels=labels,
        size_mb=size / 1e6,
        last_used=used.strftime("%Y-%m-%dT%H:%M:%SZ"),
        path=directory,
    )


def unused(stores: Sequence[StoreInfo], *, days: float) -> tuple[StoreInfo, ...]:
    """Return the stores that no run has opened for so many days."""
    limit = (datetime.now(timezone.utc) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return tuple(store for store in stores if store.last_used <= limit)


def verify_store(directory: Path, *, progress: Callable[[int, int], None] | None = None) -> StoreReport:
    """Read every shard of a store and compare it with its checksum. Nothing is changed.

    Args:
        directory: The store.
        progress: Is told shards done and shards in all.

    Raises:
        RequestError: If it is no store.
    """
    manifest = read_manifest(directory)
    files = sorted(file for file in _files(directory) if SHARD_NAME.fullmatch(file.name))
    shards, labels, damaged = 0, 0, []
    for done, file in enumerate(files, 1):
        try:
            header, _ = read_shard(file)
            if header.row_bytes != manifest.format.row_bytes:
                raise DamagedError("its header belongs to another store")
            shards, labels = shards + 1, labels + header.present
        except FileNotFoundError:  # a run found it damaged meanwhile
            pass
        except (DamagedError, OSError) as error:
            damaged.append((file.name, str(error)))
        if progress is not None:
            progress(done, len(files))
    return StoreReport(directory.name, shards, labels, tuple(damaged), directory)


def remove_store(directory: Path) -> StoreInfo:
    """Delete a store: its own files, and its directory where nothing else is in it.

    Returns:
        What was removed.

    Raises:
        RequestError: If it is no store.
        WorkError: If a process has it open.
    """
    from visionkd.teachers._locking import locked, unowned

    info = store_info(directory)
    with locked(directory):
        with unowned(directory) as left:
            if left.in_use:
                raise WorkError(
                    f"The label store {directory} is in use by another process.", hint="Remove it when that has ended."
                )
            for file in _files(directory):
                file.unlink(missing_ok=True)
        (directory / MANIFEST).unlink()  # last: what is left of a removal that was interrupted is still a store
        (directory / ".lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()
    return info


def _files(directory: Path) -> list[Path]:
    """Return the files of a store except its manifest and its lock."""
    return [file for file in directory.iterdir() if file.name != ".lock" and _OURS.fullmatch(file.name)]
