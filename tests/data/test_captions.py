"""Captions: those of shapes, and of metadata.jsonl files beside images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionkd.data.captions import captions_of, read_captions
from visionkd.data.folder import FolderSource
from visionkd.data.shapes import CLASSES, COLOURS, ShapesSource
from visionkd.data.subset import SubsetSource
from visionkd.errors import DataError


def write(folder: Path, *entries: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_scenes_have_their_caption_and_two_that_name_the_largest_object() -> None:
    source = ShapesSource(0, 8, 32)
    found = captions_of(SubsetSource(source, np.array([5, 2])), "shapes")
    for (whole, part, kind), index in zip(found, (5, 2), strict=True):
        assert whole == source.scene(index).caption and whole.startswith(f"{part} on a ")
        assert kind == f"a {CLASSES[index]}" and part.endswith(kind.split()[1])
        assert len(part.split()) == 3 and part.split()[1] in COLOURS


def test_files_at_any_depth_name_images_beside_them(tmp_path) -> None:
    write(tmp_path, {"file_name": "train/a.jpg", "text": "a cat"}, "", {"file_name": "b.jpg", "text": ["x", "y"]})
    write(tmp_path / "val", {"file_name": "c.jpg", "text": "a dog", "more": 1})
    assert read_captions(tmp_path) == {"train/a.jpg": ("a cat",), "b.jpg": ("x", "y"), "val/c.jpg": ("a dog",)}
    source = FolderSource(tmp_path, ["train/a.jpg", "b.jpg", "val/c.jpg"], [-1] * 3)
    assert captions_of(SubsetSource(source, np.array([2, 0])), str(tmp_path)) == [("a dog",), ("a cat",)]


def test_images_without_a_caption_are_counted(tmp_path) -> None:
    write(tmp_path, {"file_name": "a.jpg", "text": "a cat"})
    source = FolderSource(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], [-1] * 3)
    with pytest.raises(DataError, match=r"2 of 3 images .* 'b.jpg'"):
        captions_of(source, str(tmp_path))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is no JSON"),
        ('{"file_name": "a.jpg"}', "line 1 lacks"),
        ('{"file_name": "a.jpg", "text": " "}', "line 1 lacks"),
        ('{"file_name": "a.jpg", "text": []}', "line 1 lacks"),
        ('["a.jpg", "a cat"]', "line 1 lacks"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, said) -> None:
    write(tmp_path, line)
    with pytest.raises(DataError, match=said):
        read_captions(tmp_path)


def test_data_without_captions_says_how_to_add_them(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(DataError) as caught:
        captions_of(FolderSource(tmp_path, ["a.jpg"], [-1]), str(tmp_path))
    assert "no captions" in str(caught.value) and '"file_name"' in str(caught.value)
    with pytest.raises(DataError, match="from directories and from shapes"):
        captions_of(FolderSource(tmp_path, ["a.jpg"], [-1]), "cifar10")
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="cannot be read"):
        read_captions(tmp_path)
