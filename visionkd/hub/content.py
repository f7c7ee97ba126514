"""A look at a fetched file before it is kept: is it what its name says, and can it do no harm? No torch.

The SHA-256 shows that it is the file that the card means; this shows that the card means nothing evil.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from visionkd.errors import DataError, RequestError
from visionkd.runtime.onnx_file import read_onnx_file

_MAX_JSON_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100 << 20
_PICKLE = b"\x80"  # the first byte of every pickle since protocol 2
_ZIP = b"PK\x03\x04"


def check_content(path: Path, name: str) -> None:
    """Refuse a file whose content is not what ``name`` says, or that unpacks to more than it is.

    Args:
        path: The file, under any name.
        name: What it will be called; its suffix decides.

    Raises:
        DataError: If it is to be refused; nothing of it was run or unpacked.
    """
    suffix = PurePosixPath(name).suffix
    with open(path, "rb") as file:
        first = file.read(8)
    if suffix in (".pth", ".pt", ".bin"):
        if first.startswith(_ZIP):
            _check_zip(path, name)
        return  # an old pickle of tensors: torch reads it with weights_only
    if first.startswith((_PICKLE, _ZIP)):
        kind = "a pickle, which runs code when it is read" if first.startswith(_PICKLE) else "a zip archive"
        raise DataError(f"'{name}' is {kind}, and is refused", hint=_HINT)
    check = _CHECKS.get(suffix)
    if check is None:
        raise DataError(f"'{name}' is of no kind that a model of the zoo consists of, and is refused", hint=_HINT)
    check(path, name)


def _check_zip(path: Path, name: str) -> None:
    """torch packs its tensors uncompressed; a member that is compressed, or climbs, was made by something else."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"'{name}' is not a whole weight file: {error}", hint=_HINT) from error
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts:
            raise DataError(
                f"'{name}' holds the path '{member.filename}', which climbs out, and is refused", hint=_HINT
            )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > size
    ):
        raise DataError(f"'{name}' would unpack to more than it is (a zip bomb), and is refused", hint=_HINT)


def _check_safetensors(path: Path, name: str) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise DataError(f"'{name}' is not a safetensors file, and is refused", hint=_HINT)
        header = file.read(length)
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0) == size
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DataError(f"'{name}' is not a whole safetensors file, and is refused", hint=_HINT)


def _check_onnx(path: Path, name: str) -> None:
    try:
        found = read_onnx_file(path)
    except (DataError, RequestError) as error:
        raise DataError(f"'{name}' is not a whole ONNX file, and is refused", hint=_HINT) from error
    if found.has_external_data:
        raise DataError(f"'{name}' reads weights from other files, and is refused", hint=_HINT)


def _check_json(path: Path, name: str) -> None:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError("it is longer than 16 MB")
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{name}' is not a JSON file, and is refused: {error}", hint=_HINT) from error


def _check_text(path: Path, name: str) -> None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"'{name}' is not a text file, and is refused", hint=_HINT) from error


_HINT = "Tell whoever published the card; nothing was kept."
_CHECKS: dict[str, Callable[[Path, str], None]] = {
    ".safetensors": _check_safetensors,
    ".onnx": _check_onnx,
    ".json": _check_json,
    ".txt": _check_text,
}
