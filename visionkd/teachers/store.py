"""The label store: the teachers' averaged probabilities for each view of each sample, kept on disk.

What is read lies in shards, which are complete or absent and mapped into memory. What a run computes is appended to a
journal and merged into shards by :meth:`LabelStore.commit`. A run may be killed at any moment, and several may fill one
store at once: labels whose batch was written completely are kept, and all others are as if never computed. The files
are described in docs/label_store.md; :mod:`visionkd.teachers.store_admin` lists, verifies and removes stores.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from visionkd.errors import Problem, RequestError, WorkError
from visionkd.teachers._journal import Journal, Merger
from visionkd.teachers._locking import Session, locked, unowned
from visionkd.teachers._manifest import (
    MANIFEST,
    Manifest,
    differences,
    labels_root,
    nearest_store,
    read_manifest,
    refuse,
    store_path,
)
from visionkd.teachers._shard_map import ShardMap, Stamp, stamp_of
from visionkd.teachers._shards import HEADER_BYTES, DamagedError, RowFormat, Storage, shard_name, write_shard
from visionkd.teachers.stored_labels import StoredLabels, decode, encode

__all__ = ["LabelStore", "StoredLabels", "estimate_bytes", "labels_root", "nearest_store", "store_path"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OnMessage(Protocol):
    """Is told what happens; :meth:`visionkd.types.Listener.message` is one."""

    def __call__(self, text: str, *, level: Any = "info") -> None: ...


def _silent(text: str, *, level: Any = "info") -> None:
    """Tell nobody."""


class LabelStore:
    """Labels for (view, sample) pairs. Use :meth:`open`; it is a context manager.

    One process reads and writes through one instance, in its main process; loader workers do not need it.

    Attributes:
        path: Directory of the store.
        manifest: What the labels were computed from, and their format.
    """

    def __init__(self, path: Path, manifest: Manifest, session: Session | None, on_message: OnMessage) -> None:
        self.path = path
        self.manifest = manifest
        self._format = manifest.format
        self._session = session
        self._on_message = on_message
        self._journal: Journal | None = None
        self._shards = ShardMap(path, manifest, self._report)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        key: Mapping[str, Any],
        *,
        num_samples: int,
        num_classes: int,
        storage: Storage = "full",
        top_k: int = 10,
        read_only: bool = False,
        about: Mapping[str, Any] | None = None,
        on_message: OnMessage = _silent,
    ) -> LabelStore:
        """Open a store, or make one. Labels that a killed run had computed are taken over.

        Args:
            path: Directory, as from :func:`store_path`.
            key: Nested JSON of all that decides the labels: teachers, data, augmentation, library versions.
            num_samples: Samples of the training set.
            num_classes: C.
            storage: ``full`` keeps all classes in float32, ``top_k`` the most probable ones in float16.
            top_k: Classes that ``top_k`` keeps; all where there are fewer.
            read_only: Read an existing store and change nothing.
            about: Names of ``teachers`` (a list) and ``data`` for people. They are not compared.
            on_message: Is told of damage and of labels taken over.

        Raises:
            RequestError: If there is a store with another key, with each part that differs; if it cannot be read, is of
                a newer format, or the directory holds other files.
            WorkError: If the disk is full.
        """
        directory = Path(path).expanduser()
        fmt = _row_format(num_classes, storage, top_k)
        if num_samples < 1 or num_classes < 1 or fmt.k < 1:
            raise ValueError(f"a store for {num_samples} samples, {num_classes} classes, top {top_k}")
        wanted = Manifest(key, num_samples, fmt, fmt.shard_rows, about or {})
        if read_only:
            store = cls(directory, _matching(directory, wanted), None, on_message)
            store.refresh()
            return store
        _check_place(directory)
        with _explaining(directory, bytes_needed=estimate_bytes(num_samples, num_classes, storage, top_k)):
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory):
                if not (directory / MANIFEST).exists():
                    wanted.write(directory)
                manifest = _matching(directory, wanted)
                os.utime(directory / MANIFEST)  # tells when the store was last used
                session = Session(directory, secrets.token_hex(6))
        store = cls(directory, manifest, session, on_message)
        try:
            taken_over = store._merge()
            store.refresh()
        except BaseException:
            store.close()
            raise
        if taken_over:
            on_message(
                f"{taken_over:,} labels that an earlier run had left unmerged were added to the label store {directory}"
            )
        return store

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bytes_per_label(self) -> int:
        """Bytes that a view of a sample takes."""
        return self._format.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return self._shards.nbytes

    @property
    def views(self) -> tuple[int, ...]:
        """Views that have labels."""
        return self._shards.views

    def count(self, view: int) -> int:
        """Return how many samples have a label for a view, as the shards say that were seen last."""
        return self._shards.count(view)

    def missing(self, view: int) -> np.ndarray:
        """Return the samples without a label for a view, in order, int64."""
        return self._shards.missing(view)

    def read(self, indices: Tensor, views: Tensor | int) -> StoredLabels:
        """Read labels, in any order, repeated ones too. What this process wrote is there once it is committed.

        Args:
            indices: B sample indices, int64 on the CPU.
            views: B view numbers, or one for all.

        Raises:
            IndexError: If there is no such sample or view.
        """
        index, view = self._positions(indices, views)
        return decode(self._shards.take(view, index), self._format)

    def write(self, indices: Tensor, views: Tensor | int, probs: Tensor) -> StoredLabels:
        """Keep labels until the next :meth:`commit`; those of earlier batches survive whatever ends this process.

        Args:
            indices: B sample indices, int64 on the CPU.
            views: B view numbers, or one for all.
            probs: B x C on any device; rows sum to 1.

        Returns:
            The labels on the CPU, exactly as they will be read: a run that trains on these is the same whether a label
            was computed or read.

        Raises:
            IndexError: If there is no such sample or view.
            WorkError: If the disk is full, or a probability is not finite.
        """
        session = self._writer()
        index, view = self._positions(indices, views)
        rows = encode(probs, self._format)
        if len(rows) != len(index):
            raise ValueError(f"{len(rows)} labels for {len(index)} samples")
        if len(rows):
            with _explaining(self.path, bytes_needed=self._needed()):
                if self._journal is None:
                    self._journal = Journal(session.journal, self._format)
                self._journal.append(index, view, rows)
        return decode(rows, self._format)

    def seal(self) -> None:
        """Give up what was written, so that whoever commits next merges it, this process or another.

        With several processes it saves writing each shard once for each of them: all seal, one commits, all refresh.
        """
        if self._journal is not None:
            self._journal.close()
            self._journal = None
            with _explaining(self.path, bytes_needed=0):
                self._writer().seal()

    def commit(self) -> int:
        """Merge what this process wrote, and what nobody writes to any more, into shards.

        Returns:
            How many labels were merged.

        Raises:
            WorkError: If the disk is full. What was written is kept for a later commit.
        """
        self._writer()
        self.seal()
        merged = self._merge()
        self.refresh()
        return merged

    def refresh(self) -> None:
        """Look for shards that others have committed."""
        with _explaining(self.path, bytes_needed=0):
            self._shards.refresh()

    def close(self) -> None:
        """Leave what was written and not committed to the next one who opens the store, and let go of all files."""
        self._shards.clear()
        if self._session is not None:
            with contextlib.suppress(WorkError, OSError):
                self.seal()
            self._session.close()
            self._session = None

    def _writer(self) -> Session:
        if self._session is None:
            raise ValueError(f"the label store {self.path} is closed, or open for reading only")
        return self._session

    def _positions(self, indices: Tensor, views: Tensor | int) -> tuple[np.ndarray, np.ndarray | int]:
        index = indices.numpy()
        view = views if isinstance(views, int) else views.numpy()
        if len(index) and (index.min() < 0 or index.max() >= self.manifest.num_samples):
            raise IndexError(f"samples {index.min()} to {index.max()} of {self.manifest.num_samples}")
        if len(index) and (view if isinstance(view, int) else view.min()) < 0:
            raise IndexError("views are counted from 0")
        return index, view

    def _needed(self) -> int:
        """Bytes that one more view takes while it is filled."""
        return self.manifest.num_samples * (self._format.record.itemsize + self._format.row_bytes)

    def _merge(self) -> int:
        own, manifest = self._writer().name, self.manifest
        with _explaining(self.path, bytes_needed=self._needed()), locked(self.path):
            with unowned(self.path, own=own) as left:
                merger = Merger(
                    left.journals, self._format, num_samples=manifest.num_samples, shard_rows=manifest.shard_rows
                )
                for view, block in merger.shards():
                    self._merge_block(merger, view, block)
                for journal in left.journals:
                    journal.unlink()
            for leftover in self.path.glob(".*.shard.*.tmp"):  # of a process that was killed in the middle
                leftover.unlink()
        return len(merger)

    def _merge_block(self, merger: Merger, view: int, block: int) -> None:
        path = self.path / shard_name(view, block)
        rows = self._format.absent(self.manifest.block_rows(block))
        try:
            rows = self._shards.load(path, view, block)
        except FileNotFoundError:
            pass
        except DamagedError as error:
            self._warn(path, str(error))
        for local, new in merger.block(view, block):
            rows[local] = new
        write_shard(path, self._format, rows, view=view, first=block * self.manifest.shard_rows)

    def _report(self, path: Path, stamp: Stamp, reason: str) -> None:
        """Say that a shard is damaged, and remove it unless somebody has replaced it since."""
        self._warn(path, reason)
        if self._session is not None:
            with locked(self.path), contextlib.suppress(FileNotFoundError):
                if stamp_of(path) == stamp:
                    path.unlink()

    def _warn(self, path: Path, reason: str) -> None:
        self._on_message(
            f"{path} is damaged ({reason}). Its labels are computed again; those of other shards are used.",
            level="warning",
        )


def estimate_bytes(num_samples: int, num_classes: int, storage: Storage = "full", top_k: int = 10) -> int:
    """Return the bytes that one view of all samples takes once it is filled."""
    fmt = _row_format(num_classes, storage, top_k)
    return num_samples * fmt.row_bytes + -(-num_samples // fmt.shard_rows) * HEADER_BYTES


def _row_format(num_classes: int, storage: Storage, top_k: int) -> RowFormat:
    return RowFormat(num_classes, storage, num_classes if storage == "full" else min(top_k, num_classes))


def _matching(directory: Path, wanted: Manifest) -> Manifest:
    manifest = read_manifest(directory)
    problems = differences(manifest.identity(), wanted.identity())
    if problems:
        raise refuse(directory, problems)
    return manifest


def _check_place(directory: Path) -> None:
    """Refuse a place that holds anything but a store."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(Problem("label_store.path", f"{directory} is a file", "Give a directory."))
    if directory.is_dir() and not (directory / MANIFEST).exists():
        others = [entry.name for entry in directory.iterdir() if not entry.name.startswith((".lock", f".{MANIFEST}"))]
        if others:
            message = f"{directory} is no label store and holds other files, such as '{min(others)}'"
            raise RequestError(Problem("label_store.path", message, "Give a new or empty directory."))


@contextlib.contextmanager
def _explaining(directory: Path, *, bytes_needed: int) -> Iterator[None]:
    """Turn a full disk, and a store that was removed meanwhile, into an error that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(directory if directory.is_dir() else Path.cwd()).free
            raise WorkError(
                f"There is no room for the label store {directory} ({error.strerror}): filling one view takes up to "
                f"{bytes_needed:,} bytes, and {free:,} are free.",
                hint="Free some space, keep labels elsewhere (VISIONKD_CACHE, or -o label_store.path=DIR), keep fewer "
                "classes of each image (-o label_store.storage=top_k), or go on without: --no-cache-teacher. "
                "Labels that were stored are kept.",
            ) from error
        if error.errno == errno.ENOENT and not directory.exists():
            raise WorkError(
                f"The label store {directory} was removed while it was in use.",
                hint="Start the run again with --resume.",
            ) from error
        raise
