from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import pytest

from visionkd.data.folder import FolderSource, Names, open_folder
from visionkd.data.layout import read_layout
from visionkd.errors import DataError, RequestError, UnreadableImageError


def test_names_survive_odd_bytes():
    names = ["a/b.png", "", "ünï/ç.jpg", os.fsdecode(b"bad\xff.png")]
    table = pickle.loads(pickle.dumps(Names(names)))
    assert len(table) == 4 and list(table) == names
    with pytest.raises(IndexError):
        table[4]


def test_split_layout(split):
    opened = open_folder(split)
    assert opened.classes == ("cat", "dog") and opened.name == "pets"
    assert {name: len(source) for name, source in opened.sources.items()} == {"train": 13, "val": 5}
    train = opened.sources["train"]
    assert train.name(0) == "train/cat/000.png" and train.target(0) == 0 and train.target(12) == 1
    assert train.load(3).size == (20, 16) and train.load(3).mode == "RGB"
    assert train.read(0) == (split / "train/cat/000.png").read_bytes()
    assert opened.messages == ()


@pytest.mark.parametrize("val, test", [("valid", "test"), ("validation", "testing"), ("Val", "Test")])
def test_split_names(tmp_path, make_folder, val, test):
    root = make_folder(tmp_path, {f"{name}/{label}": 1 for name in ("train", val, test) for label in "ab"})
    assert set(open_folder(root).sources) == {"train", "val", "test"}


def test_two_folders_for_one_split(tmp_path, make_folder):
    root = make_folder(tmp_path, {f"{name}/{label}": 1 for name in ("train", "val", "valid") for label in "ab"})
    with pytest.raises(RequestError, match="two folders for one split"):
        open_folder(root)


def test_flat_layout(flat):
    opened = open_folder(flat)
    assert opened.classes == ("cat", "dog") and list(opened.sources) == ["all"] and len(opened.sources["all"]) == 30


def test_flat_layout_with_a_class_named_like_a_split(tmp_path, make_folder):
    opened = open_folder(make_folder(tmp_path, {"bus": 2, "car": 2, "train": 2}))
    assert opened.classes == ("bus", "car", "train") and list(opened.sources) == ["all"]


def test_nested_images_belong_to_their_class(tmp_path, make_folder):
    opened = open_folder(make_folder(tmp_path, {"train/cat/a/b": 2, "train/cat": 1, "train/dog/x": 1}))
    assert opened.classes == ("cat", "dog") and opened.sources["train"].targets.tolist() == [0, 0, 0, 1]


def test_wrapping_folder_is_looked_through(tmp_path, make_folder):
    make_folder(tmp_path, {"outer/inner/train/cat": 1, "outer/inner/train/dog": 1})
    assert open_folder(tmp_path).classes == ("cat", "dog")
    make_folder(tmp_path / "b", {"outer/cat": 1, "outer/dog": 1})
    assert open_folder(tmp_path / "b").classes == ("cat", "dog")


def test_rubbish_is_left_out(split):
    for name in (".DS_Store", "train/.DS_Store", "train/cat/Thumbs.db", "train/cat/notes.txt", "train/cat/._000.png"):
        (split / name).write_bytes(b"x")
    (split / ".git").mkdir()
    (split / ".git" / "a.png").write_bytes(b"x")
    (split / "train" / "cat" / "loop").symlink_to(split)
    opened = open_folder(split)
    assert len(opened.sources["train"]) == 13 and opened.messages == ()


def test_images_outside_classes_are_mentioned(split, picture):
    picture(900).save(split / "cover.png")
    picture(901).save(split / "train" / "loose.png")
    (split / "extra" / "cat").mkdir(parents=True)
    picture(902).save(split / "extra" / "cat" / "a.png")
    assert any(message.startswith("3 images outside") for message in open_folder(split).messages)


def test_empty_class_is_mentioned_and_remembered(split, flat, make_folder, tmp_path):
    (split / "val" / "bird").mkdir()
    opened = open_folder(split)
    assert opened.classes == ("cat", "dog")
    assert "val has no images of 'bird'." in opened.messages
    assert opened.sources["val"].empty_classes == ("bird",)
    root = make_folder(tmp_path / "flat", {"cat": 1, "dog": 1, "eel": 0})
    assert open_folder(root).sources["all"].empty_classes == ("eel",)


def test_class_missing_from_val_is_mentioned(tmp_path, make_folder):
    opened = open_folder(make_folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1}))
    assert opened.classes == ("a", "b") and "val has no images of 'b'." in opened.messages


def test_class_missing_from_train_is_refused(tmp_path, make_folder):
    root = make_folder(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 0, "val/c": 1})
    with pytest.raises(DataError, match="val has classes that train lacks: 'c'"):
        open_folder(root)


@pytest.mark.parametrize(
    "layout, words",
    [
        ({}, "no images"),
        ({"train/cat": 0, "train/dog": 0}, "no images"),
        ({".": 3}, "3 images but no class folders"),
        ({"cat": 3}, "one class, 'cat'"),
        ({"train/cat": 3}, "one class, 'cat'"),
    ],
)
def test_unusable_folders(tmp_path, make_folder, layout, words):
    with pytest.raises(DataError, match=words) as caught:
        open_folder(make_folder(tmp_path / "x", layout or {".": 0}))
    assert "<class>/*.jpg" in caught.value.hint and caught.value.exit_code == 1


@pytest.mark.parametrize(
    "files, task",
    [
        (["JPEGImages/1.jpg", "Annotations/1.xml"], "detection"),
        (["JPEGImages/1.jpg", "Annotations/1.xml", "SegmentationClass/1.png"], "segmentation"),
        (["wrapper/train/images/1.jpg", "wrapper/train/labels/1.png"], "segmentation"),
        (["train/images/1.jpg", "train/labels/1.txt"], "detection"),
        (["images/train/1.jpg", "labels/train/1.txt"], "detection"),
        (["images/1.jpg", "masks/1.png"], "segmentation"),
        (["train/1.png", "trainannot/1.png"], "segmentation"),
        (["train2017/1.jpg", "annotations/instances_train2017.json"], "detection"),
        (["train/1.jpg", "train/_annotations.coco.json"], "detection"),
    ],
)
def test_other_tasks_are_refused(files, task):
    folders = {"/".join(file.split("/")[:depth]) for file in files for depth in range(1, file.count("/") + 1)}
    with pytest.raises(RequestError, match=f"looks like data for {task}, not for classification"):
        read_layout(files, folders, where="x")


def test_classes_named_like_other_tasks_are_allowed(tmp_path, make_folder):
    assert open_folder(make_folder(tmp_path, {"train/masks": 1, "train/labels": 1})).classes == ("labels", "masks")


def test_fingerprint_follows_the_samples(split, picture):
    def now() -> str:
        return open_folder(split).fingerprint

    before = now()
    os.utime(split / "train/cat/000.png", (1, 1))
    (split / "notes.txt").write_text("x")
    assert now() == before
    picture(900).save(split / "train/cat/extra.png")
    assert now() != before
    (split / "train/cat/extra.png").unlink()
    assert now() == before
    content = bytearray((split / "val/dog/000.png").read_bytes())
    content[-20] ^= 1
    (split / "val/dog/000.png").write_bytes(content)  # another file of the same length
    assert now() != before


def test_source_reports_missing_files(split):
    source = pickle.loads(pickle.dumps(open_folder(split).sources["train"]))
    assert isinstance(source, FolderSource)
    (split / "train/cat/000.png").unlink()
    for method in (source.load, source.read):
        with pytest.raises(UnreadableImageError, match="train/cat/000.png.*no such file"):
            method(0)


def test_folder_without_permission(make_folder):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = make_folder(Path(folder), {"train/cat": 1, "train/dog": 1})
        (root / "train" / "cat").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match="cannot list .*cat': permission denied"):
                open_folder(root)
        finally:
            os.seteuid(user)
            (root / "train" / "cat").chmod(0o755)
