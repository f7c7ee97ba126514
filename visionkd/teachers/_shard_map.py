"""The shards of a store as one process sees them: found, checked the first time they are read, mapped into memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from visionkd.teachers._manifest import Manifest
from visionkd.teachers._shards import HEADER_BYTES, SHARD_NAME, DamagedError, ShardHeader, read_header, read_shard

Stamp = tuple[int, int, int]


@dataclass
class _Shard:
    """A shard that was seen on disk; ``rows`` are its opaque rows, once mapped."""

    path: Path
    stamp: Stamp
    header: ShardHeader
    rows: np.ndarray | None = None


class ShardMap:
    """Opaque rows by view and sample.

    A shard that is replaced on disk stays readable as it was until :meth:`refresh`.

    Args:
        directory: The store.
        manifest: Its manifest.
        on_damage: Is told the path, the stamp (see :func:`stamp_of`) and the reason where a shard is damaged.
    """

    def __init__(self, directory: Path, manifest: Manifest, on_damage: Callable[[Path, Stamp, str], None]) -> None:
        self._directory = directory
        self._manifest = manifest
        self._format = manifest.format
        self._on_damage = on_damage
        self._shards: dict[int, _Shard] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.header.size for shard in self._shards.values())

    @property
    def views(self) -> tuple[int, ...]:
        """Views that have a shard."""
        return tuple(sorted({shard.header.view for shard in self._shards.values()}))

    def count(self, view: int) -> int:
        """Return the labels of a view, as the headers say."""
        return sum(shard.header.present for shard in self._shards.values() if shard.header.view == view)

    def clear(self) -> None:
        self._shards.clear()

    def refresh(self) -> None:
        """Look for shards that were added or replaced."""
        found: dict[int, _Shard] = {}
        damaged: list[tuple[Path, Stamp, str]] = []
        with os.scandir(self._directory) as entries:
            names = [match for entry in entries if (match := SHARD_NAME.fullmatch(entry.name))]
        for name in names:
            view, block = int(name[1]), int(name[2])
            path, number = self._directory / name[0], view * self._manifest.blocks + block
            if block >= self._manifest.blocks:
                continue
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                stamp, known = stamp_of(path), self._shards.get(number)
                if known is not None and known.stamp == stamp:
                    found[number] = known
                    continue
                try:
                    found[number] = _Shard(path, stamp, self._checked(read_header(path), view, block))
                except DamagedError as error:
                    damaged.append((path, stamp, str(error)))
        self._shards = found
        for each in damaged:
            self._on_damage(*each)

    def rows(self, number: int) -> np.ndarray | None:
        """Return all rows of shard ``view * blocks + block``; None where there is none, or it turns out damaged."""
        shard = self._shards.get(number)
        if shard is None:
            return None
        if shard.rows is None:
            try:
                shard.rows = self._map(shard, *divmod(number, self._manifest.blocks))
            except (DamagedError, RuntimeError) as error:
                del self._shards[number]
                if shard.path.exists():
                    self._on_damage(shard.path, shard.stamp, str(error))
                return None
        return shard.rows

    def _map(self, shard: _Shard, view: int, block: int) -> np.ndarray:
        # Unlike mmap and np.memmap, this keeps no file open: there may be thousands of shards.
        mapped = torch.from_file(str(shard.path), shared=False, size=shard.header.size, dtype=torch.uint8)
        content = mapped.numpy()
        shard.header = self._checked(ShardHeader.unpack(content[:HEADER_BYTES].tobytes(), len(content)), view, block)
        shard.header.check_payload(content[HEADER_BYTES:])
        return content[HEADER_BYTES:].view(self._format.row)

    def take(self, view: np.ndarray | int, index: np.ndarray) -> np.ndarray:
        """Return the rows of samples, in their order; absent ones too.

        Args:
            view: B view numbers, or one for all.
            index: B sample indices, int64.
        """
        block, local = np.divmod(index, self._manifest.shard_rows)
        shards = view * self._manifest.blocks + block
        count = len(index)
        if not count or (shards == shards[0]).all():
            return self._take(int(shards[0]) if count else -1, local)
        order = shards.argsort(kind="stable")
        shards, local = shards[order], local[order]
        starts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), count]
        parts = [self._take(int(shards[a]), local[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
        place = np.empty_like(order)
        place[order] = np.arange(count)
        return np.concatenate(parts).take(place)

    def _take(self, number: int, local: np.ndarray) -> np.ndarray:
        rows = self.rows(number)
        return self._format.absent(len(local)) if rows is None else rows.take(local)

    def missing(self, view: int) -> np.ndarray:
        """Return the samples without a label for a view, in order, int64."""
        parts = []
        for block in range(self._manifest.blocks):
            rows = self.rows(view * self._manifest.blocks + block)
            absent = np.ones(self._manifest.block_rows(block), bool) if rows is None else ~self._format.present(rows)
            parts.append(block * self._manifest.shard_rows + np.flatnonzero(absent))
        return np.concatenate(parts)

    def load(self, path: Path, view: int, block: int) -> np.ndarray:
        """Return a copy of all rows of a shard, as it is on disk now.

        Raises:
            DamagedError: If it is not what was written.
            FileNotFoundError: If there is none.
        """
        header, payload = read_shard(path)
        self._checked(header, view, block)
        return payload.view(self._format.row)

    def _checked(self, header: ShardHeader, view: int, block: int) -> ShardHeader:
        expected = (view, block * self._manifest.shard_rows, self._manifest.block_rows(block), self._format.row_bytes)
        if (header.view, header.first, header.rows, header.row_bytes) != expected:
            raise DamagedError("its header belongs to another shard")
        return header


def stamp_of(path: Path) -> Stamp:
    """Return what changes when a file is replaced.

    Raises:
        FileNotFoundError: If it has gone.
    """
    info = path.stat()
    return info.st_ino, info.st_size, info.st_mtime_ns
