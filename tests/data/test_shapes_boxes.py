"""Boxes of the embedded scenes, called by their shapes or by colour and shape."""

from __future__ import annotations

import numpy as np
import pytest

from visionkd.config.schema import DataConfig
from visionkd.data.boxes import ShapesBoxes
from visionkd.data.open import open_data
from visionkd.data.shapes import CLASSES, COLOURS, COMBINATIONS, draw
from visionkd.errors import RequestError


def opened(**settings):
    shapes = {"num_train": 12, "num_val": 4, "size": 48, **settings.pop("shapes", {})}
    return open_data("shapes", config=DataConfig(shapes=shapes, **settings), task="detection")


def test_a_combination_is_the_colour_and_the_shape_of_an_object() -> None:
    assert len(COMBINATIONS) == len(COLOURS) * len(CLASSES) == 96
    data = opened(shapes={"vocabulary": "combinations"})
    assert data.classes == COMBINATIONS
    for index in range(12):
        scene, target = draw(0, index, 48), data.splits["train"].target(index)
        names = [data.classes[label] for label in target["labels"]]
        assert np.array_equal(target["boxes"], scene.boxes_xyxy) and not target["crowd"].any()
        assert scene.caption.startswith(f"a {names[0]} on a ")
        assert all(f"a small {name}" in scene.caption for name in names[1:])
        assert [name.split()[1] for name in names] == [CLASSES[kind] for kind in scene.box_labels]


def test_some_classes_leave_the_others_without_a_box() -> None:
    chosen = ("teal star", "red circle")
    source = ShapesBoxes(0, 200, 48, classes=chosen)
    whole = ShapesBoxes(0, 200, 48, classes=COMBINATIONS)
    found = [chosen[label] for index in range(200) for label in source.target(index)["labels"]]
    expected = [COMBINATIONS[label] for index in range(200) for label in whole.target(index)["labels"]]
    assert found == [name for name in expected if name in chosen] and found
    data = opened(classes=chosen, shapes={"vocabulary": "combinations"})
    assert data.classes == chosen and data.fingerprint != opened(shapes={"vocabulary": "combinations"}).fingerprint
    assert opened().classes == CLASSES


def test_classes_that_are_none_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="vocabulary=combinations"):
        opened(classes=["red circle"])
    with pytest.raises(RequestError, match="Did you mean 'red circle'"):
        opened(classes=["red circel"], shapes={"vocabulary": "combinations"})


def test_novel_combinations_have_boxes_in_validation_alone() -> None:
    novel = [name for name in COMBINATIONS if name.endswith(("circle", "square"))]
    data = opened(novel=novel, shapes={"vocabulary": "combinations", "num_val": 40})
    numbers = {data.classes.index(name) for name in novel}
    of = {
        split: {int(label) for index in range(len(source)) for label in source.target(index)["labels"]}
        for split, source in data.splits.items()
    }
    assert not of["train"] & numbers and of["val"] & numbers
