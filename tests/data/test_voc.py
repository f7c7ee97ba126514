"""Boxes in Pascal VOC's XML: layouts, splits, pixels counted from 1 or from 0, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.test_coco import SIZE, picture
from visionkd.data.open import open_data
from visionkd.errors import DataError


def note(path: Path, objects: list[tuple[str, tuple, int]], *, size: tuple[int, int] | None = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box, difficult in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path.write_text(f"<annotation><filename>x</filename>{sides}{rows}</annotation>")


OBJECTS = [("dog", (1, 1, 10, 20), 0), ("cat", (5, 6, 12, 14), 1)]


def write(root: Path, count: int = 4, objects: list = OBJECTS, *, lists: dict[str, list[int]] | None = None,
          places: tuple[str, str] = ("JPEGImages/{n}.png", "Annotations/{n}.xml")) -> Path:  # fmt: skip
    for number in range(count):
        picture(root / places[0].format(n=number), number)
        note(root / places[1].format(n=number), objects)
    for name, members in (lists or {}).items():
        path = root / "ImageSets" / "Main" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(str, members)) + "\n")
    return root


def test_lists_tell_the_splits(tmp_path: Path) -> None:
    lists = {"train": [0, 1], "val": [2], "trainval": [0, 1, 2], "test": [3]}
    data = open_data(str(write(tmp_path, lists=lists)))
    assert (data.task, data.classes) == ("detection", ("cat", "dog"))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 2, "val": 1, "test": 1}
    target = data.splits["val"].target(0)
    # VOC counts pixels from 1, and names the last one that belongs to the box
    assert target["boxes"].tolist() == [[0, 0, 10, 20], [4, 5, 12, 14]] and target["labels"].tolist() == [1, 0]
    assert target["crowd"].tolist() == [False, True], "difficult ones count neither way"


def test_trainval_stands_in_for_train(tmp_path: Path) -> None:
    data = open_data(str(write(tmp_path, lists={"trainval": [0, 1, 2], "test": [3]})))
    assert {split: len(source) for split, source in data.splits.items() if split != "val"} == {"train": 3, "test": 1}
    assert "validating on test" in " ".join(data.messages)


@pytest.mark.parametrize("first", [(0, 1, 10, 20), (1.5, 1, 10, 20)])
def test_pixels_counted_from_zero(tmp_path: Path, first: tuple) -> None:
    data = open_data(str(write(tmp_path, objects=[("dog", first, 0), OBJECTS[1]])))
    assert data.splits["all"].target(0)["boxes"].tolist() == [list(first), [5, 6, 12, 14]]
    assert "counted from 0" in " ".join(data.messages)


def test_files_beside_their_pictures(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write(tmp_path / split, 3, places=("{n}.png", "{n}.xml"))
    data = open_data(str(tmp_path))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 3, "val": 3}
    assert data.splits["val"].name(0) == "valid/0.png", "and not the one of that name in train"


def test_files_and_pictures_without_each_other(tmp_path: Path) -> None:
    write(tmp_path)
    note(tmp_path / "Annotations" / "extra.xml", OBJECTS)
    picture(tmp_path / "JPEGImages" / "lone.png", 9)
    data = open_data(str(tmp_path))
    said = " ".join(data.messages)
    assert len(data.splits["all"]) == 4
    assert "1 files have no image of their name" in said and "1 images have no XML file" in said


def test_an_image_without_objects_is_background(tmp_path: Path) -> None:
    write(tmp_path)
    note(tmp_path / "Annotations" / "1.xml", [])
    data = open_data(str(tmp_path))
    assert not len(data.splits["all"].target(1)["labels"])
    assert "1 images of all have no boxes" in " ".join(data.messages)


@pytest.mark.parametrize(("text", "message"), [
    ("<annotation><object>", "is no XML"),
    ("<!DOCTYPE x><annotation/>", "has a document type"),
    ("<annotation><object><bndbox/></object></annotation>", "an object without a name"),
])  # fmt: skip
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path)
    (tmp_path / "Annotations" / "2.xml").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path))


def test_a_list_that_names_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, lists={"train": [0, 17], "val": [1]})
    with pytest.raises(DataError, match="names images without an XML file or a picture: '17'"):
        open_data(str(tmp_path))


def test_numbers_that_are_none(tmp_path: Path) -> None:
    write(tmp_path, 6)
    note(tmp_path / "Annotations" / "2.xml", [("dog", ("a", 1, 10, 20), 0), OBJECTS[1]])
    data = open_data(str(tmp_path))
    assert len(data.splits["all"].target(2)["labels"]) == 1 and "1 wrong format" in " ".join(data.messages)
