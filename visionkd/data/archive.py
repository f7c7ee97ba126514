"""Images inside a tar or zip, read in place: nothing is ever extracted.

Members are found by their byte range and read with ``pread``, which moves no file position, so one open file serves
all threads and all forked loader processes. A compressed tar has no byte ranges: it is decompressed once, as a plain
tar, into the cache folder.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from visionkd.data.boxes import BoxOptions
from visionkd.data.detection import open_boxes
from visionkd.data.folder import Names
from visionkd.data.layout import UNLABELED, Labels, Opened, fingerprint, read_layout
from visionkd.data.segmentation import DenseOptions, open_dense
from visionkd.errors import DataError, UnreadableImageError
from visionkd.files import replacing
from visionkd.runtime.images import decode_rgb

_TAR, _STORED, _DEFLATED, _BZIP2 = -1, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2
_MAX_MEMBER_BYTES = 1 << 30
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ENCRYPTED = 1
_KNOWN_METHODS = (_STORED, _DEFLATED, _BZIP2)


def cache_root() -> Path:
    """Where downloaded and decompressed data is kept: ``$VISIONKD_CACHE/data`` or ``~/.cache/visionkd/data``."""
    root = os.environ.get("VISIONKD_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "visionkd") / "data"


@dataclass(frozen=True)
class _Member:
    """One file in an archive: where its bytes are, and how they are packed."""

    name: str
    offset: int
    packed: int
    size: int
    method: int
    crc: int
    stamp: int  # CRC of a zip member, time of change of a tar member: both travel with the archive


class ArchiveSource:
    """Image files inside an archive.

    Args:
        path: Plain tar or zip.
        members: Where each sample lies.
        targets: Class indices, one for each.
        empty_classes: Class folders without an image, for ``data check``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        members: Sequence[_Member],
        targets: Sequence[int],
        empty_classes: Sequence[str] = (),
    ) -> None:
        self.path = os.path.abspath(path)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.empty_classes = tuple(empty_classes)
        self._names = Names([member.name for member in members])
        self._table = np.array(
            [(m.offset, m.packed, m.size, m.method, m.crc) for m in members], dtype=np.int64
        ).reshape(-1, 5)
        # Opened here rather than at the first read: several threads may read first. Loader processes inherit it.
        self._file: int | None = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)
            self._file = None

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), name=self._names[index])

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        """Return the member's content; raises UnreadableImageError."""
        offset, packed, size, method, crc = self._table[index].tolist()
        try:
            if self._file is None:
                self._file = self._open()
            if method != _TAR:
                offset += self._header_size(offset)
            content = _unpack(os.pread(self._file, packed, offset), method, size)
        except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UnreadableImageError(f"cannot read '{self._names[index]}' in '{self.path}': {reason}") from error
        if len(content) != size or (method != _TAR and zlib.crc32(content) != crc):
            raise UnreadableImageError(f"cannot read '{self._names[index]}': its bytes in '{self.path}' are damaged")
        return content

    def _header_size(self, offset: int) -> int:
        """Length of a zip member's own header, which may differ from that of its entry in the table of contents."""
        header = os.pread(self._file, 30, offset)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("no member starts where the table of contents says")
        name, extra = struct.unpack("<HH", header[26:30])
        return 30 + name + extra


def _unpack(content: bytes, method: int, size: int) -> bytes:
    """Decompress, to ``size`` bytes at most and whatever a hostile member expands to."""
    if method == _DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(size, 1))
    if method == _BZIP2:
        return bz2.BZ2Decompressor().decompress(content, max(size, 1))
    return content


def open_archive(
    path: str | os.PathLike[str],
    *,
    labels: Labels = "required",
    dense: DenseOptions | None = None,
    boxes: BoxOptions | None = None,
) -> Opened:
    """Open a tar, compressed tar or zip of classes, of splits of classes, or of pictures with maps of classes or
    with boxes.

    Args:
        path: The archive.
        labels: What to do without class folders; see :func:`visionkd.data.layout.read_layout`.
        dense: What the settings say about maps; None takes none.
        boxes: What the settings say about boxes; None takes none.

    Raises:
        DataError: If it is no archive, is damaged, or holds no usable images.
        RequestError: If it holds data for another task.
    """
    where = os.fspath(path)
    name = os.path.basename(where)
    try:
        with open(where, "rb") as file:
            magic = file.read(8)
        if magic.startswith(b"PK"):
            members, folders, left_out = _list_zip(where)
        else:
            opener = next((opener for start, opener in _COMPRESSED.items() if magic.startswith(start)), None)
            if opener is not None:
                where = os.fspath(_decompressed(Path(where), opener))
            members, folders, left_out = _list_tar(where)
    except OSError as error:
        if error.strerror is None:  # gzip, bz2 and lzma report bad bytes this way
            raise _not_an_archive(path, error) from error
        raise DataError(f"cannot read '{path}': {error.strerror.lower()}") from error
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, ValueError, zlib.error) as error:
        raise _not_an_archive(path, error) from error
    name = re.sub(r"(\.tar)?\.\w{2,4}$", "", name) or name
    said = f"{left_out} members are left out: links, encrypted, oversized or named outside the archive."
    notes = (said,) if left_out else ()
    names = [member.name for member in members]

    def make(indices: np.ndarray) -> ArchiveSource:
        return ArchiveSource(where, [members[index] for index in indices], np.full(len(indices), UNLABELED))

    stamps, opened = [(member.size, member.stamp) for member in members], None
    if dense is not None:
        opened = open_dense(
            names, sorted(folders), where=os.fspath(path), name=name, make=make, stamps=stamps, options=dense
        )
    if opened is None and boxes is not None:
        opened = open_boxes(names, where=os.fspath(path), name=name, make=make, stamps=stamps, options=boxes)
    if opened is not None:
        return replace(opened, messages=(*opened.messages, *notes))
    layout = read_layout(names, folders, where=os.fspath(path), labels=labels)
    sources, parts = {}, []
    for split, found in layout.splits.items():
        chosen = [members[index] for index in found.members]
        sources[split] = ArchiveSource(where, chosen, found.targets, found.empty_classes)
        listing = "\n".join(f"{member.name}\t{member.size}\t{member.stamp}" for member in chosen)
        parts += [split.encode(), os.fsencode(listing)]
    return Opened(
        name=name,
        classes=layout.classes,
        sources=sources,
        fingerprint=fingerprint(parts),
        messages=(*layout.messages, *notes),
    )


def _not_an_archive(path: str | os.PathLike[str], error: Exception) -> DataError:
    return DataError(
        f"'{os.fspath(path)}' is not an archive that can be read: {error}",
        hint="Give a directory, or a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip that is complete.",
    )


def _safe(name: str) -> str | None:
    """The member's name in plain form, or None if it points outside the archive."""
    name = name.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
        return None
    name = posixpath.normpath(name)
    return None if name == "." else name


def _parents(names: Sequence[str]) -> set[str]:
    """All folders that lead to ``names``: archives need not list them."""
    folders: set[str] = set()
    for name in names:
        while (name := posixpath.dirname(name)) and name not in folders:
            folders.add(name)
    return folders


def _list_tar(path: str) -> tuple[list[_Member], set[str], int]:
    members, folders, left_out = [], set(), 0
    end = os.path.getsize(path)
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            name = _safe(info.name)
            if name is None:
                left_out += info.name.strip("./") != ""
            elif info.isdir():
                folders.add(name)
            elif not info.isreg() or info.issparse() or info.size > _MAX_MEMBER_BYTES:
                left_out += 1
            else:
                if info.offset_data + info.size > end:
                    raise tarfile.ReadError("it ends in the middle of a member")
                members.append(_Member(name, info.offset_data, info.size, info.size, _TAR, 0, int(info.mtime)))
            # The archive would otherwise keep every header it has seen.
            archive.members.clear()
        # tarfile takes a missing or incomplete header for the end. The true end is a block of zeros.
        if archive.offset + tarfile.BLOCKSIZE > end:
            raise tarfile.ReadError("it has no end mark, so it was cut off")
    return _listed(members, folders, left_out)


def _list_zip(path: str) -> tuple[list[_Member], set[str], int]:
    members, folders, left_out = [], set(), 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _safe(info.filename)
            if name is None:
                left_out += 1
            elif info.is_dir():
                folders.add(name)
            elif (
                info.flag_bits & _ENCRYPTED
                or info.compress_type not in _KNOWN_METHODS
                or info.file_size > _MAX_MEMBER_BYTES
                or stat.S_ISLNK(info.external_attr >> 16)
            ):
                left_out += 1
            else:
                place = (info.header_offset, info.compress_size, info.file_size, info.compress_type)
                members.append(_Member(name, *place, crc=info.CRC, stamp=info.CRC))
    return _listed(members, folders, left_out)


def _listed(members: list[_Member], folders: set[str], left_out: int) -> tuple[list[_Member], set[str], int]:
    """Sort, and keep the last of several members of one name, which is what unpacking would leave."""
    members = sorted({member.name: member for member in members}.values(), key=lambda member: member.name)
    return members, folders | _parents([member.name for member in members]), left_out


def _decompressed(path: Path, opener) -> Path:
    """Decompress a tar into the cache, unless it is there already; returns the plain tar."""
    info = path.stat()
    key = fingerprint([os.fsencode(path.resolve()), str((info.st_size, info.st_mtime_ns)).encode()])[:16]
    plain = cache_root() / "archives" / f"{path.name.split('.')[0]}-{key}.tar"
    if plain.exists():
        return plain
    with opener(path, "rb") as packed:
        # Look before the work: a compressed file that is no tar would otherwise be unpacked to the end first.
        with tarfile.open(fileobj=packed, mode="r|") as archive:
            archive.next()
    try:
        with replacing(plain) as temporary, opener(path, "rb") as packed, open(temporary, "wb") as target:
            while chunk := packed.read(1 << 20):
                target.write(chunk)
    except OSError as error:
        if error.strerror is None:
            raise
        raise DataError(
            f"cannot decompress '{path}' into '{plain.parent}': {error.strerror.lower()}",
            hint="Unpack it yourself and give the directory, or set VISIONKD_CACHE to a folder with more room.",
        ) from error
    return plain
