"""What a process appends to while it computes labels, until it is merged into shards. No torch here.

What a SIGKILL, a power cut or a full disk left of a batch fails its checksum and counts for nothing.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from visionkd.teachers._shards import RowFormat

_BATCH = -1  # the view of a record that announces a batch


class Journal:
    """What one process appends labels to, a batch at a time.

    A batch of n labels is n + 1 records of the same size. The first one announces it: its view is -1, its index n, its
    check the CRC-32 of n and of the n records.

    Args:
        path: A new file.
        fmt: Format of the rows.
    """

    def __init__(self, path: Path, fmt: RowFormat) -> None:
        self.path = path
        self.fmt = fmt
        self.size = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)

    def append(self, indices: np.ndarray, views: np.ndarray | int, rows: np.ndarray) -> None:
        """Add a batch, completely or not at all.

        Args:
            indices: n sample indices.
            views: n view numbers, or one for all.
            rows: n opaque rows.

        Raises:
            OSError: If it cannot be written, as on a full disk.
        """
        records = np.zeros(len(rows) + 1, dtype=self.fmt.record)
        records["index"][1:], records["view"][1:], records["row"][1:] = indices, views, rows
        records["index"][0], records["view"][0] = len(rows), _BATCH
        records["check"][0] = _batch_check(records[1:])
        content = memoryview(records.view(np.uint8))
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except BaseException:
            os.ftruncate(self._file, self.size)
            raise
        self.size += records.nbytes

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _batch_check(records: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(records).view(np.uint8), zlib.crc32(struct.pack("<q", len(records))))


def read_journal(path: Path, fmt: RowFormat) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Map a journal.

    Args:
        path: The file.
        fmt: Format of the rows.

    Returns:
        Its records, mapped, and the start and end of each sound batch among them. Nothing after a batch that fails its
        checksum counts.
    """
    count = path.stat().st_size // fmt.record.itemsize
    if not count:
        return np.zeros(0, dtype=fmt.record), []
    records: np.ndarray = np.memmap(path, dtype=fmt.record, mode="r", shape=(count,)).view(np.ndarray)
    batches, place = [], 0
    while place < count:
        number, view, check, _ = records[place].item()
        start, end = place + 1, place + 1 + number
        if view != _BATCH or number < 1 or end > count or _batch_check(records[start:end]) != check:
            break
        batches.append((start, end))
        place = end
    return records, batches


class Merger:
    """Brings what journals hold into the order of shards. It takes 8 bytes of memory for each label, and twice a shard.

    Args:
        journals: Files, the oldest first.
        fmt: Format of the rows.
        num_samples: Samples; labels of others are passed over.
        shard_rows: Samples of a block.
    """

    def __init__(self, journals: Iterable[Path], fmt: RowFormat, *, num_samples: int, shard_rows: int) -> None:
        self.fmt = fmt
        self._blocks_of_view = -(-num_samples // shard_rows)
        self._shard_rows = shard_rows
        self._sources: list[tuple[np.ndarray, np.ndarray]] = []  # records, and the shard of each; -1: no label
        for journal in journals:
            records, batches = read_journal(journal, fmt)
            shards = np.full(len(records), -1, dtype=np.int64)
            for start, end in batches:
                index, view = records["index"][start:end], records["view"][start:end].astype(np.int64)
                valid = (index >= 0) & (index < num_samples) & (view >= 0)
                shards[start:end] = np.where(valid, view * self._blocks_of_view + index // shard_rows, -1)
            self._sources.append((records, shards))

    def __len__(self) -> int:
        """Number of labels, repeated ones included."""
        return sum(int(np.count_nonzero(shards >= 0)) for _, shards in self._sources)

    def shards(self) -> list[tuple[int, int]]:
        """View and block of every shard that something is to be merged into, in order."""
        found = {int(shard) for _, shards in self._sources for shard in _distinct(shards) if shard >= 0}
        return [divmod(shard, self._blocks_of_view) for shard in sorted(found)]

    def block(self, view: int, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what is to be merged into one shard: samples within the block, and their opaque rows.

        A later row counts where a sample is repeated, within a part and between parts.
        """
        for records, shards in self._sources:
            positions = np.flatnonzero(shards == view * self._blocks_of_view + block)
            if len(positions):
                chosen = records.view(f"V{self.fmt.record.itemsize}").take(positions).view(self.fmt.record)
                yield chosen["index"] - block * self._shard_rows, chosen["row"]


def _distinct(values: np.ndarray, *, step: int = 1 << 16) -> set[int]:
    """Return the different values, without the sorted copy that np.unique makes of all of them."""
    return {int(value) for start in range(0, len(values), step) for value in np.unique(values[start : start + step])}
