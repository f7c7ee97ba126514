from __future__ import annotations

import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from visionkd.config.schema import DataConfig, ShapesConfig
from visionkd.data.check import check_data
from visionkd.data.open import open_data


def test_good_data_has_no_problems(split):
    steps = []
    report = check_data(open_data(str(split)), progress=lambda done, total: steps.append((done, total)))
    assert not report.problems and report.num_images == {"train": 13, "val": 5}
    assert not any(report.counts().values()) and steps[-1] == (18, 18)


@pytest.fixture
def bad(tmp_path, make_folder, picture):
    root = make_folder(
        tmp_path / "bad", {"train/cat": 6, "train/dog": 7, "train/eel": 1, "train/fox": 0, "val/cat": 2, "val/dog": 3}
    )
    train, val = root / "train", root / "val"
    (train / "cat" / "empty.png").write_bytes(b"")
    (train / "cat" / "text.jpg").write_bytes(b"not an image")
    picture(900, (64, 64)).save(train / "cat" / "cut.jpg", quality=95)
    content = (train / "cat" / "cut.jpg").read_bytes()
    (train / "cat" / "cut.jpg").write_bytes(content[: len(content) // 2])
    shutil.copy(train / "cat" / "000.png", train / "cat" / "same.png")
    shutil.copy(train / "cat" / "001.png", train / "dog" / "other.png")
    shutil.copy(train / "dog" / "000.png", val / "dog" / "leak.png")
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(train / "dog" / "grey.png")
    picture(901, (15, 40)).save(val / "cat" / "tiny.png")
    return root


def expect_all(report, prefix=""):
    def named(*names):
        return tuple(f"{name.split('/')[0]}: {prefix}{name}" for name in names)

    assert {name for name, _ in report.unreadable} == set(named("train/cat/empty.png", "train/cat/text.jpg"))
    assert all("cannot read" in reason for _, reason in report.unreadable)
    assert report.truncated == named("train/cat/cut.jpg")
    assert report.duplicates == (named("train/cat/000.png", "train/cat/same.png"),)
    assert report.conflicting == (named("train/cat/001.png", "train/dog/other.png"),)
    assert report.leakage == (named("train/dog/000.png", "val/dog/leak.png"),)
    assert report.grey == named("train/dog/grey.png")
    assert report.tiny == ((*named("val/cat/tiny.png"), 15, 40),)
    assert set(report.empty_classes) == {"train: fox", "val: eel"} and report.one_image_classes == ("eel",)
    assert report.problems and report.counts()["unreadable"] == 2


def test_everything_bad_is_found(bad):
    expect_all(check_data(open_data(str(bad))))


def test_everything_bad_is_found_inside_an_archive(bad, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for file in sorted(bad.rglob("*")):
            archive.write(file, file.relative_to(bad))
    expect_all(check_data(open_data(str(tmp_path / "bad.zip"))))


def test_test_split_that_serves_for_validation_is_no_leak(tmp_path, make_folder):
    root = make_folder(tmp_path / "d", {"train/a": 3, "train/b": 3, "test/a": 3, "test/b": 3})
    for config in (DataConfig(), DataConfig(limit_val=2)):
        report = check_data(open_data(str(root), config=config))
        assert not report.problems and report.num_images == {"train": 6, "test": 6}


def test_held_out_share_is_checked_as_a_whole(flat):
    report = check_data(open_data(str(flat)))
    assert report.num_images == {"all": 30} and not report.problems
    shutil.copy(flat / "cat" / "000.png", flat / "cat" / "same.png")
    assert check_data(open_data(str(flat))).duplicates == (("all: cat/000.png", "all: cat/same.png"),)


def test_grey_and_tiny_images_are_no_problem(tmp_path, make_folder):
    root = make_folder(tmp_path / "d", {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1}, size=(8, 8))
    report = check_data(open_data(str(root)))
    assert len(report.tiny) == 6 and not report.problems


def test_sources_without_files():
    config = DataConfig(shapes=ShapesConfig(num_train=16, num_val=8))
    report = check_data(open_data("shapes", config=config, img_size=32))
    assert not report.problems and report.num_images == {"train": 16, "val": 8}
