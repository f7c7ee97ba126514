"""Files that are either complete or absent, whenever the process dies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` when the block ends well, remove it otherwise."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes the file private; give it the rights of any other file
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error  # nobody knows the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Create an empty file beside ``path``; what forbids it is said of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    return Path(name)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail where ``path`` could not be written, before the work whose result it is to hold; nothing is left behind.

    Raises:
        OSError: With ``path`` or the directory above it that cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    missing = []
    for folder in path.parents:
        if folder.exists():
            break
        missing.append(folder)
    try:
        _temporary(path).unlink()
    finally:
        for folder in missing:  # the innermost one first
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8, atomically."""
    write_bytes(path, content.encode())


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
