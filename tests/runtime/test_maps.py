"""Maps of classes without torch: counted, resized, drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visionkd.runtime import draw, metrics
from visionkd.runtime.preprocess import stretch
from visionkd.types import InputSpec

LABEL = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
GIVEN = np.array([[0, 1, 1], [1, 2, 0]], np.uint8)


def test_pixels_without_a_label_do_not_count():
    found = metrics.pixel_confusion(GIVEN, LABEL, 3)
    assert found.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    nothing = metrics.pixel_confusion(GIVEN, np.full_like(LABEL, 255), 3)
    assert not nothing.any() and np.isnan(metrics.segmentation_metrics(nothing)["miou"])


def test_miou_by_hand():
    found = metrics.segmentation_metrics(metrics.pixel_confusion(GIVEN, LABEL, 4))
    # class 0: 1 of 3, class 1: 2 of 3, class 2: 0 of 1, class 3 does not occur
    assert found["miou"] == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3)
    assert found["pixel_acc"] == pytest.approx(100 * 3 / 5)
    iou = metrics.class_iou(*metrics.intersection_and_union(metrics.pixel_confusion(GIVEN, LABEL, 4)))
    assert iou[:3] == pytest.approx([100 / 3, 200 / 3, 0]) and np.isnan(iou[3])


def test_agrees_with_the_task_that_training_measures_by():
    torch = pytest.importorskip("torch")
    from visionkd.tasks.segmentation import SegmentationTask
    from visionkd.types import Output

    rng = np.random.default_rng(0)
    task = SegmentationTask(num_classes=5)
    collected, counts = task.metrics(), np.zeros((5, 5), np.int64)
    for size in ((7, 9), (12, 5)):
        logits = rng.normal(size=(1, 5, 4, 4)).astype(np.float32)
        label = rng.choice([0, 1, 2, 4, 255], size=size).astype(np.uint8)
        task.update(collected, Output(logits=torch.from_numpy(logits)), [torch.from_numpy(label)])
        counts += metrics.pixel_confusion(metrics.resize_maps(logits[0], size).argmax(0), label, 5)
    found = metrics.segmentation_metrics(counts)
    assert {name: 100 * float(value) for name, value in collected.compute().items()} == pytest.approx(found)


@pytest.mark.parametrize("size", [(4, 4), (9, 5), (3, 2), (1, 7)])
def test_resizes_as_torch_does(size):
    F = pytest.importorskip("torch.nn.functional")
    import torch

    values = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(values), size=size, mode="bilinear", align_corners=False).numpy()
    assert metrics.resize_maps(values, size) == pytest.approx(expected, abs=1e-6)


def test_wrong_shapes_and_classes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        metrics.pixel_confusion(GIVEN, LABEL[:1], 3)
    with pytest.raises(ValueError, match="class 2"):
        metrics.pixel_confusion(GIVEN, LABEL, 2)


def test_an_image_is_stretched_as_a_whole():
    image = Image.new("RGB", (30, 10), "white")
    image.putpixel((29, 9), (0, 0, 0))
    found = stretch(image, InputSpec(img_size=(20, 20), crop_pct=0.5))
    assert found.shape == (20, 20, 3) and found[19, 19].max() < 255 and found[0, 0].min() == 255


def test_a_map_keeps_its_values_as_a_palette_picture(tmp_path):
    draw.map_picture(LABEL, 3).save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.mode == "P" and np.array_equal(np.asarray(picture), LABEL)
        assert np.array_equal(np.asarray(picture.convert("RGB")), draw.palette(3)[LABEL])


def test_colours_differ_and_belong_to_the_class():
    colors = draw.palette(60)
    assert len({tuple(color) for color in colors[:60]}) == 60
    assert np.array_equal(colors[:11], draw.palette(11)[:11])


def test_an_overlay_leaves_unlabelled_pixels_alone():
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 255
    found, before = np.asarray(draw.overlay(image, label, 2)), np.asarray(image)
    assert np.array_equal(found[:, 4:], before[:, 4:]) and (found[:, :4] != before[:, :4]).any(-1).all()
    with pytest.raises(ValueError, match="picture"):
        draw.overlay(image, label[:4], 2)


def test_the_legend_names_the_classes_that_are_there():
    image, label = Image.new("RGB", (300, 200)), np.zeros((200, 300), np.uint8)
    label[:20] = 2
    assert draw.class_shares(label, 3) == [(0, 90.0), (2, 10.0)]
    found = draw.draw_map(image, label, ["road", "sky", "tree"])
    legend = np.asarray(found)[200:]
    colors = {tuple(color) for color in legend.reshape(-1, 3).tolist()}
    assert found.width == 300 and found.height > 200
    assert tuple(draw.palette(3)[0].tolist()) in colors and tuple(draw.palette(3)[1].tolist()) not in colors
