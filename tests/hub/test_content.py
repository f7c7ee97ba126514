"""Files are refused for what they hold, even where the card means them: a pickle, a bomb, a path that climbs."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from tests.hub.zoo_server import card_values, entry, onnx_bytes, write_card, write_onnx_card
from visionkd.errors import DataError
from visionkd.hub import cache
from visionkd.hub.content import check_content
from visionkd.hub.pull import pull


class Evil:
    """Leaves a trace wherever it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):  # noqa: ANN204
        return (Path.touch, (self.trace,))


def safetensors_bytes(end: int = 4, held: int = 4) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * held


def zip_bytes(path: Path, name: str, content: bytes, method: int) -> bytes:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "model.json", "labels.txt"])
def test_a_pickle_under_a_harmless_name(zoo: Path, tmp_path: Path, name: str) -> None:
    content = pickle.dumps(Evil(tmp_path / "trace"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="is a pickle, which runs code"):
        check_content(tmp_path / name, name)
    assert not (tmp_path / "trace").exists()


def test_a_card_that_means_a_pickle(zoo: Path, tmp_path: Path) -> None:
    content = pickle.dumps(Evil(tmp_path / "trace"))
    (zoo / "evil").write_bytes(content)
    write_onnx_card(zoo, content, {"kind": "repository", "path": "evil"})
    with pytest.raises(DataError, match="is a pickle"):
        pull("tiny")
    assert not (tmp_path / "trace").exists()
    assert not list(cache.cache_root().glob("models/*/*")) and not list(cache.cache_root().glob("parts/*"))


def test_a_checkpoint_with_code_in_it(zoo: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for zipped in (True, False):  # the forms that torch writes now and wrote before 1.6
        torch.save({"w": Evil(tmp_path / "trace")}, zoo / "evil.pth", _use_new_zipfile_serialization=zipped)
        file = entry("evil.pth", (zoo / "evil.pth").read_bytes(), {"kind": "repository", "path": "evil.pth"})
        write_card(zoo, card_values(artifacts={"weights": {"format": "checkpoint", "files": [file]}}))
        with pytest.raises(DataError, match="Python objects beside its tensors"):
            pull("tiny")
        assert not (tmp_path / "trace").exists()
        assert not list(cache.cache_root().glob("models/*/*"))


def test_a_zip_bomb(tmp_path: Path) -> None:
    bomb, path = zip_bytes(tmp_path / "bomb", "data.pkl", b"\0" * 30_000_000, zipfile.ZIP_DEFLATED), tmp_path / "x.pth"
    assert len(bomb) < 40_000
    path.write_bytes(bomb)
    with pytest.raises(DataError, match="zip bomb"):
        check_content(path, "x.pth")
    # One that claims to be stored: its table of contents is larger than the file.
    stored = bytearray(zip_bytes(tmp_path / "stored", "data.pkl", b"\0" * 100, zipfile.ZIP_STORED))
    at = stored.rindex(b"PK\x01\x02") + 24
    stored[at : at + 4] = struct.pack("<I", 1_000_000_000)
    path.write_bytes(stored)
    with pytest.raises(DataError, match="zip bomb"):
        check_content(path, "x.pth")


@pytest.mark.parametrize("member", ["../../evil", "/etc/evil", "..\\evil"])
def test_a_path_in_a_checkpoint_that_climbs(tmp_path: Path, member: str) -> None:
    path = tmp_path / "x.pth"
    zip_bytes(path, member, b"content", zipfile.ZIP_STORED)
    with pytest.raises(DataError, match="climbs out"):
        check_content(path, "x.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.safetensors", b"", "not a safetensors file"),
        ("m.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
        ("m.safetensors", struct.pack("<Q", 4) + b"[[[[" + b"\0" * 9, "not a whole safetensors file"),
        ("m.safetensors", safetensors_bytes(held=3), "not a whole safetensors file"),
        ("m.safetensors", safetensors_bytes(held=5), "not a whole safetensors file"),
        ("m.onnx", onnx_bytes()[:-1], "not a whole ONNX file"),
        ("m.onnx", b"<html>no such page</html>", "not a whole ONNX file"),
        ("m.onnx", onnx_bytes(external=True), "reads weights from other files"),
        ("m.json", b"<html>", "not a JSON file"),
        ("m.json", b"[" * 100_000, "not a JSON file"),
        ("m.txt", b"\xff\xfe", "not a text file"),
        ("m.pth", b"PK\x03\x04 and no more", "not a whole weight file"),
        ("m.py", b"import os", "of no kind"),
    ],
)
def test_what_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        check_content(tmp_path / "file", name)


def test_what_is_whole_passes(tmp_path: Path) -> None:
    whole = {"m.safetensors": safetensors_bytes(), "m.onnx": onnx_bytes(), "m.json": b"{}", "m.txt": "ä".encode()}
    for name, content in whole.items():
        (tmp_path / "file").write_bytes(content)
        check_content(tmp_path / "file", name)
    torch = pytest.importorskip("torch")
    for zipped in (True, False):
        torch.save({"w": torch.zeros(3)}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
        check_content(tmp_path / "file", "m.pth")
