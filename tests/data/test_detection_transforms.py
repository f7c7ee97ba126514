"""Views of pictures with boxes: geometry, what is left of a box, and that nothing depends on cache or workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_coco import write
from visionkd.config.detection import DetectionConfig
from visionkd.config.schema import AugmentConfig, DataConfig, ShapesConfig, TrainConfig
from visionkd.data.detection_transforms import BoxEvalTransform, BoxTrainTransform, moved_boxes
from visionkd.data.loader import eval_loader, train_loader
from visionkd.data.open import open_data
from visionkd.data.views import eval_view, train_view
from visionkd.types import InputSpec

SPEC = InputSpec(img_size=(48, 64), mean=(0.2, 0.5, 0.8))
FILL = [51, 128, 204]
BOX = (20, 10, 60, 40)


def scene(size: tuple[int, int] = (100, 80), box: tuple[int, ...] = BOX) -> tuple[Image.Image, dict]:
    """A white box on black, width and height given."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    target = {"boxes": np.array([box], np.float32), "labels": np.array([3]), "crowd": np.array([False])}
    return Image.fromarray(pixels), target


def drawn(view: torch.Tensor) -> list[int]:
    """The box that is white in a view."""
    white = (view.min(0).values > 127).numpy()
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("settings", [
    DetectionConfig(), DetectionConfig(scale=(0.5, 0.5)), DetectionConfig(scale=(0.6, 1.0)),
    DetectionConfig(scale=(1.0, 1.8)), DetectionConfig(iou_crop=1.0), DetectionConfig(iou_crop=1.0, scale=(0.7, 1.5)),
])  # fmt: skip
@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(100, 80), (40, 90), (48, 64)])
def test_boxes_go_where_their_pixels_go(settings, hflip, size):
    box = BOX if size[0] > 60 and size[1] > 40 else (8, 12, 30, 44)
    transform = BoxTrainTransform(AugmentConfig(hflip=hflip), settings, SPEC)
    seen = 0
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = scene(size, box)
        view, found = transform(image, target)
        assert view.shape == (3, 48, 64) and view.dtype == torch.uint8
        moved = moved_boxes(torch.tensor([box], dtype=torch.float32), found["geometry"])
        if not len(found["labels"]):
            continue
        seen += 1
        assert found["labels"].tolist() == [3] and found["crowd"].tolist() == [False]
        assert np.allclose(found["boxes"][0].numpy(), drawn(view), atol=1.1)
        inside = (found["boxes"] - moved).abs().max() < 1e-4
        assert inside or (moved.min() < 0 or moved[0, 2] > found["boxes"][0, 2] or moved[0, 3] > found["boxes"][0, 3])
    assert seen >= 6


def test_the_picture_lies_at_the_upper_left_and_the_mean_colour_around_it():
    transform = BoxTrainTransform(AugmentConfig(hflip=1.0), DetectionConfig(scale=(0.5, 0.5)), SPEC)
    view, found = transform(*scene())
    assert view[:, 24:, :].amin((1, 2)).tolist() == view[:, 24:, :].amax((1, 2)).tolist() == FILL
    assert view[:, :, 30:].amin((1, 2)).tolist() == FILL and view[:, 0, 0].tolist() == [0, 0, 0]
    assert np.allclose(found["boxes"].numpy(), [[12, 3, 24, 12]], atol=0.01), "mirrored within the picture, 30 wide"


def test_boxes_of_which_too_little_is_seen_are_left_out():
    image, target = scene((100, 80), (0, 0, 50, 80))
    target = {"boxes": np.array([[0, 0, 50, 80], [70, 30, 90, 40], [10, 10, 10.4, 40]], np.float32),
              "labels": np.array([0, 1, 2]), "crowd": np.array([False, True, False])}  # fmt: skip
    most = BoxTrainTransform(AugmentConfig(hflip=0.0), DetectionConfig(scale=(2.0, 2.0), min_visible=0.9), SPEC)
    some = BoxTrainTransform(AugmentConfig(hflip=0.0), DetectionConfig(scale=(2.0, 2.0), min_visible=0.05), SPEC)
    kept, whole = set(), False
    for seed in range(20):
        torch.manual_seed(seed)
        strict = most(image, target)[1]
        torch.manual_seed(seed)
        loose = some(image, target)[1]
        assert set(strict["labels"].tolist()) <= set(loose["labels"].tolist())
        assert 2 not in loose["labels"].tolist(), "thinner than a pixel"
        assert all(bool(crowd) == (label == 1) for crowd, label in zip(loose["crowd"], loose["labels"], strict=True))
        edges = loose["boxes"]
        assert (edges >= 0).all() and (edges[:, 2] <= 64).all() and (edges[:, 3] <= 48).all()
        kept |= {len(strict["labels"]) < len(loose["labels"])}
        whole |= 1 in strict["labels"].tolist()
    assert True in kept and whole


def test_an_iou_crop_shows_a_part_around_a_box():
    image, target = scene()
    plain = BoxTrainTransform(AugmentConfig(hflip=0.0), DetectionConfig(), SPEC)
    part = BoxTrainTransform(AugmentConfig(hflip=0.0), DetectionConfig(iou_crop=1.0), SPEC)
    whole = plain(image, target)[1]["boxes"]
    larger = 0
    for seed in range(20):
        torch.manual_seed(seed)
        boxes = part(image, target)[1]["boxes"]
        larger += len(boxes) and float((boxes[:, 2:] - boxes[:, :2]).prod()) > 1.3 * float(
            (whole[:, 2:] - whole[:, :2]).prod()
        )
    assert larger >= 5
    nothing = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "crowd": np.zeros(0, bool)}
    view, found = part(image, nothing)  # background: no box to crop around
    assert found["boxes"].shape == (0, 4) and torch.equal(view, plain(image, nothing)[0])


def test_an_option_that_is_off_changes_no_other_draw():
    image, target = scene()
    for seed in range(4):
        views = []
        for hflip in (0.0, 1.0):
            torch.manual_seed(seed)
            transform = BoxTrainTransform(AugmentConfig(hflip=hflip), DetectionConfig(scale=(0.6, 1.4)), SPEC)
            views.append(transform(image, target)[1]["geometry"])
        assert views[0][2:].tolist() == views[1][2:].tolist() and views[0][0] == -views[1][0]


def test_evaluation_is_the_letterbox_and_boxes_stay():
    image, target = scene()
    view, found = BoxEvalTransform(SPEC)(image, target)
    assert float(found["scale"]) == pytest.approx(0.6) and found["size"].tolist() == [80, 100]
    assert found["boxes"].tolist() == [list(map(float, BOX))]
    assert np.allclose(drawn(view), 0.6 * np.array(BOX), atol=1.0) and view[:, -1, -1].tolist() == FILL


def batches(source, workers: int, cache: str):
    config = TrainConfig(model={"name": "x"}, augment={"color_jitter": 0.3}, detection={"scale": (0.6, 1.5),
                         "iou_crop": 0.5})  # fmt: skip
    view = train_view("detection", config, img_size=(48, 64), spec=SPEC)
    loader = train_loader(source, view, batch_size=3, seed=1, workers=workers, cache=cache, pin_memory=False)
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += list(loader)
    return found


def test_batches_are_the_same_however_they_are_loaded():
    config = DataConfig(shapes=ShapesConfig(num_train=7, num_val=3, size=64))
    source = open_data("shapes", config=config, task="detection").splits["train"]
    first = batches(source, 0, "none")
    assert [len(batch["target"]) for batch in first] == [3] * len(first) and first[0]["geometry"].shape == (3, 4)
    assert set(first[0]["target"][0]) == {"boxes", "labels", "crowd"}
    for other in (batches(source, 2, "none"), batches(source, 0, "ram"), batches(source, 1, "ram")):
        for mine, theirs in zip(first, other, strict=True):
            assert torch.equal(mine["image"], theirs["image"]) and torch.equal(mine["geometry"], theirs["geometry"])
            assert torch.equal(mine["index"], theirs["index"])
            for one, another in zip(mine["target"], theirs["target"], strict=True):
                assert all(torch.equal(one[name], another[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_batches(tmp_path, workers):
    source = open_data(str(write(tmp_path))).splits["val"]
    (tmp_path / "val" / "b.png").write_bytes(b"no picture")
    loader = eval_loader(source, eval_view("detection", SPEC), batch_size=2, workers=workers, pin_memory=False)
    found = list(loader)
    assert [batch["index"].tolist() for batch in found] == [[0], [2]] and found[0]["unreadable"].tolist() == [1]
    assert found[0]["scale"].tolist() == pytest.approx([1.6]) and found[0]["size"].tolist() == [[30, 40]]
    assert found[0]["target"][0]["labels"].tolist() == [1, 0] and float(found[0]["target"][0]["scale"]) == 1.6
    assert found[1]["target"][0]["boxes"].shape == (0, 4)


def test_a_batch_without_a_readable_picture(tmp_path):
    source = open_data(str(write(tmp_path))).splits["val"]
    for name in "abc":
        (tmp_path / "val" / f"{name}.png").write_bytes(b"no picture")
    (batch,) = eval_loader(source, eval_view("detection", SPEC), batch_size=4, workers=0, pin_memory=False)
    assert batch["target"] == [] and batch["image"].shape == (0, 3, 48, 64)
