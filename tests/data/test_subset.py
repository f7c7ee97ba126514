from __future__ import annotations

import numpy as np
import pytest

from visionkd.data.shapes import ShapesSource
from visionkd.data.subset import SubsetSource, stratified_limit, stratified_split, targets_of


def counts(targets: np.ndarray, picked: np.ndarray) -> list[int]:
    return np.bincount(targets[picked], minlength=targets.max() + 1).tolist()


def test_split_takes_its_share_of_each_class():
    targets = np.repeat([0, 1, 2], [100, 50, 10])
    train, val = stratified_split(targets, 0.2, seed=0)
    assert counts(targets, val) == [20, 10, 2]
    assert sorted([*train, *val]) == list(range(160))


def test_single_images_stay_in_training_and_pairs_are_shared():
    targets = np.array([0, 1, 1, 2, 2, 2])
    for fraction in (0.01, 0.5, 0.99):
        train, val = stratified_split(targets, fraction, seed=3)
        assert 0 in train
        assert set(targets[train]) == {0, 1, 2} and set(targets[val]) == {1, 2}


def test_split_follows_the_seed():
    targets = np.zeros(100, dtype=int)
    first, again, other = (stratified_split(targets, 0.1, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_limit_is_even_over_the_classes():
    targets = np.repeat([0, 1, 2], [100, 50, 2])
    assert counts(targets, stratified_limit(targets, 30, seed=0)) == [14, 14, 2]
    assert counts(targets, stratified_limit(targets, 3, seed=0)) == [1, 1, 1]
    assert len(stratified_limit(targets, 2, seed=0)) == 2
    assert stratified_limit(targets, 999, seed=0).tolist() == list(range(152))


def test_smaller_limit_keeps_part_of_the_larger_one():
    targets = np.repeat([0, 1], 50)
    small, large = (set(stratified_limit(targets, limit, seed=0).tolist()) for limit in (10, 40))
    assert small < large


def test_subset_of_a_subset_refers_to_the_innermost_source():
    source = ShapesSource(0, 40, 32)
    subset = SubsetSource(SubsetSource(source, np.arange(20, 40)), np.array([3, 1]))
    assert subset.base is source and subset.indices.tolist() == [23, 21]
    assert subset.name(0) == source.name(23) and subset.target(1) == source.target(21) == targets_of(subset)[1]
    assert subset.load(0).tobytes() == source.load(23).tobytes()


@pytest.mark.parametrize("with_attribute", [True, False])
def test_targets_of_any_source(with_attribute):
    class Plain:
        if with_attribute:
            targets = (4, 5, 6)

        def __len__(self):
            return 3

        def target(self, index):
            return index + 4

    assert targets_of(Plain()).tolist() == [4, 5, 6]
