"""Pictures with maps of classes: layouts, decoding, bad input, and what 'data check' says about them."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionkd.config.schema import DataConfig, ShapesConfig
from visionkd.data.check import check_data
from visionkd.data.open import open_data
from visionkd.data.segmentation import DenseSource, decode_map
from visionkd.errors import DataError, RequestError, UnreadableImageError, VisionKDError

SIZE = (20, 16)  # width and height


def picture(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def values_of(seed: int, num_classes: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Every class is in each map."""
    values = np.random.default_rng(seed).integers(0, num_classes, (size[1], size[0])).astype(np.uint8)
    values[0, :num_classes] = np.arange(num_classes)
    values[-1, -1] = 255
    return values


def map_file(path: Path, values: np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image = image.convert("P") if image.mode == "P" else Image.frombytes("P", image.size, values.tobytes())
        image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(path)


def write(
    root: Path,
    pattern: tuple[str, str] = ("{split}/images/{name}.jpg", "{split}/labels/{name}.png"),
    *,
    splits: dict[str, int] | None = None,
    palette: bool = False,
) -> Path:
    seed = 0
    for split, count in (splits or {"train": 4, "val": 2, "test": 2}).items():
        for number in range(count):
            name = f"{split}_{number}"
            picture(root / pattern[0].format(split=split, name=name), seed)
            map_file(root / pattern[1].format(split=split, name=name), values_of(seed), palette=palette)
            seed += 1
    return root


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    root = write(tmp_path / "streets")
    (root / "classes.txt").write_text("road\nsky\ntree\n")
    return root


def test_splits_of_images_and_labels(streets: Path) -> None:
    data = open_data(str(streets))
    assert (data.task, data.name, data.classes) == ("segmentation", "streets", ("road", "sky", "tree"))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 4, "val": 2, "test": 2}
    source = data.splits["train"]
    assert source.name(1) == "train/images/train_1.jpg" and source.load(1).size == SIZE
    assert source.target(1).dtype == np.uint8 and (source.target(1) == values_of(1)).all()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (("images/{split}/{name}.jpg", "labels/{split}/{name}.png"), {"train", "val", "test"}),
        (("{split}/image/{name}.png", "{split}/masks/{name}_mask.png"), {"train", "val", "test"}),
        (("{split}/{name}.png", "{split}annot/{name}.png"), {"train", "val", "test"}),
        (("one/two/{split}/images/a/{name}.jpg", "one/two/{split}/labels/a/{name}.png"), {"train", "val", "test"}),
        (("images/{name}.jpg", "labels/{name}.png"), {"train", "val", "all"}),
    ],
)  # fmt: skip
def test_other_layouts_mean_the_same(tmp_path: Path, pattern: tuple[str, str], names: set[str]) -> None:
    data = open_data(str(write(tmp_path / "x", pattern)), config=DataConfig(classes=("a", "b", "c")))
    assert data.task == "segmentation" and set(data.splits) == names
    source = data.splits["all" if "all" in names else "train"]
    for index in range(len(source)):
        seed = {"train": 0, "val": 4, "test": 6}[Path(source.name(index)).stem.split("_")[0]]
        assert (source.target(index) == values_of(seed + int(Path(source.name(index)).stem[-1]))).all()


@pytest.mark.parametrize("place", ["train", "."])
def test_a_folder_of_boxes_beside_the_maps_is_not_taken_for_them(tmp_path: Path, place: str) -> None:
    pattern = (f"{place}/images/{{name}}.jpg", f"{place}/masks/{{name}}.png")
    root = write(tmp_path / "x", pattern, splits={"train": 4})
    (root / place / "annotations").mkdir()
    (root / place / "annotations" / "instances.json").write_text("{}")
    data = open_data(str(root), config=DataConfig(classes=("a", "b", "c")))
    assert data.task == "segmentation" and len(data.splits["train"]) + len(data.splits["val"]) == 4
    with pytest.raises(RequestError, match="looks like data for"):
        open_data(str(root), task="classification")


def test_an_archive_means_the_same_as_the_folder(streets: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "streets.tar", "w") as archive:
        archive.add(streets, "streets")
    plain, packed = open_data(str(streets)), open_data(str(tmp_path / "streets.tar"))
    assert (packed.task, packed.classes) == (plain.task, plain.classes)
    for index in range(4):
        assert (packed.splits["train"].target(index) == plain.splits["train"].target(index)).all()
        assert packed.splits["train"].load(index).tobytes() == plain.splits["train"].load(index).tobytes()


def test_the_layout_of_voc(tmp_path: Path) -> None:
    root = write(
        tmp_path / "VOCdevkit" / "VOC2012", ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"), palette=True
    )
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("train_2\ntrain_0\n")
    (lists / "val.txt").write_text("val_1\n")
    (lists / "trainval.txt").write_text("train_2\ntrain_0\nval_1\n")
    (lists / "test.txt").write_text("without_a_map\n")
    data = open_data(str(tmp_path))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 2, "val": 1}
    assert len(data.classes) == 21 and data.classes[15] == "person"
    assert (data.splits["val"].target(0) == values_of(5)).all()
    (lists / "val.txt").write_text("val_7\n")
    with pytest.raises(DataError, match="'ImageSets/Segmentation/val.txt' names 'val_7'|val.txt.*'val_7'"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_the_layout_of_cityscapes(tmp_path: Path, kind: str) -> None:
    from torchvision.datasets import Cityscapes

    train_ids = {each.id: each.train_id for each in Cityscapes.classes if each.id >= 0}
    ids = np.array(sorted(train_ids), dtype=np.uint8).reshape(1, -1)
    wanted = np.array([[min(train_ids[value] % 256, 255) for value in ids[0]]], dtype=np.uint8)
    for split in ("train", "val"):
        stem = f"{split}/town/town_000000_000019"
        picture(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", 0, (ids.size, 1))
        map_file(tmp_path / f"gtFine/{stem}_gtFine_{kind}.png", ids if kind == "labelIds" else wanted)
        map_file(tmp_path / f"gtFine/{stem}_gtFine_instanceIds.png", ids)
        picture(tmp_path / f"gtFine/{stem}_gtFine_color.png", 0)
    data = open_data(str(tmp_path))
    names = {each.train_id: each.name for each in Cityscapes.classes}
    assert data.classes == tuple(names[value] for value in range(19))
    assert (data.splits["train"].target(0) == wanted).all()


@pytest.mark.parametrize("palette", [False, True])
def test_classes_are_counted_where_they_are_not_named(tmp_path: Path, monkeypatch, palette: bool) -> None:
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path / "x", palette=palette)
    first = open_data(str(root))
    assert first.classes == ("class_0", "class_1", "class_2")
    assert any("8 maps tell 3 classes, 0 to 2" in text for text in first.messages)
    assert open_data(str(root)).fingerprint == first.fingerprint
    ignored = open_data(str(root), config=DataConfig(ignore=(2,)))
    assert len(ignored.classes) == 2 and ignored.fingerprint != first.fingerprint
    assert set(np.unique(ignored.splits["train"].target(0))) == {0, 1, 255}


def test_a_class_called_unlabelled_is_none(streets: Path) -> None:
    (streets / "classes.txt").write_text("# in the order of the values\nroad\nsky\nUnlabelled\n\n")
    data = open_data(str(streets))
    assert data.classes == ("road", "sky") and any(
        "'Unlabelled', counts as 'no label'" in text for text in data.messages
    )
    assert set(np.unique(data.splits["train"].target(0))) == {0, 1, 255}


def test_replacing_a_map_changes_the_fingerprint(streets: Path) -> None:
    before = open_data(str(streets)).fingerprint
    map_file(streets / "val/labels/val_0.png", values_of(99))
    assert open_data(str(streets)).fingerprint != before


def test_limits_and_held_out_parts(tmp_path: Path) -> None:
    root = write(tmp_path / "x", splits={"train": 10})
    data = open_data(str(root), config=DataConfig(classes=("a", "b", "c"), limit_train=5, val_fraction=0.2))
    assert (len(data.splits["train"]), len(data.splits["val"])) == (5, 2)
    names = {data.splits[split].name(index) for split in ("train", "val") for index in range(len(data.splits[split]))}
    assert len(names) == 7 and not any("classes" in text for text in data.messages)


def test_sources_travel_to_other_processes(streets: Path) -> None:
    source = pickle.loads(pickle.dumps(open_data(str(streets)).splits["train"]))
    assert isinstance(source, DenseSource) and (source.target(2) == values_of(2)).all()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_a_value_outside_of_the_classes_is_named_with_its_file(streets: Path) -> None:
    values = values_of(0)
    values[3, 4], values[5, 5] = 7, 200
    map_file(streets / "train/labels/train_0.png", values)
    with pytest.raises(DataError, match=r"'train/labels/train_0.png' has values .* none of the 3 classes: 7, 200"):
        open_data(str(streets)).splits["train"].target(0)


def test_colour_pictures_are_no_maps(streets: Path) -> None:
    picture(streets / "train/labels/train_1.png", 5)
    with pytest.raises(DataError, match=r"'train/labels/train_1.png' is a picture of mode RGB"):
        open_data(str(streets)).splits["train"].target(1)
    (streets / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"'train/labels/train_1.png' is a picture of mode RGB"):
        open_data(str(streets))


def remove_all(folder: Path, *, folder_too: bool = False) -> None:
    for file in folder.iterdir():
        file.unlink()
    if folder_too:
        folder.rmdir()


BROKEN: dict[str, Callable[[Path], object]] = {
    r"1 images of train have no map .*'train/images/train_1.jpg'": lambda root: (
        root / "train/labels/train_1.png"
    ).unlink(),
    r"1 maps of val have no image .*'val/labels/val_0.png'": lambda root: (root / "val/images/val_0.jpg").unlink(),
    r"the split 'val' has 2 images and no maps: none in 'val/labels'": lambda root: remove_all(root / "val/labels"),
    r"the split 'val' has 2 images and no maps: no folder .* beside 'val/images'": lambda root: remove_all(
        root / "val/labels", folder_too=True
    ),
    r"'train/labels/train_1.jpg': a format that changes values": lambda root: (
        root / "train/labels/train_1.png"
    ).rename(root / "train/labels/train_1.jpg"),
    "1 of them; 2 to 254 are allowed": lambda root: (root / "classes.txt").write_text("road\n"),
    "'road' is there twice": lambda root: (root / "classes.txt").write_text("road\nsky\nroad\n"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_go_together_is_named(streets: Path, message: str) -> None:
    BROKEN[message](streets)
    with pytest.raises(DataError, match=message):
        open_data(str(streets))


def test_a_test_split_without_maps_is_left_out_and_said(streets: Path) -> None:
    for file in (streets / "test/labels").iterdir():
        file.unlink()
    data = open_data(str(streets))
    assert set(data.splits) == {"train", "val"} and any(text.startswith("test has no maps") for text in data.messages)


def test_masks_of_0_and_255_say_what_is_wrong(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path / "x", splits={"train": 2, "val": 1})
    for file in root.glob("*/labels/*.png"):
        map_file(file, (values_of(0, 2) == 1).astype(np.uint8) * 255)
    with pytest.raises(DataError, match=r"(?s)values of the maps are 0 .*see 'train/labels.*0 and 1"):
        open_data(str(root))


def test_broken_maps(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="cannot read 'a.png'"):
        decode_map(b"\x89PNG\r\n\x1a\nnothing", name="a.png")
    Image.fromarray(np.array([[0, 300]], dtype=np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match="'wide.png' has values up to 300"):
        decode_map((tmp_path / "wide.png").read_bytes(), name="wide.png")
    Image.fromarray(np.array([[0, 3]], dtype=np.uint16)).save(tmp_path / "wide.png")
    assert decode_map((tmp_path / "wide.png").read_bytes(), name="wide.png").tolist() == [[0, 3]]
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bits.png")
    assert decode_map((tmp_path / "bits.png").read_bytes(), name="bits.png").tolist() == [[0, 1]]


def test_the_task_that_is_asked_for_must_be_the_data_s(streets: Path, split: Path) -> None:
    with pytest.raises(RequestError, match="looks like data for segmentation"):
        open_data(str(streets), task="classification")
    with pytest.raises(VisionKDError, match="holds no pictures with maps of classes"):
        open_data(str(split), task="segmentation")


# shapes --------------------------------------------------------------------------------------------------------------


def test_maps_of_the_embedded_scenes() -> None:
    settings = DataConfig(shapes=ShapesConfig(num_train=16, num_val=8, size=32))
    maps, labels = open_data("shapes", config=settings, task="segmentation"), open_data("shapes", config=settings)
    assert maps.task == "segmentation" and maps.classes[0] == "background" and len(maps.classes) == 9
    assert maps.fingerprint != labels.fingerprint
    for index in range(16):
        assert maps.splits["train"].load(index).tobytes() == labels.splits["train"].load(index).tobytes()
        target = maps.splits["train"].target(index)
        assert target.shape == (32, 32) and 1 + labels.splits["train"].target(index) in target


# data check ----------------------------------------------------------------------------------------------------------


def test_good_maps_have_no_problems(streets: Path) -> None:
    report = check_data(open_data(str(streets)))
    assert not report.problems and report.counts()["wrong_maps"] == 0
    pixels = np.concatenate([values_of(seed).ravel() for seed in range(8)])
    known = pixels[pixels != 255]
    assert report.pixels_percent["sky"] == pytest.approx(100.0 * (known == 1).mean(), abs=1e-3)
    assert report.pixels_percent["no label"] == pytest.approx(100.0 * (pixels == 255).mean(), abs=1e-3)


def test_everything_wrong_with_maps_is_found(streets: Path) -> None:
    map_file(streets / "train/labels/train_0.png", values_of(0)[:-1])
    map_file(streets / "train/labels/train_1.png", np.full((16, 20), 9, dtype=np.uint8))
    picture(streets / "train/labels/train_2.png", 3)
    (streets / "val/labels/val_0.png").write_bytes(b"nothing")
    map_file(streets / "val/labels/val_1.png", np.zeros((16, 20), dtype=np.uint8))
    (streets / "train/images/train_3.jpg").write_bytes((streets / "test/images/test_0.jpg").read_bytes())
    report = check_data(open_data(str(streets)))
    wrong = dict(report.wrong_maps)
    assert report.problems and set(wrong) == {
        "train: train/images/train_0.jpg", "train: train/images/train_1.jpg", "train: train/images/train_2.jpg",
        "val: val/images/val_0.jpg",
    }  # fmt: skip
    assert wrong["train: train/images/train_0.jpg"] == "the map has 20 x 15 pixels, the image 20 x 16"
    assert "'train/labels/train_1.png' has values" in wrong["train: train/images/train_1.jpg"]
    assert "mode RGB" in wrong["train: train/images/train_2.jpg"]
    assert set(report.empty_classes) == {"val: sky", "val: tree"}
    assert report.leakage == report.conflicting and len(report.leakage) == 1
    assert set(report.leakage[0]) == {"train: train/images/train_3.jpg", "test: test/images/test_0.jpg"}
