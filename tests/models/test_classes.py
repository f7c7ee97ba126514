from __future__ import annotations

import pytest

from visionkd.models.classes import align_classes, describe, imagenet_classes

WNIDS = imagenet_classes(1000)


@pytest.mark.parametrize(
    ("model", "data", "outputs", "columns", "identity"),
    [
        (("a", "b"), ("a", "b"), 2, (0, 1), True),
        (("b", "a"), ("a", "b"), 2, (1, 0), False),
        (("c", "b", "a"), ("a", "b"), 3, (2, 1), False),
        (("a", "b"), ("a", "c"), 2, None, False),
        (("a",), ("a", "b"), 1, None, False),
        (None, ("a", "b"), 2, (0, 1), True),
        (None, ("a", "b"), 1000, None, False),
        (("Great White", "tench"), ("great_white", "Tench"), 2, (0, 1), True),
        (("a", "a"), ("a", "b"), 2, None, False),
        (("a", "b"), ("a", "a"), 2, None, False),
        (None, None, 2, None, False),
        (WNIDS, ("n01443537", "n01440764 tench"), 1000, (1, 0), False),
        (WNIDS, ("0001_n01443537", "0000_n01440764"), 1000, (1, 0), False),
        (WNIDS, ("0001_n014435371", "0000_n01440764"), 1000, None, False),
        (None, ("n01443537", "n01440764"), 1000, (1, 0), False),
        (None, ("n01443537", "n99999999"), 1000, None, False),
        (None, WNIDS, 1000, tuple(range(1000)), True),
    ],
)
def test_alignment(model, data, outputs: int, columns, identity: bool) -> None:
    found = align_classes(model, data, outputs)
    assert found.columns == columns and found.identity is identity
    assert found.note


def test_the_note_names_what_is_missing() -> None:
    assert "1 of the data's 2 classes (c)" in align_classes(("a", "b"), ("a", "c"), 2).note


def test_wordnet_ids_become_words() -> None:
    assert describe(("n01440764", "n02123045")) == ("tench", "tabby")
    assert describe(("cat", "dog")) == ("cat", "dog")
