from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from visionkd.config.schema import DataConfig, ShapesConfig
from visionkd.data.open import known_names, open_data
from visionkd.data.subset import targets_of
from visionkd.errors import RequestError


def config(**values) -> DataConfig:
    return DataConfig(**values)


def sizes(data) -> dict[str, int]:
    return {name: len(source) for name, source in data.splits.items()}


def test_train_and_val(split):
    data = open_data(str(split), config=config())
    assert sizes(data) == {"train": 13, "val": 5} and data.messages == () and data.task == "classification"


def test_train_and_test_only(tmp_path, make_folder):
    root = make_folder(tmp_path / "d", {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    data = open_data(str(root), config=config())
    assert data.splits["val"] is data.splits["test"]
    assert data.messages == ("There is no validation split: validating on test.",)


def test_test_only_is_enough_for_evaluation(tmp_path, make_folder):
    data = open_data(str(make_folder(tmp_path / "d", {"test/a": 1, "test/b": 1})))
    assert sizes(data) == {"test": 2, "val": 2} and data.messages == ()


@pytest.mark.parametrize("folders", [("cat", "dog"), ("train/cat", "train/dog")])
def test_held_out_split_is_said_aloud(tmp_path, make_folder, folders):
    root = make_folder(tmp_path / "pets", dict(zip(folders, (10, 20), strict=True)))
    data = open_data(str(root), config=config(val_fraction=0.2), seed=7)
    assert sizes(data) == {"train": 24, "val": 6, "all": 30}
    assert data.messages == (
        "There is no validation split: 6 of 30 images are held out, 20% of each class, seed 7; "
        "24 are left to train on.",
    )
    train, val = data.splits["train"], data.splits["val"]
    assert not set(train.indices) & set(val.indices)
    assert targets_of(val).tolist() == [0, 0, 1, 1, 1, 1]
    again = open_data(str(root), config=config(val_fraction=0.2), seed=7)
    other = open_data(str(root), config=config(val_fraction=0.2), seed=8)
    assert again.splits["val"].indices.tolist() == val.indices.tolist() != other.splits["val"].indices.tolist()


def test_one_image_class_stays_in_training_and_is_said_aloud(tmp_path, make_folder):
    root = make_folder(tmp_path, {"cat": 5, "dog": 1})
    data = open_data(str(root), config=config())
    assert set(targets_of(data.splits["train"])) == {0, 1} and set(targets_of(data.splits["val"])) == {0}
    assert "Classes with one image, which stays in training: 'dog'." in data.messages


def test_only_one_image_classes_leave_no_validation(tmp_path, make_folder):
    data = open_data(str(make_folder(tmp_path, {"cat": 1, "dog": 1})), config=config())
    assert sizes(data) == {"train": 2, "all": 2}
    assert "none is left to validate on" in data.messages[0]


def test_val_split_is_taken_at_its_word(tmp_path, make_folder):
    layout = {f"{name}/{label}": 2 for name in ("train", "val", "test") for label in "ab"}
    root = str(make_folder(tmp_path / "d", layout))
    data = open_data(root, config=config(val_split="test"))
    assert data.splits["val"] is data.splits["test"]
    assert data.messages == ("Validating on the split 'test'.",)
    assert "trained on too" in open_data(root, config=config(val_split="train")).messages[0]
    with pytest.raises(RequestError, match="'tset' is not a split of this data. Did you mean 'test'") as caught:
        open_data(root, config=config(val_split="tset"))
    assert "Found: test, train, val." in str(caught.value)


def test_val_split_all_of_a_flat_folder(flat):
    data = open_data(str(flat), config=config(val_split="all"))
    assert sizes(data) == {"all": 30, "val": 30, "train": 30} and "trained on too" in data.messages[0]


def test_limits_are_spread_over_the_classes(split):
    data = open_data(str(split), config=config(limit_train=6, limit_val=2))
    assert sizes(data) == {"train": 6, "val": 2}
    assert targets_of(data.splits["train"]).tolist() == [0, 0, 0, 1, 1, 1]
    assert "train is limited to 6 of 13 images, spread over the classes." in data.messages
    assert any(
        "cannot show all 2 classes" in text for text in open_data(str(split), config=config(limit_train=1)).messages
    )
    assert open_data(str(split), config=config(limit_train=13)).messages == ()


def test_limit_does_not_touch_the_test_split(tmp_path, make_folder):
    root = make_folder(tmp_path / "d", {"train/a": 2, "train/b": 2, "test/a": 3, "test/b": 3})
    assert sizes(open_data(str(root), config=config(limit_val=2))) == {"train": 4, "test": 6, "val": 2}


def test_fingerprint_follows_the_choice_of_training_samples(flat):
    """Stored teacher labels are numbered within the training split."""

    def now(seed: int = 0, **values) -> str:
        return open_data(str(flat), config=config(**values), seed=seed).fingerprint

    different = {now(), now(seed=1), now(val_fraction=0.3), now(limit_train=10), now(limit_train=11)}
    assert len(different) == 5
    assert now() == now(limit_val=2)


def test_shapes_follow_the_configuration():
    data = open_data("shapes", config=config(shapes=ShapesConfig(num_train=20, num_val=9)), img_size=48)
    assert sizes(data) == {"train": 20, "val": 9} and len(data.classes) == 8
    assert data.splits["train"].load(0).size == (48, 48)
    assert open_data("shapes", img_size=8).splits["val"].load(0).size == (32, 32)
    assert open_data("shapes", img_size=2000).splits["val"].size == 640
    sized = config(shapes=ShapesConfig(size=64))
    assert open_data("shapes", config=sized, img_size=224).splits["train"].size == 64
    assert open_data("shapes", config=sized).fingerprint != open_data("shapes").fingerprint


def test_shapes_splits_share_no_scene():
    data = open_data("shapes", config=config(shapes=ShapesConfig(num_train=64, num_val=64)), img_size=32)
    scenes = [{source.load(index).tobytes() for index in range(64)} for source in data.splits.values()]
    assert not scenes[0] & scenes[1] and len(scenes[0]) == 64


def test_unknown_names():
    with pytest.raises(RequestError, match="Did you mean 'cifar10'") as caught:
        open_data("cifar-10")
    assert caught.value.exit_code == 2 and "visionkd data list" in str(caught.value)
    with pytest.raises(RequestError, match="neither a directory, nor an archive, nor a known data set"):
        open_data("/no/such/place")
    with pytest.raises(RequestError, match="'pose' is unknown"):
        open_data("shapes", task="pose")
    with pytest.raises(RequestError, match="'cifar10' has no maps of classes"):
        open_data("cifar10", task="segmentation")


def test_known_names():
    assert {"shapes", "cifar10", "cifar100", "flowers102", "imagenette"} <= set(known_names())


def test_directory_named_like_a_known_set(tmp_path, make_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    assert open_data("shapes").classes[0] == "circle"  # an empty folder is nobody's data
    make_folder(tmp_path / "shapes", {"a": 3, "b": 3})
    data = open_data("shapes")
    assert data.classes == ("a", "b") and "directory of that name" in data.messages[0]


def test_archive(split, tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for file in sorted(split.rglob("*.png")):
            archive.write(file, file.relative_to(split))
    assert sizes(open_data(str(tmp_path / "pets.zip"))) == {"train": 13, "val": 5}


def test_sources_need_no_torch(split):
    """A device without torch evaluates through these modules."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "from visionkd.data.open import open_data\nfrom visionkd.data.check import check_data\n"
        f"check_data(open_data({str(split)!r}))\nopen_data('shapes').splits['val'].load(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
