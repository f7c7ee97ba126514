from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from visionkd.data.known import KNOWN_SETS, names, open_known
from visionkd.data.open import open_data
from visionkd.errors import DataError, DownloadError, RequestError, UnreadableImageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def replace(monkeypatch, name: str, make) -> list[dict]:
    """Put ``make(root, **arguments)`` in the place of a torchvision class; returns the list of calls."""
    calls: list[dict] = []

    def factory(root, **arguments):
        calls.append(arguments)
        return make(Path(root), **arguments)

    monkeypatch.setattr(
        torchvision.datasets, next(known.factory for known in KNOWN_SETS if known.name == name), factory
    )
    return calls


class InMemory:
    """As CIFAR10: arrays and targets."""

    classes = tuple("abcdefghij")

    def __init__(self, root, train, download=False):
        self.targets = [0, 1, 2] if train else [3, 4]

    def __getitem__(self, index):
        if self.targets[index] == 2:
            raise OSError("bad")
        return Image.fromarray(np.full((32, 32), 50 + index, dtype=np.uint8)), self.targets[index]


def test_every_name_belongs_to_a_class_of_torchvision():
    for known in KNOWN_SETS:
        assert hasattr(torchvision.datasets, known.factory), known.name
    assert len(set(names())) == len(KNOWN_SETS) and list(names()) == sorted(names())


def test_arguments_are_those_that_torchvision_takes(tmp_path, monkeypatch):
    """Each class gets past its checks of arguments, to the point where it misses its files."""
    import inspect

    for known in KNOWN_SETS:
        for arguments in known.splits.values():
            inspect.signature(getattr(torchvision.datasets, known.factory)).bind(tmp_path, **arguments, download=True)
            with pytest.raises((RuntimeError, OSError, ImportError)):
                getattr(torchvision.datasets, known.factory)(tmp_path / "none", **arguments)


def test_listing_imports_nothing():
    code = "import sys; from visionkd.data.known import names; assert names() and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_set_in_memory(monkeypatch):
    calls = replace(monkeypatch, "cifar10", InMemory)
    data = open_data("cifar10")
    assert data.name == "cifar10" and len(data.classes) == 10
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 3, "test": 2, "val": 2}
    assert "validating on test" in data.messages[0]
    train = data.splits["train"]
    assert train.load(1).mode == "RGB" and train.load(1).getpixel((0, 0)) == (51, 51, 51)
    assert train.target(1) == 1 and train.name(1) == "cifar10/train/000001"
    with pytest.raises(UnreadableImageError, match="cifar10/train/000002"):
        train.load(2)
    assert calls == [{"train": True}, {"train": False}]  # nothing is downloaded that is there


def test_set_of_files_is_read_as_files(monkeypatch, tmp_path, make_folder):
    root = make_folder(tmp_path / "files", {"train": 3, "test": 2, "val": 1})

    class Files:
        classes = [f"texture {number}" for number in range(47)]

        def __init__(self, _, split):
            self._image_files = sorted((root / split).glob("*.png"))
            self._labels = list(range(len(self._image_files)))

    replace(monkeypatch, "dtd", Files)
    data = open_data("dtd")
    assert set(data.splits) == {"train", "val", "test"} and data.classes[46] == "texture 46" and data.messages == ()
    source = data.splits["train"]
    assert source.read(2) == (root / "train" / "002.png").read_bytes() and source.target(2) == 2


def test_imagenette_names_its_classes_by_imagenet_id(monkeypatch, tmp_path, make_folder):
    root = make_folder(tmp_path / "files", {"x": 2})

    class Imagenette:
        wnids = [f"n0000000{number}" for number in range(10)]
        classes = [(f"long name {number}", "synonym") for number in range(10)]

        def __init__(self, _, split, size):
            self._samples = [(str(file), 1) for file in sorted((root / "x").glob("*.png"))]

    replace(monkeypatch, "imagenette", Imagenette)
    assert open_known("imagenette").classes[1] == "n00000001_long_name_1"


def test_set_without_splits_is_split(monkeypatch):
    class Whole(InMemory):
        def __init__(self, root):
            self.targets = [0, 1] * 10

    replace(monkeypatch, "eurosat", Whole)
    data = open_data("eurosat")
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 18, "val": 2, "all": 20}


def test_missing_set_is_downloaded(monkeypatch, cache):
    def make(root, train, download=False):
        if not download:
            raise RuntimeError("Dataset not found")
        print("Downloading")
        return InMemory(root, train)

    calls = replace(monkeypatch, "cifar10", make)
    assert len(open_known("cifar10").sources["train"]) == 3
    assert [call.get("download", False) for call in calls] == [False, True, True]


def fails(error):
    def make(root, train, download=False):
        raise error if download else RuntimeError("Dataset not found")

    return make


@pytest.mark.parametrize(
    "error",
    [URLError("Name or service not known"), TimeoutError("timed out"), RuntimeError("Error downloading x: no host")],
)
def test_no_network_says_what_to_do(monkeypatch, cache, error):
    replace(monkeypatch, "cifar10", fails(error))
    with pytest.raises(DownloadError, match="cannot download 'cifar10' \\(about 170 MB\\)") as caught:
        open_known("cifar10")
    assert str(cache / "cifar10") in caught.value.hint and "--data shapes" in caught.value.hint
    assert caught.value.exit_code == 1


def test_damaged_download(monkeypatch, cache):
    replace(monkeypatch, "cifar10", fails(RuntimeError("File not found or corrupted.")))
    with pytest.raises(DownloadError, match="incomplete or damaged") as caught:
        open_known("cifar10")
    assert "Remove that folder" in caught.value.hint


def test_full_disk(monkeypatch):
    replace(monkeypatch, "cifar10", fails(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="no space left on device") as caught:
        open_known("cifar10")
    assert "VISIONKD_CACHE" in caught.value.hint


def test_missing_package(monkeypatch):
    def make(root, split, download=False):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    replace(monkeypatch, "svhn", make)
    with pytest.raises(RequestError, match="needs the package 'scipy'") as caught:
        open_known("svhn")
    assert caught.value.hint == "Run 'pip install scipy'."


def test_stdout_stays_clean(monkeypatch, capsys):
    def make(root, train, download=False):
        print("Downloading https://somewhere")
        if not download:
            raise RuntimeError("Dataset not found")
        return InMemory(root, train)

    replace(monkeypatch, "cifar10", make)
    open_known("cifar10")
    assert capsys.readouterr().out == ""
