from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from visionkd.data.archive import ArchiveSource, open_archive
from visionkd.data.folder import open_folder
from visionkd.errors import DataError, RequestError, UnreadableImageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack(folder: Path, name: str) -> Path:
    path = folder.parent / name
    if name.endswith(".zip"):
        method = {"stored.zip": zipfile.ZIP_STORED, "bzip2.zip": zipfile.ZIP_BZIP2}.get(name, zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(path, "w", method) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder.parent))
    else:
        mode = {"tar": "w", "gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}[name.rsplit(".", 1)[1]]
        with tarfile.open(path, mode) as archive:
            archive.add(folder, folder.name)
    return path


ALL = ["data.tar", "data.tar.gz", "data.tgz", "data.tar.bz2", "data.tar.xz", "data.zip", "stored.zip", "bzip2.zip"]


@pytest.mark.parametrize("name", ALL)
def test_archive_equals_folder(split, name):
    outside, inside = open_folder(split), open_archive(pack(split, name))
    assert inside.classes == outside.classes and inside.name == name.split(".")[0]
    for part, source in outside.sources.items():
        packed = inside.sources[part]
        assert packed.targets.tolist() == source.targets.tolist()
        for index in range(len(source)):
            assert packed.name(index) == f"pets/{source.name(index)}"
            assert packed.read(index) == source.read(index)
        np.testing.assert_array_equal(np.asarray(packed.load(0)), np.asarray(source.load(0)))


def test_suffix_does_not_matter(split):
    path = pack(split, "data.zip")
    assert open_archive(path.rename(path.with_name("download"))).classes == ("cat", "dog")


def test_compressed_tar_is_unpacked_once(split, cache):
    path = pack(split, "data.tar.gz")
    open_archive(path)
    (plain,) = (cache / "data" / "archives").iterdir()
    before = plain.stat().st_mtime_ns
    open_archive(path)
    assert plain.stat().st_mtime_ns == before
    os.utime(path, (1, 1))  # another archive of the same name
    open_archive(path)
    assert len(list((cache / "data" / "archives").iterdir())) == 2


def test_cache_that_cannot_be_written(split, monkeypatch):
    path = pack(split, "data.tar.gz")
    monkeypatch.setenv("VISIONKD_CACHE", "/dev/null")
    with pytest.raises(DataError, match="cannot decompress") as caught:
        open_archive(path)
    assert "VISIONKD_CACHE" in caught.value.hint


def _read_all(source: ArchiveSource) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


@pytest.mark.parametrize("name", ["data.tar", "data.zip"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_at_once(split, name, method):
    source = open_archive(pack(split, name)).sources["train"]
    expected = _read_all(source)  # the file is open before the processes start
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read_all, [source] * 4) == [expected] * 4


def test_threads_read_at_once(split):
    source = open_archive(pack(split, "data.zip")).sources["train"]
    expected = _read_all(source)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_read_all, [source] * 16)) == [expected] * 16


def test_pickle_carries_no_open_file(split):
    source = open_archive(pack(split, "data.tar")).sources["train"]
    assert _read_all(pickle.loads(pickle.dumps(source))) == _read_all(source)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_climbing_names_are_left_out(split, kind, tmp_path):
    content = (split / "train/cat/000.png").read_bytes()
    path = pack(split, f"data.{kind}")
    bad = ["../../evil.png", "/etc/evil.png", "pets/train/cat/../../../../evil.png"]
    if kind == "zip":
        with zipfile.ZipFile(path, "a") as archive:
            for name in [*bad, "..\\evil.png"]:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "a") as archive:
            for name in [*bad, "pets/../../evil.png"]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    opened = open_archive(path)
    assert len(opened.sources["train"]) == 13
    assert any(message.startswith("4 members are left out") for message in opened.messages)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/etc/evil.png").exists()


def test_links_in_a_tar_are_left_out(split):
    path = pack(split, "data.tar")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("pets/train/cat/link.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    opened = open_archive(path)
    assert len(opened.sources["train"]) == 13 and "1 members are left out" in opened.messages[0]


def test_encrypted_members_are_left_out(split):
    path = pack(split, "data.zip")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02", 0)
    while (at := content.find(b"000.png", entry)) != -1 and content[entry : entry + 4] == b"PK\x01\x02":
        if entry < at < entry + 80:
            content[entry + 8] |= 1
            break
        entry = content.index(b"PK\x01\x02", entry + 4)
    path.write_bytes(content)
    assert "1 members are left out" in open_archive(path).messages[0]


@pytest.mark.parametrize("name", ["data.tar", "data.zip", "data.tar.gz", "data.tar.xz"])
def test_cut_off_archive(split, name):
    path = pack(split, name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(DataError, match="not an archive that can be read"):
        open_archive(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04nothing", b"\x1f\x8bnothing", bytes(2000), b"\xfd7zXZ\x00bad"]
)
def test_not_an_archive(tmp_path, content):
    path = tmp_path / "data.zip"
    path.write_bytes(content)
    with pytest.raises(DataError):
        open_archive(path)


def test_compressed_file_that_is_no_tar(tmp_path, cache):
    import gzip

    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"not a tar at all" * 100))
    with pytest.raises(DataError, match="not an archive"):
        open_archive(tmp_path / "a.tar.gz")
    assert not list(cache.rglob("*.tar"))


def test_damaged_member_is_unreadable(split):
    path = pack(split, "stored.zip")
    source = open_archive(path).sources["train"]
    content = bytearray(path.read_bytes())
    start = content.index((split / "train/cat/001.png").read_bytes())
    content[start + 50] ^= 255
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match="damaged"):
        source.read(1)
    source.read(0)


def test_member_that_lies_about_its_size(split):
    """A bomb: the table of contents says 10 bytes, the data expands to far more."""
    path = pack(split, "data.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pets/train/cat/bomb.png", bytes(10_000_000))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 10)
    path.write_bytes(content)
    source = open_archive(path).sources["train"]
    index = next(i for i in range(len(source)) if source.name(i).endswith("bomb.png"))
    with pytest.raises(UnreadableImageError, match="damaged"):
        source.read(index)


def test_last_of_two_members_of_one_name_counts(split):
    path = pack(split, "data.zip")
    content = (split / "val/dog/002.png").read_bytes()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pets/train/cat/000.png", content)
    source = open_archive(path).sources["train"]
    assert len(source) == 13 and source.read(0) == content


def test_fingerprint_follows_the_content(split):
    first = open_archive(pack(split, "data.zip")).fingerprint
    assert open_archive(pack(split, "data.zip")).fingerprint == first
    content = bytearray((split / "train/cat/000.png").read_bytes())
    content[-20] ^= 1
    (split / "train/cat/000.png").write_bytes(content)
    assert open_archive(pack(split, "data.zip")).fingerprint != first


def test_other_tasks_are_refused(tmp_path, make_folder):
    root = make_folder(tmp_path / "camvid", {"train/images": 1, "train/labels": 1})
    with pytest.raises(RequestError, match="segmentation"):
        open_archive(pack(root, "data.tar"))


def test_empty_class_inside(tmp_path, make_folder):
    root = make_folder(tmp_path / "d", {"train/a": 1, "train/b": 1, "train/c": 0})
    for name in ("data.tar", "data.zip"):
        assert open_archive(pack(root, name)).sources["train"].empty_classes == ("c",)
