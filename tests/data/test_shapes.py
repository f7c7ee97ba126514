from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest

from visionkd.data.shapes import CLASSES, ShapesSource, _outline, draw


def test_scene_follows_from_seed_and_index():
    first, again = draw(3, 17, 48), draw(3, 17, 48)
    assert first.image.tobytes() == again.image.tobytes() and first.caption == again.caption
    np.testing.assert_array_equal(first.mask, again.mask)
    assert first.image.tobytes() != draw(4, 17, 48).image.tobytes() != draw(3, 25, 48).image.tobytes()


def test_drawing_does_not_change_between_versions():
    """Stored teacher labels belong to these scenes: whoever changes them must change the fingerprint in open.py."""
    captions = "".join(draw(0, index, 64).caption for index in range(16))
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "e7d19067aa7569ed"


@pytest.mark.parametrize("size", [32, 33, 224, 640])
def test_every_part_fits_the_others(size):
    for index in range(8 if size > 100 else 80):
        scene = draw(1, index, size)
        assert scene.image.size == (size, size) and scene.image.mode == "RGB"
        assert scene.label == index % 8 == scene.box_labels[0] and CLASSES[scene.label] in scene.caption
        assert scene.mask.shape == (size, size) and scene.mask.dtype == np.uint8
        assert scene.boxes_xyxy.dtype == np.float32 and scene.box_labels.dtype == np.int64
        assert 1 <= len(scene.boxes_xyxy) == len(scene.box_labels) <= 4
        assert set(np.unique(scene.mask)) - {0} == {label + 1 for label in scene.box_labels}
        for (x0, y0, x1, y1), label in zip(scene.boxes_xyxy.astype(int), scene.box_labels, strict=True):
            assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
            # The box is tight: its first and last rows and columns hold the object.
            inside = scene.mask[y0:y1, x0:x1] == label + 1
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        # No object lies outside all boxes.
        covered = np.zeros_like(scene.mask, dtype=bool)
        for x0, y0, x1, y1 in scene.boxes_xyxy.astype(int):
            covered[y0:y1, x0:x1] = True
        assert not (scene.mask[~covered]).any()


def test_label_is_the_largest_object():
    for index in range(200):
        scene = draw(5, index, 64)
        areas = np.bincount(scene.mask.ravel(), minlength=len(CLASSES) + 1)
        if len(set(scene.box_labels)) == len(scene.box_labels):
            assert areas[scene.label + 1] == areas[1:].max()


@pytest.mark.parametrize("size", [0, 31, 641])
def test_size_limits(size):
    with pytest.raises(ValueError, match="32 to 640"):
        draw(0, 0, size)


def test_outlines_have_area_one_around_the_origin():
    for kind in range(len(CLASSES)):
        x, y = _outline(kind).T
        products = x * np.roll(y, -1) - np.roll(x, -1) * y
        assert abs(abs(products.sum() / 2) - 1) < 1e-9
        assert abs(((x + np.roll(x, -1)) * products).sum()) < 1e-9


def test_edges_are_smooth():
    """Anti-aliasing leaves pixels between the colours of object and background."""
    from visionkd.data.shapes import _coverage

    alpha, _ = _coverage(_outline(CLASSES.index("circle")) * 20 + 32, 64)
    assert ((alpha > 0.1) & (alpha < 0.9)).sum() > 30
    assert abs(alpha.sum() - 400) < 12


def test_source_is_balanced_and_picklable():
    source = pickle.loads(pickle.dumps(ShapesSource(2, 40, 32, first=80)))
    assert len(source) == 40 and [source.target(index) for index in range(8)] == list(range(8))
    assert source.scene(9).label == source.target(9) and source.load(9).tobytes() == draw(2, 89, 32).image.tobytes()
    assert len({source.name(index) for index in range(40)}) == 40
    with pytest.raises(IndexError):
        source.load(40)


def test_objects_are_partly_hidden_sometimes():
    overlaps = sum(
        any(
            a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
            for number, a in enumerate(scene.boxes_xyxy)
            for b in scene.boxes_xyxy[:number]
        )
        for scene in (draw(0, index, 64) for index in range(100))
    )
    assert 20 < overlaps < 90
