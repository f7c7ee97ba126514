"""Data sets on this machine, by the names that cards use."""

from __future__ import annotations

import os
from pathlib import Path

_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".zip")


def data_directory(root: Path) -> Path:
    """Return the folder of the data: ``VISIONKD_DATA``, or ``../shared/data`` beside the checkout ``root``."""
    return Path(os.environ.get("VISIONKD_DATA", root.parent / "shared" / "data"))


def find_data(name: str, directory: Path) -> Path | None:
    """Return where the data set called ``name`` lies: a folder, there or one level deeper, or an archive of it."""
    for folder in (directory / name, *sorted(directory.glob(f"*/{name}"))):
        if folder.is_dir():
            return folder
    files = [file for file in sorted(directory.glob(f"{name}*")) if file.name.endswith(_ARCHIVES)]
    return files[0] if files else None
