"""The bytes of a label and of a shard: the labels of one view for a block of samples. No torch here.

A shard is replaced as a whole, so it is complete or absent. docs/label_store.md describes it for other readers.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visionkd.files import replacing

Storage = Literal["full", "top_k"]
SHARD_NAME = re.compile(r"v(\d{5,})-(\d{5,})\.shard")
HEADER_BYTES = 64
_MAGIC = b"VKDLABEL"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQI")
_CHECK = struct.Struct("<I")
_SHARD_BYTES = 64 << 20
_SHARD_ROWS = 1 << 17


class DamagedError(Exception):
    """A shard is not what was written; the text says how one knows."""


@dataclass(frozen=True)
class RowFormat:
    """How the label of one view of one sample is laid out.

    ``full`` keeps C float32. ``top_k`` keeps k class indices in uint16 (uint32 above 65,536 classes), their k
    probabilities in float16 and the mass of all other classes in float16. All bits of an absent label are 1, so that
    its floats are NaN.

    Attributes:
        num_classes: C.
        storage: ``full`` or ``top_k``.
        k: Classes that are kept; C for ``full``.
    """

    num_classes: int
    storage: Storage
    k: int

    @cached_property
    def dtype(self) -> np.dtype:
        """Fields of a row."""
        if self.storage == "full":
            return np.dtype([("probs", "<f4", (self.num_classes,))])
        index = "<u2" if self.num_classes <= 1 << 16 else "<u4"
        return np.dtype([("indices", index, (self.k,)), ("values", "<f2", (self.k,)), ("rest", "<f2")])

    @cached_property
    def row(self) -> np.dtype:
        """A row as opaque bytes, which NumPy gathers several times faster than fields."""
        return np.dtype(f"V{self.dtype.itemsize}")

    @cached_property
    def record(self) -> np.dtype:
        """An entry of a journal."""
        return np.dtype([("index", "<i8"), ("view", "<i4"), ("check", "<u4"), ("row", self.row)])

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard: a power of two that makes at most 64 MiB and at most 131,072 rows."""
        return max(1, min(_SHARD_ROWS, 1 << (max(1, _SHARD_BYTES // self.row_bytes).bit_length() - 1)))

    def absent(self, count: int) -> np.ndarray:
        """Return ``count`` rows that hold no label, as opaque bytes."""
        return np.full(count * self.row_bytes, 0xFF, dtype=np.uint8).view(self.row)

    def present(self, rows: np.ndarray) -> np.ndarray:
        """Tell which of the opaque ``rows`` hold a label."""
        fields = rows.view(self.dtype)
        return ~np.isnan(fields["probs"][:, 0] if self.storage == "full" else fields["rest"])


@dataclass(frozen=True)
class ShardHeader:
    """The first 64 bytes of a shard.

    Attributes:
        view: View number.
        first: Index of the first sample.
        rows: Samples of the block.
        present: How many of them have a label.
        row_bytes: Bytes of a label.
        crc: CRC-32 of everything after the header.
    """

    view: int
    first: int
    rows: int
    present: int
    row_bytes: int
    crc: int

    def pack(self) -> bytes:
        head = _HEADER.pack(_MAGIC, _VERSION, self.row_bytes, self.view, self.first, self.rows, self.present, self.crc)
        return (head + _CHECK.pack(zlib.crc32(head))).ljust(HEADER_BYTES, b"\0")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + self.rows * self.row_bytes

    @classmethod
    def unpack(cls, content: bytes, size: int) -> ShardHeader:
        """Read a header.

        Args:
            content: The first 64 bytes.
            size: Size of the file.

        Raises:
            DamagedError: If it is no header, or the file is not as long as it says.
        """
        head, check = content[: _HEADER.size], content[_HEADER.size : _HEADER.size + _CHECK.size]
        if len(content) < HEADER_BYTES or head[:8] != _MAGIC:
            raise DamagedError("it does not begin as a shard does")
        if _CHECK.pack(zlib.crc32(head)) != check:
            raise DamagedError("the checksum of its header does not match")
        _, version, row_bytes, view, first, rows, present, crc = _HEADER.unpack(head)
        if version != _VERSION:
            raise DamagedError(f"it is of format {version}, not {_VERSION}")
        header = cls(view=view, first=first, rows=rows, present=present, row_bytes=row_bytes, crc=crc)
        if size != header.size:
            raise DamagedError(f"it has {size:,} bytes instead of {header.size:,}")
        return header

    def check_payload(self, payload: Any) -> None:
        """Compare what follows the header with its checksum.

        Raises:
            DamagedError: If it differs.
        """
        if zlib.crc32(payload) != self.crc:
            raise DamagedError("its checksum does not match")


def shard_name(view: int, block: int) -> str:
    """Return the file name of a shard."""
    return f"v{view:05d}-{block:05d}.shard"


def write_shard(path: Path, fmt: RowFormat, rows: np.ndarray, *, view: int, first: int) -> ShardHeader:
    """Write a shard, complete or not at all.

    Args:
        path: The file.
        fmt: Format of the rows.
        rows: Opaque rows of the whole block.
        view: View number.
        first: Index of the first sample.

    Raises:
        OSError: If it cannot be written, as on a full disk; what was there before is then still there.
    """
    payload = memoryview(rows.view(np.uint8))
    present = int(np.count_nonzero(fmt.present(rows)))
    header = ShardHeader(view, first, len(rows), present, fmt.row_bytes, zlib.crc32(payload))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header.pack())
        file.write(payload)
    return header


def read_header(path: Path) -> ShardHeader:
    """Read the header of a shard and compare it with the file's name and size.

    Raises:
        DamagedError: If they do not belong together.
        FileNotFoundError: If the shard has gone.
    """
    with open(path, "rb") as file:
        content, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    header = ShardHeader.unpack(content, size)
    match = SHARD_NAME.fullmatch(path.name)
    if match is None or int(match[1]) != header.view:
        raise DamagedError(f"it is of view {header.view}, which its name does not say")
    return header


def read_shard(path: Path) -> tuple[ShardHeader, np.ndarray]:
    """Read all of a shard: its header and its bytes, checked.

    Raises:
        DamagedError: If it is not what was written.
        FileNotFoundError: If it has gone.
    """
    header = read_header(path)
    payload = np.fromfile(path, dtype=np.uint8, offset=HEADER_BYTES)
    header.check_payload(payload)
    return header, payload
