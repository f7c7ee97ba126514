"""Well-known data sets, through torchvision.

Listing them imports nothing; opening one imports torchvision, and downloads the data at its first use.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import Image

from visionkd.data.archive import cache_root
from visionkd.data.folder import FolderSource
from visionkd.data.layout import Opened, fingerprint
from visionkd.errors import DataError, DownloadError, RequestError, UnreadableImageError
from visionkd.types import Source

_TIMEOUT_S = 20.0
_TRAIN_TEST: Mapping[str, Mapping[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def _by_split(*names: str, **more: Any) -> dict[str, dict[str, Any]]:
    return {name: {"split": name, **more} for name in names}


@dataclass(frozen=True)
class KnownSet:
    """One well-known data set.

    Attributes:
        name: What ``--data`` takes.
        title: What it shows.
        factory: Class in ``torchvision.datasets``.
        num_classes: Number of classes.
        num_images: Images in all splits together.
        img_size: Usual size in pixels; 0 where sizes vary.
        download_mb: About how much is fetched.
        splits: Constructor arguments by split; the one split ``all`` where there is none.
    """

    name: str
    title: str
    factory: str
    num_classes: int
    num_images: int
    img_size: int
    download_mb: int
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _TRAIN_TEST)


KNOWN_SETS = (
    KnownSet("cifar10", "objects and animals", "CIFAR10", 10, 60_000, 32, 170),
    KnownSet("cifar100", "objects and animals", "CIFAR100", 100, 60_000, 32, 170),
    KnownSet("dtd", "textures", "DTD", 47, 5_640, 0, 600, _by_split("train", "val", "test")),
    KnownSet("eurosat", "land use from above", "EuroSAT", 10, 27_000, 64, 90, {"all": {}}),
    KnownSet("fashionmnist", "clothes, grey", "FashionMNIST", 10, 70_000, 28, 30),
    KnownSet("fgvc-aircraft", "aircraft", "FGVCAircraft", 100, 10_000, 0, 2_750, _by_split("train", "val", "test")),
    KnownSet("flowers102", "flowers", "Flowers102", 102, 8_189, 0, 345, _by_split("train", "val", "test")),
    KnownSet("food101", "dishes", "Food101", 101, 101_000, 0, 5_000, _by_split("train", "test")),
    KnownSet("gtsrb", "German traffic signs", "GTSRB", 43, 39_270, 0, 280, _by_split("train", "test")),
    KnownSet(
        "imagenette",
        "ten easy classes of ImageNet",
        "Imagenette",
        10,
        13_394,
        320,
        340,
        _by_split("train", "val", size="320px"),
    ),
    KnownSet("kmnist", "cursive Japanese, grey", "KMNIST", 10, 70_000, 28, 20),
    KnownSet("mnist", "handwritten digits, grey", "MNIST", 10, 70_000, 28, 12),
    KnownSet(
        "oxford-iiit-pet",
        "cats and dogs by breed",
        "OxfordIIITPet",
        37,
        7_349,
        0,
        810,
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
    ),
    KnownSet("stl10", "objects and animals", "STL10", 10, 13_000, 96, 2_640, _by_split("train", "test")),
    KnownSet("svhn", "house numbers", "SVHN", 10, 99_289, 32, 250, _by_split("train", "test")),
)


def names() -> tuple[str, ...]:
    """Return the names of all known data sets."""
    return tuple(known.name for known in KNOWN_SETS)


class TorchvisionSource:
    """A torchvision data set that holds its images in memory.

    Args:
        dataset: The data set, without transforms.
        targets: Class indices.
        prefix: What the samples' names begin with.
    """

    def __init__(self, dataset: Any, targets: np.ndarray, prefix: str) -> None:
        self.dataset = dataset
        self.targets = np.asarray(targets, dtype=np.int64)
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        try:
            return self.dataset[index][0].convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadableImageError(f"cannot read '{self.name(index)}': {error}") from error

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index:06d}"


def open_known(name: str) -> Opened:
    """Open a known data set, downloading it at the first use.

    Raises:
        RequestError: If torchvision, or what it needs for this set, is not installed.
        DownloadError: If the data is neither in the cache nor to be had.
        DataError: If what is in the cache is damaged.
    """
    known = next(known for known in KNOWN_SETS if known.name == name)
    root = cache_root() / name
    try:
        factory = getattr(importlib.import_module("torchvision.datasets"), known.factory)
        datasets = _construct(factory, known, root)
    except ImportError as error:
        missing = error.name or "torchvision"
        raise RequestError(
            f"the data set '{name}' needs the package '{missing}'", hint=f"Run 'pip install {missing}'."
        ) from error
    sources = {split: _source(dataset, f"{name}/{split}") for split, dataset in datasets.items()}
    classes = _class_names(next(iter(datasets.values())), known.num_classes)
    parts = [name.encode()]
    for split, source in sources.items():
        parts += [split.encode(), source.targets.tobytes()]
        parts += [source.name(index).encode() for index in range(len(source))]
    return Opened(name=name, classes=classes, sources=sources, fingerprint=fingerprint(parts))


def _construct(factory: Any, known: KnownSet, root: Path) -> dict[str, Any]:
    """Build every split from the cache, or else download it, one process at a time."""

    def build(**more: Any) -> dict[str, Any]:
        # Some of its classes print what they do.
        with contextlib.redirect_stdout(io.StringIO()):
            return {split: factory(root, **arguments, **more) for split, arguments in known.splits.items()}

    try:
        return build()
    except ImportError:
        raise
    except Exception:  # torchvision answers missing files with RuntimeError, OSError and others.
        pass
    from filelock import FileLock

    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(os.fspath(root) + ".lock"):
            # torchvision sets no timeout of its own, so a silent server would hold the run for ever.
            socket.setdefaulttimeout(_TIMEOUT_S)
            return build(download=True)
    except Exception as error:
        raise _explained(error, known, root) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _explained(error: Exception, known: KnownSet, root: Path) -> Exception:
    """What a failed download means to the user."""
    if isinstance(error, ImportError):
        return error
    # The MNIST family turns a failed connection into a RuntimeError, after it tried every mirror.
    if (
        isinstance(error, (URLError, TimeoutError, ConnectionError, socket.gaierror))
        or "downloading" in str(error).lower()
    ):
        return DownloadError(
            f"cannot download '{known.name}' (about {known.download_mb} MB): {getattr(error, 'reason', error)}",
            hint=f"Run this once where there is a network and copy '{root}' over, or give --data a directory or an "
            "archive of images; '--data shapes' needs neither.",
        )
    if isinstance(error, OSError) and error.strerror:
        return DataError(
            f"cannot write '{known.name}' to '{root}': {(error.strerror or str(error)).lower()}",
            hint="Set VISIONKD_CACHE to a folder with room that you may write to.",
        )
    return DownloadError(
        f"'{known.name}' in '{root}' is incomplete or damaged: {error}", hint="Remove that folder and try again."
    )


def _source(dataset: Any, prefix: str) -> Source:
    """Wrap a data set: as files where it has files, so that they are decoded as all others are."""
    samples = getattr(dataset, "_samples", None) or getattr(dataset, "samples", None)
    if samples:
        files, targets = zip(*samples, strict=True)
    else:
        files = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
        targets = next(
            found for name in ("targets", "labels", "_labels") if (found := getattr(dataset, name, None)) is not None
        )
    if not files:
        return TorchvisionSource(dataset, np.asarray(targets), prefix)
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return FolderSource(root, [os.path.relpath(file, root) for file in files], targets)


def _class_names(dataset: Any, count: int) -> tuple[str, ...]:
    classes = getattr(dataset, "classes", None)
    if classes is None or len(classes) != count:
        return tuple(str(label) for label in range(count))
    # Imagenette names classes by synonyms; its ImageNet ids let a thousand-class model be evaluated on it.
    ids = getattr(dataset, "wnids", None)
    texts = [each if isinstance(each, str) else each[0] for each in classes]
    if ids is None:
        return tuple(texts)
    return tuple(f"{key}_{text.replace(' ', '_')}" for key, text in zip(ids, texts, strict=True))
