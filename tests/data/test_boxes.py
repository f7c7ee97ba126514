"""Sources of boxes: what is cut, what is kept in memory, and the embedded scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.test_coco import BOXES, table, write
from visionkd.config.schema import DataConfig, ShapesConfig
from visionkd.data.boxes import BoxSource, NovelClasses, novel_of
from visionkd.data.cache import CachedSource, build_cache
from visionkd.data.check import check_data
from visionkd.data.open import open_data
from visionkd.data.shapes import CLASSES
from visionkd.data.subset import SubsetSource, has_boxes
from visionkd.runtime.box_metrics import box_set


def test_cached_boxes_are_those_of_the_source(tmp_path):
    source = open_data(str(write(tmp_path, table(["a.png", "b.png", "c.png"], BOXES)))).splits["train"]
    (tmp_path / "train" / "b.png").write_bytes(b"no picture")
    cached = build_cache(source)
    assert isinstance(cached, CachedSource)
    for index in (0, 2):
        mine, theirs = cached.target(index), source.target(index)
        assert all(np.array_equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
        assert torch.equal(cached.load(index), torch.from_numpy(np.array(source.load(index))).permute(2, 0, 1))


def test_scenes_have_boxes_around_what_is_seen():
    config = DataConfig(shapes=ShapesConfig(num_train=6, num_val=3, size=64))
    data = open_data("shapes", config=config, task="detection")
    assert data.task == "detection" and data.classes == CLASSES and has_boxes(data.splits["train"])
    assert data.fingerprint != open_data("shapes", config=config).fingerprint
    source = data.splits["train"]
    for index in range(6):
        target, mask = source.target(index), source.scene(index).mask
        assert len(target["boxes"]) >= 1 and target["labels"][0] == index % 8
        left, top, right, bottom = target["boxes"][0].astype(int)
        own = mask == target["labels"][0] + 1
        assert own[top:bottom, left:right].any() and own[top:bottom, left].any() and own[top, left:right].any()
    assert not check_data(open_data("shapes", config=config)).wrong_boxes


def test_novel_classes_travel_with_a_subset():
    config = DataConfig(shapes=ShapesConfig(num_train=20, num_val=8, size=32), novel=("star", "ring"), limit_val=4)
    data = open_data("shapes", config=config, task="detection")
    assert novel_of(data.splits["val"]) == (4, 6) and novel_of(SubsetSource(data.splits["val"], np.arange(2))) == (4, 6)
    labels = np.concatenate([data.splits["train"].target(index)["labels"] for index in range(20)])
    assert not np.isin(labels, (4, 6)).any()
    seen = [NovelClasses(data.splits["train"].source, (4, 6), hidden=False).target(index) for index in range(20)]
    assert np.isin(np.concatenate([each["labels"] for each in seen]), (4, 6)).any()
    assert novel_of(open_data("shapes", task="detection").splits["val"]) == ()


def test_limits_spread_and_targets_are_of_no_class(tmp_path):
    source = open_data(str(write(tmp_path))).splits["train"]
    assert isinstance(source, BoxSource) and source.targets.tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="0 images were looked at, and 1 have boxes"):
        from visionkd.runtime.box_metrics import average_precision

        average_precision(box_set([]), box_set([source.target(0)]), num_classes=2)
