"""What images are said to show: the captions of ``shapes``, and ``metadata.jsonl`` files beside images.

A line of such a file is ``{"file_name": "a/b.jpg", "text": "a cat on a mat"}``, with ``file_name`` relative to the
folder of the file and ``text`` a sentence, or a list of sentences that all describe the image.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path

from visionkd.data.shapes import CLASSES, ShapesSource
from visionkd.data.subset import SubsetSource
from visionkd.errors import DataError
from visionkd.types import Source

FILE = "metadata.jsonl"
_LAYOUT_HINT = (
    f'Put a {FILE} beside the images, one line each: {{"file_name": "a.jpg", "text": "a cat on a mat"}}. '
    "'--data shapes' has captions of its own."
)


def captions_of(source: Source, path: str) -> list[tuple[str, ...]]:
    """Return the captions of every sample of a split, one or more each.

    Args:
        source: The split.
        path: DATA that it comes from.

    Raises:
        DataError: If there are none, a file is damaged, or an image has none.
    """
    base, indices = source, range(len(source))
    if isinstance(source, SubsetSource):
        base, indices = source.base, source.indices.tolist()
    if isinstance(base, ShapesSource):
        return [_of_scene(base, index) for index in indices]
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"'{path}' has no captions: they are read from directories and from shapes", hint=_LAYOUT_HINT)
    found = read_captions(root)
    names = [base.name(index).replace(os.sep, "/") for index in indices]
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{len(missing)} of {len(names)} images in '{path}' have no caption, such as '{missing[0]}'",
            hint=f"Add them to {FILE}, or move the images elsewhere.",
        )
    return [found[name] for name in names]


def _of_scene(source: ShapesSource, index: int) -> tuple[str, ...]:
    """The caption of a scene; what it says of the largest object alone; and that without a colour, as its class."""
    caption = source.scene(index).caption
    return caption, caption.partition(" on a ")[0], f"a {CLASSES[source.target(index)]}"


def read_captions(root: Path) -> Mapping[str, tuple[str, ...]]:
    """Return the captions in all ``metadata.jsonl`` files below ``root``, by the images' paths relative to it.

    Raises:
        DataError: If there is no such file, or a line is none of the form above.
    """
    files = sorted(root.rglob(FILE))
    if not files:
        raise DataError(f"'{root}' has no captions: there is no {FILE} in it", hint=_LAYOUT_HINT)
    captions: dict[str, tuple[str, ...]] = {}
    for file in files:
        folder = file.parent.relative_to(root).as_posix()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"'{file}' cannot be read: {error}", hint="It must be UTF-8 text.") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, texts = _entry(line, f"'{file}', line {number}")
            captions[posixpath.normpath(posixpath.join(folder, name))] = texts
    return captions


def _entry(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON: {error}", hint=_LAYOUT_HINT) from error
    name = values.get("file_name") if isinstance(values, dict) else None
    texts = values.get("text") if isinstance(values, dict) else None
    found: Sequence[object] = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    if not isinstance(name, str) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(f"{where} lacks a 'file_name', or a 'text' that says something", hint=_LAYOUT_HINT)
    return name, tuple(str(text) for text in found)
