"""Reading image files: one decoder for every mode, and the search for files that a command line names."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from visionkd.errors import Problem, RequestError, UnreadableImageError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .gif .tga .jp2 .avif".split()
)
# A symbolic link to a directory is followed, and one inside that again: the usual forest of links to a data pool.
# More than that is a farm in which links multiply.
MAX_NESTED_LINKS = 3
_EXIF_KEYS = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"))
_EIGHT_BIT = frozenset(("RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV"))


class TruncatedImageError(UnreadableImageError):
    """The file ends before its image does."""


def decode_rgb(file: str | os.PathLike[str] | bytes | BinaryIO, *, name: str | None = None) -> Image.Image:
    """Decode an image as 8-bit RGB with its EXIF orientation applied.

    Transparent pixels show white, 16-bit values are scaled, the first frame of an animation is taken.

    Args:
        file: Path, the content of a file, or an open binary file.
        name: What to call the image in messages; taken from the path otherwise.

    Raises:
        TruncatedImageError: If the file is cut off.
        UnreadableImageError: If it cannot be decoded for any other reason.
    """
    if name is None:
        name = "image" if isinstance(file, bytes) else os.fspath(getattr(file, "name", "image"))
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else str(name)
    try:
        if isinstance(file, (str, os.PathLike)):
            with open(file, "rb") as opened:
                file = opened.read()
        stream = io.BytesIO(file) if isinstance(file, bytes) else file
        # Pillow asks its plugins one after the other; knowing the format beforehand halves the cost of a small image.
        image = Image.open(stream, formats=_formats(file) if isinstance(file, bytes) else None)
        image.load()
        return _to_rgb(_upright(image))
    except MemoryError:
        raise
    # Pillow's decoders meet hostile bytes with errors of many types (SyntaxError, struct.error, zlib.error ...).
    except Exception as error:
        raise unreadable(name, error) from error


def _formats(content: bytes) -> tuple[str, ...] | None:
    """Names of Pillow's plugins for the usual magic numbers; None asks them all."""
    if content.startswith(b"\xff\xd8\xff"):
        return ("JPEG",)
    return ("PNG",) if content.startswith(b"\x89PNG\r\n") else None


def unreadable(name: str, error: Exception) -> UnreadableImageError:
    """Return the error to raise where Pillow raised ``error`` over the image called ``name``."""
    if isinstance(error, Image.UnidentifiedImageError):
        return UnreadableImageError(f"cannot read '{name}': not an image, or in a format that Pillow does not know")
    if isinstance(error, OSError) and error.strerror:
        return UnreadableImageError(f"cannot read '{name}': {error.strerror.lower()}")
    reason = str(error) or type(error).__name__
    # Pillow has no type for truncation: these are the words of its JPEG, PNG and raw decoders.
    if any(word in reason.lower() for word in ("truncated", "unexpected end of file", "eof ", "not enough image data")):
        return TruncatedImageError(f"cannot read '{name}': the file is truncated ({reason})")
    return UnreadableImageError(f"cannot read '{name}': {reason}")


def _upright(image: Image.Image) -> Image.Image:
    if _EXIF_KEYS.isdisjoint(image.info):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # A broken EXIF block does not make the picture unreadable.
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            return _scaled_to_rgb(image)
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in _EIGHT_BIT:
        return image if image.mode == "RGB" else image.convert("RGB")
    return _scaled_to_rgb(image)


def _scaled_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point grey to 8 bits."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        # Floating-point files hold either shares in [0, 1] or 8-bit values.
        values = values * 255.0 if values.size and np.nanmax(values) <= 1.0 else values
    elif image.mode == "I" and values.size and values.max() > 65535:
        values = values / (2.0**31 - 1) * 255.0
    else:
        values = values / 257.0
    values = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
    return Image.fromarray(values).convert("RGB")


def is_image_name(name: str) -> bool:
    """Whether a file name looks like an image's; hidden files (``._a.jpg``, ``.DS_Store``) do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a folder is none of the user's: hidden, or left by macOS's archiver."""
    return name.startswith(".") or name == "__MACOSX"


def walk(root: str | os.PathLike[str]) -> Iterator[tuple[str, bool, int]]:
    """Walk a directory in sorted order, following symbolic links but never round a loop.

    Yields:
        Path relative to ``root`` with forward slashes, whether it is a directory, and its size in bytes (0 for those).

    Raises:
        OSError: If a directory cannot be listed; unreadable files are found out when they are decoded.
    """
    root = os.fspath(root)
    info = os.stat(root)
    yield from _walk(root, "", ((info.st_dev, info.st_ino),), 0)


def _walk(
    folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...], links: int
) -> Iterator[tuple[str, bool, int]]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = prefix + entry.name
        try:
            is_dir = entry.is_dir()
            info = entry.stat()
        except OSError:  # A link that leads nowhere, or round in a circle.
            continue
        if not is_dir:
            yield path, False, info.st_size
            continue
        nested = links + entry.is_symlink()
        key = (info.st_dev, info.st_ino)
        if is_hidden(entry.name) or key in ancestors or nested > MAX_NESTED_LINKS:
            continue
        yield path, True, 0
        yield from _walk(entry.path, path + "/", (*ancestors, key), nested)


def find_images(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the image files that ``paths`` name, each once and in the order given.

    Args:
        paths: Files (of any suffix), directories (searched to the bottom, sorted) and glob patterns.

    Raises:
        RequestError: Listing every path that does not exist or holds no image.
    """
    found: dict[Path, None] = {}
    problems = []
    for path in map(os.path.expanduser, map(os.fspath, paths)):
        try:
            images = _expand(path)
        except OSError as error:
            problems.append(Problem("IMAGE", f"cannot look into '{path}': {(error.strerror or str(error)).lower()}"))
            continue
        if isinstance(images, str):
            problems.append(Problem("IMAGE", images, "Give image files, directories of images or patterns"))
        else:
            found.update(dict.fromkeys(images))
    if problems:
        raise RequestError(problems)
    return list(found)


def _expand(path: str) -> list[Path] | str:
    """The images that one argument names, or what is wrong with it."""
    if os.path.isdir(path):
        names = (name for name, is_dir, _ in walk(path) if not is_dir)
        images = [Path(path, name) for name in names if is_image_name(os.path.basename(name))]
        return images or f"no images in '{path}'"
    if os.path.lexists(path):
        return [Path(path)]
    if not glob.has_magic(path):
        return f"'{path}' does not exist"
    images = []
    for match in sorted(glob.glob(path, recursive=True)):
        if os.path.isdir(match):
            inside = _expand(match)
            images += [] if isinstance(inside, str) else inside
        elif is_image_name(os.path.basename(match)):
            images.append(Path(match))
    return images or f"nothing matches '{path}'"
