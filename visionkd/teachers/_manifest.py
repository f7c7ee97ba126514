"""What a label store was filled from: its manifest, its key and its place. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from visionkd.data.archive import cache_root
from visionkd.errors import Problem, RequestError
from visionkd.files import write_text
from visionkd.teachers._shards import RowFormat, Storage

MANIFEST = "manifest.json"
_FORMAT = "visionkd label store"
_VERSION = 1
_NOTHING = object()
_LONGEST = 40


@dataclass(frozen=True)
class Manifest:
    """What the files of a store mean, written when it is made and never changed.

    Attributes:
        key: What the labels were computed from, as nested JSON; a store serves only a run with an equal one.
        num_samples: Samples of the training set.
        format: Format of a label.
        shard_rows: Samples of a shard.
        about: Names for people, such as those of the teachers; not compared.
        created: UTC time.
    """

    key: Mapping[str, Any]
    num_samples: int
    format: RowFormat
    shard_rows: int
    about: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def blocks(self) -> int:
        """Shards of a view."""
        return -(-self.num_samples // self.shard_rows)

    def block_rows(self, block: int) -> int:
        """Samples of a block; the last one may be shorter."""
        return min(self.shard_rows, self.num_samples - block * self.shard_rows)

    def identity(self) -> dict[str, Any]:
        """Return all that has to be equal for the labels to be of use."""
        fmt = self.format
        kept = {} if fmt.storage == "full" else {"top_k": fmt.k}
        shape = {"num_samples": self.num_samples, "num_classes": fmt.num_classes, "storage": fmt.storage, **kept}
        return {**self.key, **shape}

    def write(self, directory: Path) -> None:
        """Write it into the directory of a store."""
        fmt = self.format
        fields = [[name, str(fmt.dtype[name].base.name), *fmt.dtype[name].shape] for name in fmt.dtype.names or ()]
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "about": _plain(self.about),
            "key": _plain(self.key),
            "num_samples": self.num_samples,
            "num_classes": fmt.num_classes,
            "storage": fmt.storage,
            "top_k": fmt.k,
            "shard_rows": self.shard_rows,
            "row": {"bytes": fmt.row_bytes, "fields": fields},
        }
        write_text(directory / MANIFEST, json.dumps(values, indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a store.

    Raises:
        RequestError: If there is none, it cannot be read, or it is of a newer format.
    """
    values = manifest_values(directory)
    if values is None:
        raise RequestError(
            f"{directory} is no label store: its {MANIFEST} is missing or is none of a label store.",
            hint="'visionkd data cache list' names the stores. If this one was damaged, delete the directory.",
        )
    if values.get("version") != _VERSION:
        raise RequestError(
            f"The label store {directory} is of format {values.get('version')}; this version of visionkd reads format "
            f"{_VERSION}.",
            hint=f"Use the version that wrote it, give another directory, or remove it: "
            f"visionkd data cache remove {directory}",
        )
    try:
        fmt = RowFormat(values["num_classes"], values["storage"], values["top_k"])
        manifest = Manifest(
            key=dict(values["key"]),
            num_samples=int(values["num_samples"]),
            format=fmt,
            shard_rows=int(values["shard_rows"]),
            about=dict(values.get("about") or {}),
            created=str(values.get("created", "")),
        )
        sound = fmt.row_bytes == values["row"]["bytes"] and manifest.num_samples > 0 and manifest.shard_rows > 0
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise RequestError(
            f"The {MANIFEST} of the label store {directory} is damaged.",
            hint=f"Remove the store: visionkd data cache remove {directory}",
        )
    return manifest


def manifest_values(directory: Path) -> dict[str, Any] | None:
    """Return what a manifest holds, of whatever version; None where the directory is recognisably no store."""
    try:
        values = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("format") == _FORMAT else None


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Problem]:
    """Return each part in which two keys differ, by its dotted path, with both values."""
    before, after = dict(_flat(_plain(stored))), dict(_flat(_plain(wanted)))
    names = [*after, *(name for name in before if name not in after)]
    problems = []
    for name in names:
        old, new = before.get(name, _NOTHING), after.get(name, _NOTHING)
        if old != new or isinstance(old, bool) is not isinstance(new, bool):
            texts = _shown(old), _shown(new)
            if texts[0] == texts[1]:  # what was cut off is where they differ
                texts = repr(old), repr(new)
            problems.append(Problem(name, f"the store has {texts[0]}, this run {texts[1]}"))
    return problems


def refuse(directory: Path, problems: Sequence[Problem]) -> RequestError:
    """Return the error that says why a store does not serve a run."""
    head = Problem("label store", f"{directory} holds labels that were computed from something else")
    return RequestError(
        [head, *problems],
        hint="Leave out label_store.path, so that each setting has a store of its own, give another directory with "
        f"-o label_store.path=DIR, remove this one ('visionkd data cache remove {directory}'), or go on without: "
        "--no-cache-teacher",
    )


def labels_root() -> Path:
    """Where stores are kept: ``$VISIONKD_CACHE/labels`` or ``~/.cache/visionkd/labels``."""
    return cache_root().parent / "labels"


def store_path(key: Mapping[str, Any], *, storage: Storage = "full", top_k: int = 10) -> Path:
    """Return the directory in the cache that belongs to a key and a way to store labels."""
    identity = {"key": _plain(key), "storage": storage, "top_k": top_k if storage == "top_k" else None}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return labels_root() / hashlib.sha256(text.encode()).hexdigest()[:12]


def nearest_store(
    key: Mapping[str, Any], root: Path | None = None, *, unrelated: Callable[[str], bool] = lambda name: False
) -> tuple[Path, list[Problem]] | None:
    """Return the store whose key differs least from ``key``, and in what; to tell why a new one has to be filled.

    Args:
        key: What labels are wanted of.
        root: Where to look; the cache by default.
        unrelated: Whether a difference in a part, by its dotted path, makes a store one of something else.
    """
    found = []
    for directory in store_directories(root):
        values = manifest_values(directory) or {}
        if isinstance(values.get("key"), dict):
            problems = differences(values["key"], key)
            if not any(unrelated(problem.key) for problem in problems):
                found.append((directory, problems))
    return min(found, key=lambda each: (len(each[1]), each[0].name), default=None)


def store_directories(root: Path | None = None) -> list[Path]:
    """Return the directories that hold stores, by name.

    Args:
        root: Where to look; the cache by default.
    """
    root = root or labels_root()
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return []
    return [entry for entry in entries if manifest_values(entry) is not None]


def _plain(values: Any) -> Any:
    """Return values as they come back from a JSON file: tuples as lists, names as text."""
    return json.loads(json.dumps(values, allow_nan=False))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield leaves with their dotted paths. A list of plain values is one leaf; so is what is empty."""
    if isinstance(values, dict) and values:
        for name, part in values.items():
            yield from _flat(part, f"{prefix}{name}.")
    elif isinstance(values, list) and any(isinstance(item, (dict, list)) for item in values):
        for number, part in enumerate(values):
            yield from _flat(part, f"{prefix}{number}.")
    else:
        yield prefix[:-1], values


def _shown(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[:16]}..."
    return json.dumps(value)
