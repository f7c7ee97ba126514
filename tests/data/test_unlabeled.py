from __future__ import annotations

import pickle
import shutil
import tarfile

import numpy as np
import pytest

from visionkd.config.schema import AugmentConfig, DataConfig
from visionkd.data.check import check_data
from visionkd.data.layout import read_layout
from visionkd.data.loader import train_loader
from visionkd.data.open import open_data
from visionkd.data.subset import SubsetSource, stratified_limit, stratified_split, stratified_subset, targets_of
from visionkd.data.transforms import TrainTransform
from visionkd.data.unlabeled import (
    JoinedSource,
    RelabeledSource,
    has_labels,
    open_unlabeled,
    surest_of_each_class,
    with_unlabeled,
)
from visionkd.errors import DataError, RequestError

CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def pool(tmp_path, make_folder):
    return make_folder(tmp_path / "pool", {".": 2, "a": 3, "a/b/c": 4, "train/x": 1, ".hidden": 2})


def test_a_pool_is_every_image_in_whatever_folder(pool):
    opened = open_unlabeled(pool)
    source = opened.sources["all"]
    assert opened.classes == () and len(source) == 10 and not has_labels(source)
    assert {source.target(index) for index in range(10)} == {-1}
    assert "a/b/c/000.png" in {source.name(index) for index in range(10)}


@pytest.mark.parametrize("name", ["pool.tar", "pool.tar.gz", "pool.zip"])
def test_a_pool_may_be_an_archive(pool, name, monkeypatch, tmp_path):
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    path = pool.parent / name
    if name.endswith("zip"):
        shutil.make_archive(str(path.with_suffix("")), "zip", pool)
    else:
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            archive.add(pool, arcname=".")
    source = open_unlabeled(path).sources["all"]
    assert len(source) == 10 and source.load(0).size == (20, 16)


def test_folders_of_other_tasks_are_a_pool_too(tmp_path, make_folder):
    root = make_folder(tmp_path / "yolo", {"images": 3})
    (root / "labels").mkdir()
    (root / "labels" / "000.txt").write_text("0 0.5 0.5 1 1")
    assert len(open_unlabeled(root).sources["all"]) == 3


def test_a_pool_without_images_is_refused(tmp_path):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("none")
    with pytest.raises(DataError, match="no images in"):
        open_unlabeled(tmp_path / "empty")
    with pytest.raises(RequestError, match="--unlabeled.*does not exist"):
        open_unlabeled(tmp_path / "nowhere")


def test_joined_sources_are_numbered_through(split, pool):
    labeled, more = open_data(str(split)).splits["train"], open_unlabeled(pool).sources["all"]
    joined = pickle.loads(pickle.dumps(JoinedSource([labeled, SubsetSource(more, np.array([7, 2]))])))
    assert len(joined) == 15 and targets_of(joined).tolist() == [*targets_of(labeled).tolist(), -1, -1]
    assert joined.name(0) == labeled.name(0) and joined.name(13) == more.name(7) and joined.name(14) == more.name(2)
    assert joined.load(14).tobytes() == more.load(2).tobytes() and joined.target(14) == -1
    for index in (-1, 15):
        with pytest.raises(IndexError):
            joined.load(index)


def test_labelled_and_unlabelled_images_share_a_loader(split, pool):
    data = with_unlabeled(open_data(str(split)), open_unlabeled(pool))
    assert len(data.splits["train"]) == 23 and len(data.splits["labeled"]) == 13
    transform = TrainTransform(AugmentConfig(crop="none"), img_size=(16, 16))
    loader = train_loader(data.splits["train"], transform, batch_size=5, seed=0, workers=0, cache="ram")
    seen = {int(i): int(t) for batch in loader for i, t in zip(batch["index"], batch["target"], strict=True)}
    assert len(seen) == 20 and {t for i, t in seen.items() if i >= 13} == {-1}
    assert all(t == data.splits["labeled"].target(i) for i, t in seen.items() if i < 13)


def test_what_is_taken_of_the_pool_belongs_to_the_identity_of_the_data(split, pool):
    data, opened = open_data(str(split)), open_unlabeled(pool)
    prints = {
        data.fingerprint,
        with_unlabeled(data, opened).fingerprint,
        with_unlabeled(data, opened, np.arange(4)).fingerprint,
        with_unlabeled(data, opened, np.arange(1, 5)).fingerprint,
    }
    (pool / "a" / "000.png").unlink()
    prints.add(with_unlabeled(data, open_unlabeled(pool), np.arange(4)).fingerprint)
    assert len(prints) == 5


def test_relabelled_source_keeps_images_and_names(split):
    val = open_data(str(split)).splits["val"]
    other = RelabeledSource(val, np.full(len(val), 1))
    assert targets_of(other).tolist() == [1] * 5 and other.name(2) == val.name(2)
    assert other.load(2).tobytes() == val.load(2).tobytes()
    with pytest.raises(ValueError, match="targets for"):
        RelabeledSource(val, np.zeros(3))


# Data that has no labels at all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, sizes",
    [
        ({".": 20}, {"train": 18, "val": 2, "all": 20}),
        ({"pictures": 20}, {"train": 18, "val": 2, "all": 20}),
        ({".": 5, "pictures": 15}, {"train": 18, "val": 2, "all": 20}),
        ({"train": 8, "val": 3}, {"train": 8, "val": 3}),
        ({"train": 8, "test": 3}, {"train": 8, "val": 3, "test": 3}),
        ({"train/all": 8, "val/all": 3}, {"train": 8, "val": 3}),
    ],
)
def test_images_without_class_folders(tmp_path, make_folder, layout, sizes):
    root = make_folder(tmp_path / "plain", layout)
    data = open_data(str(root), classes=lambda: CLASSES)
    assert data.classes == CLASSES and {name: len(source) for name, source in data.splits.items()} == sizes
    assert not any(has_labels(source) for source in data.splits.values())
    with pytest.raises(DataError) as caught:
        open_data(str(root))
    assert "--method ssld" in caught.value.hint


def test_held_out_images_of_unlabelled_data_are_always_the_same(tmp_path, make_folder):
    root = str(make_folder(tmp_path / "plain", {".": 20}))
    first, again, other = (open_data(root, seed=seed, classes=lambda: CLASSES).splits["val"] for seed in (0, 0, 1))
    assert np.array_equal(first.indices, again.indices) and not np.array_equal(first.indices, other.indices)
    limited = open_data(root, config=DataConfig(limit_train=4), classes=lambda: CLASSES)
    assert len(limited.splits["train"]) == 4 and "train is limited to 4 of 18 images." in limited.messages


def test_class_folders_are_classes_even_where_labels_are_optional(split):
    data = open_data(str(split), classes=lambda: pytest.fail("the data has classes of its own"))
    assert data.classes == ("cat", "dog") and has_labels(data.splits["train"])


def test_folders_that_are_not_all_splits_are_classes(tmp_path, make_folder):
    root = make_folder(tmp_path / "vehicles", {"bus": 4, "car": 4, "train": 4})
    assert open_data(str(root), classes=lambda: CLASSES).classes == ("bus", "car", "train")


def test_splits_without_class_folders_are_no_classes():
    with pytest.raises(DataError, match="holds images in test, train, but no class folders"):
        read_layout(["train/a.jpg", "test/b.jpg"], ["train", "test"], where="x")


def test_parts_of_unlabelled_samples():
    targets = np.array([-1] * 10 + [0] * 10)
    train, val = stratified_split(targets, 0.2, 0)
    assert sorted(np.concatenate([train, val])) == list(range(20)) and (targets[val] == -1).sum() == 2
    assert (targets[stratified_limit(targets, 6, 0)] == -1).sum() == 3


def test_check_of_unlabelled_data(tmp_path, make_folder):
    root = make_folder(tmp_path / "plain", {".": 6})
    shutil.copy(root / "000.png", root / "copy.png")
    report = check_data(open_data(str(root), classes=lambda: ()))
    assert report.num_images == {"all": 7} and len(report.duplicates) == 1 and not report.empty_classes


# The surest of each class ---------------------------------------------------------------------------------------------


def test_no_class_gets_more_than_asked_and_the_surest_win():
    rng = np.random.default_rng(0)
    classes, scores = rng.integers(-1, 5, 400), rng.random(400)
    chosen = surest_of_each_class(classes, scores, 30)
    assert np.array_equal(chosen, np.unique(chosen)) and not (classes[chosen] == -1).any()
    for label in range(5):
        own = np.flatnonzero(classes == label)
        kept = np.intersect1d(own, chosen)
        assert len(kept) == 30 < len(own)
        assert scores[kept].min() >= np.delete(scores[own], np.searchsorted(own, kept)).max()


def test_a_rare_class_gives_what_it_has_and_ties_are_broken_by_place():
    classes, scores = np.array([0, 1, 0, 0]), np.array([0.5, 0.1, 0.5, 0.5], np.float32)
    assert surest_of_each_class(classes, scores, 2).tolist() == [0, 1, 2]


def test_stratified_subset_of_a_pool(pool):
    assert len(stratified_subset(open_unlabeled(pool).sources["all"], 4, seed=0)) == 4
