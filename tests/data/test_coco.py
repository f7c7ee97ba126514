"""Boxes in COCO's JSON: layouts, ids with holes, crowds, and what is wrong with files that other tools wrote."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionkd.config.schema import DataConfig
from visionkd.data.check import check_data
from visionkd.data.open import open_data
from visionkd.errors import DataError, RequestError, VisionKDError

CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 9, "name": "dog"}]
SIZE = (40, 30)  # width and height


def picture(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def table(names: list[str], boxes: list[tuple[int, list[float], int]], **more) -> dict:
    """``boxes``: number of the image, left, top, width and height, category id."""
    return {
        "images": [
            {"id": 100 + n, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for n, name in enumerate(names)
        ],
        "annotations": [
            {"id": n, "image_id": 100 + image, "bbox": box, "category_id": category}
            for n, (image, box, category) in enumerate(boxes)
        ],
        "categories": CATEGORIES,
        **more,
    }  # fmt: skip


BOXES = [(0, [1, 2, 10, 20], 9), (0, [5.5, 6, 7, 8.25], 2), (1, [0, 0, 40, 30], 2)]


def write(root: Path, content: dict | None = None, *, file: str = "annotations/instances_{split}.json",
          image: str = "{split}/{name}", splits: tuple[str, ...] = ("train", "val")) -> Path:  # fmt: skip
    content = content or table(["a.png", "b.png", "c.png"], BOXES)
    for number, split in enumerate(splits):
        for place, row in enumerate(content["images"]):
            picture(root / image.format(split=split, name=row["file_name"]), 10 * number + place)
        path = root / file.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(("file", "image"), [
    ("annotations/instances_{split}.json", "{split}/{name}"),
    ("annotations/instances_{split}2017.json", "{split}2017/{name}"),
    ("annotations/{split}.json", "images/{split}/{name}"),
    ("{split}/_annotations.coco.json", "{split}/{name}"),
])  # fmt: skip
def test_layouts(tmp_path: Path, file: str, image: str) -> None:
    data = open_data(str(write(tmp_path, file=file, image=image)))
    assert (data.task, data.classes) == ("detection", ("cat", "dog"))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 3, "val": 3}
    target = data.splits["train"].target(0)
    assert target["boxes"].tolist() == [[1, 2, 11, 22], [5.5, 6, 12.5, 14.25]] and target["boxes"].dtype == np.float32
    assert target["labels"].tolist() == [1, 0] and target["labels"].dtype == np.int64
    assert target["crowd"].tolist() == [False, False]
    assert data.splits["train"].load(0).size == SIZE
    assert data.splits["train"].target(2)["boxes"].shape == (0, 4)
    said = " ".join(data.messages)
    assert "category ids 2 to 9 have holes" in said and "1 images of train have no boxes" in said


def test_one_file_is_split_and_an_archive_says_the_same(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(10)]
    root = write(tmp_path / "set", table(names, BOXES), file="annotations.json", image="{name}", splits=("all",))
    data = open_data(str(root))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 9, "val": 1, "all": 10}
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(root, "set")
    packed = open_data(str(tmp_path / "set.tar"))
    assert packed.task == "detection" and packed.classes == data.classes
    for index in range(10):
        mine, theirs = (each.splits["all"].target(index) for each in (data, packed))
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_the_fingerprint_follows_the_boxes(tmp_path: Path) -> None:
    first = open_data(str(write(tmp_path / "a"))).fingerprint
    assert open_data(str(write(tmp_path / "b"))).fingerprint == first
    moved = [(0, [1, 2, 10, 21], 9), *BOXES[1:]]
    assert open_data(str(write(tmp_path / "c", table(["a.png", "b.png", "c.png"], moved)))).fingerprint != first


def test_crowds_are_marked(tmp_path: Path) -> None:
    content = table(["a.png"], BOXES[:2])
    content["annotations"][1]["iscrowd"] = 1
    assert open_data(str(write(tmp_path, content))).splits["val"].target(0)["crowd"].tolist() == [False, True]


def test_some_classes_in_their_order(tmp_path: Path) -> None:
    write(tmp_path)
    data = open_data(str(tmp_path), config=DataConfig(classes=("dog",)))
    assert data.classes == ("dog",) and data.splits["train"].target(0)["labels"].tolist() == [0]
    assert "4 boxes of classes other than the 1 asked for" in " ".join(data.messages)
    with pytest.raises(DataError, match="has no class 'bird'"):
        open_data(str(tmp_path), config=DataConfig(classes=("bird",)))


def test_novel_classes_are_hidden_in_training_alone(tmp_path: Path) -> None:
    write(tmp_path)
    plain = open_data(str(tmp_path))
    data = open_data(str(tmp_path), config=DataConfig(novel=("dog",)))
    assert data.novel == ("dog",) and data.classes == plain.classes and data.fingerprint != plain.fingerprint
    assert data.splits["train"].target(0)["labels"].tolist() == [0]
    assert data.splits["val"].target(0)["labels"].tolist() == [1, 0]
    assert len(data.splits["train"]) == 3 and data.splits["train"].load(0).size == SIZE
    limited = open_data(str(tmp_path), config=DataConfig(novel=("dog",), limit_train=2))
    assert len(limited.splits["train"]) == 2
    with pytest.raises(RequestError, match="no class 'dgo'") as caught:
        open_data(str(tmp_path), config=DataConfig(novel=("dgo",)))
    assert "dog" in str(caught.value)
    with pytest.raises(RequestError, match="all classes"):
        open_data(str(tmp_path), config=DataConfig(novel=("dog", "cat")))
    with pytest.raises(RequestError, match="no boxes to leave out"):
        open_data("shapes", config=DataConfig(novel=("star",)))


# Bad input ------------------------------------------------------------------------------------------------------------


def test_boxes_that_are_no_use_are_left_out_and_listed(tmp_path: Path, capsys) -> None:
    odd = [(1, [5, 5, 0, 4], 2), (1, [5, 5, 4, -1], 2), (1, [50, 5, 4, 4], 2), (1, [30, 20, 20, 5], 9)]
    odd += [(1, [1, 2, 3], 2), (1, [1, 2, "3", 4], 2), (1, [1, 2, float("nan"), 4], 2), (1, [1, 2, 3, 4], 5)]
    good = [(0, [n, n, 5, 5], 2) for n in range(12)]
    data = open_data(str(write(tmp_path, table(["a.png", "b.png"], good + odd), splits=("train",))))
    target = data.splits["all"].target(1)
    assert target["boxes"].tolist() == [[30, 20, 40, 25]] and target["labels"].tolist() == [1], "cut at the edge"
    said = " ".join(data.messages)
    assert "7 boxes of train are left out (2 no area, 1 outside the image, 1 unknown class, 3 wrong format)" in said
    assert "1 boxes of train reach outside" in said and "'visionkd data check' lists" in said
    report = check_data(data)
    assert report.problems and report.counts()["wrong_boxes"] == 8
    kinds = sorted(reason.split(":")[0] for _, reason in report.wrong_boxes)
    assert kinds.count("no area") == 2 and kinds.count("wrong format") == 3 and "reaches outside the image" in kinds
    assert all(name == "all: train/b.png" for name, _ in report.wrong_boxes)
    assert report.boxes == {"cat": 12, "dog": 1, "images without boxes": 0}


def test_annotations_of_missing_images(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train" / "b.png").unlink()  # val has an image of this name, which is another one
    data = open_data(str(tmp_path))
    assert [data.splits["train"].name(index) for index in range(2)] == ["train/a.png", "train/c.png"]
    assert len(data.splits["train"]) == 2 and "1 images that" in " ".join(data.messages)
    assert check_data(data).wrong_boxes == (("train: b.png", "its image is missing: [0, 0, 40, 30]"),)
    for path in (tmp_path / "train").glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="none of the 3 images that .* names is there") as caught:
        open_data(str(tmp_path))
    assert "beside the file" in str(caught.value)


@pytest.mark.parametrize(("boxes", "message"), [
    ([(0, [10, 5, 38, 28], 2), (1, [20, 10, 40, 30], 2), (2, [5, 5, 39, 29], 9)], "within it if read as two corners"),
    ([(0, [0.1, 0.2, 0.5, 0.5], 2), (1, [0.3, 0.1, 0.2, 0.9], 9)], "no number of any box is above 1"),
    ([(0, [5, 5, 0, 0], 2), (1, [5, 5, 0, 0], 2), (2, [1, 1, 2, 2], 2)], "2 of 3 boxes of train are no use: no area"),
    ([(0, [1, 1, 2, 2], 4), (1, [1, 1, 2, 2], 4), (2, [1, 1, 2, 2], 2)], "unknown class, such as category id 4"),
    ([], "no image has a box"),
])  # fmt: skip
def test_a_file_that_means_something_else(tmp_path: Path, boxes: list, message: str) -> None:
    write(tmp_path, table(["a.png", "b.png", "c.png"], boxes), splits=("train",))
    with pytest.raises(DataError, match=message) as caught:
        open_data(str(tmp_path))
    assert caught.value.hint


@pytest.mark.parametrize(("change", "message"), [
    ({"categories": []}, "lists no categories"),
    ({"categories": [{"id": 1}]}, "a category without id or name"),
    ({"categories": [{"id": 2, "name": "cat"}, {"id": 9, "name": "cat"}]}, "several category ids for one name: 'cat'"),
])  # fmt: skip
def test_categories_that_do_not_do(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path, table(["a.png"], BOXES[:2], **change))
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path))


def test_splits_with_different_categories(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "horse"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="category id 2 is 'cat' and 'horse'"):
        open_data(str(tmp_path))


def test_damaged_and_doubled_files(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "annotations" / "instances_train.json"
    text = path.read_text()
    (tmp_path / "annotations" / "train_more.json").write_text(text)
    with pytest.raises(RequestError, match="2 files of boxes for train"):
        open_data(str(tmp_path))
    (tmp_path / "annotations" / "train_more.json").unlink()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="no JSON") as caught:
        open_data(str(tmp_path))
    assert "written to its end" in str(caught.value)


def test_an_image_of_another_size_than_its_boxes_were_drawn_on(tmp_path: Path) -> None:
    write(tmp_path)
    picture(tmp_path / "train" / "a.png", 5, (41, 30))
    data = open_data(str(tmp_path))
    with pytest.raises(DataError, match=r"'train/a.png' has 41 x 30 pixels, and its boxes were drawn on 40 x 30"):
        data.splits["train"].load(0)
    assert [name for name, _ in check_data(data).wrong_boxes] == ["train: train/a.png"]


def test_what_is_asked_for_has_to_be_there(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "1.png", 0)
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "1.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    for task in ("detection", "auto"):
        with pytest.raises(VisionKDError, match="text files|COCO JSON"):
            open_data(str(tmp_path), task=task)
    root = write(tmp_path / "coco")
    with pytest.raises(RequestError, match="looks like data for detection, not for classification"):
        open_data(str(root), task="classification")
    with pytest.raises(DataError, match="no pictures with maps"):
        open_data(str(root), task="segmentation")
    with pytest.raises(RequestError, match="'cifar10' has no boxes"):
        open_data("cifar10", task="detection")
