"""Parts of the page of a segmentation network."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visionkd.report.segmentation import Segmentation, describe, error_map, paired_difference

LABEL = np.array([[0, 0, 1], [1, 255, 1]], np.uint8)
GIVEN = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)


def sample(images: int = 20, *, lead: int = 20) -> Segmentation:
    """Two networks on images of 100 pixels a class; the student shares ``lead`` pixels more with the labels."""
    rng = np.random.default_rng(0)
    own = rng.integers(40, 60, (images, 2))
    total = np.full((images, 2), 100)
    shared = {"student": own + lead, "teacher": own}
    return Segmentation(
        intersection=shared, union=dict.fromkeys(shared, total), confusion=np.array([[5, 1], [2, 6]]),
        names=tuple(f"val/{n}.png" for n in range(images)), pictured=(1, 0), num_worst=1, labels=(LABEL, LABEL),
        maps={"student": (GIVEN, GIVEN), "teacher": (LABEL % 2, LABEL % 2)},
    )  # fmt: skip


def test_the_difference_has_an_interval_over_images():
    found = paired_difference(sample(), "teacher")
    assert found.points == pytest.approx(20.0) and found.low == pytest.approx(20.0) == found.high
    varied = sample(lead=0)
    varied.intersection["student"][:, 0] += np.arange(20)
    found = paired_difference(varied, "teacher")
    assert found.points == pytest.approx(9.5 / 2) and found.low < found.points - 0.5 < found.points + 0.5 < found.high
    assert paired_difference(sample(9), "teacher") is None and paired_difference(sample(), "baseline") is None


def test_wrong_and_unlabelled_pixels_are_told_apart():
    colors = np.asarray(error_map(GIVEN, LABEL))
    kinds = [[tuple(pixel) for pixel in row] for row in colors.tolist()]
    right, wrong, unlabeled = kinds[0][0], kinds[0][1], kinds[1][1]
    assert right[3] == 0 and len({right, wrong, unlabeled}) == 3 and kinds[1][2] == right


@pytest.mark.parametrize("readable", [True, False])
def test_rows_of_pictures(readable):
    def load(place: int) -> Image.Image:
        if not readable:
            raise OSError("gone")
        return Image.new("RGB", (3, 2), (10 * place, 0, 0))

    page = describe(sample(), classes=["road", "sky"], load=load, student="Student")
    titles = [panel.title for panel in page["scenes"][0].panels]
    assert titles == (["image"] if readable else []) + ["label", "student", "teacher", "errors"]
    assert page["scenes"][0].name == "val/1.png" and page["num_worst"] == 1
    assert [key.name for key in page["color_keys"]] == ["sky", "road"], "the largest first"
    assert page["classes"] is not None and page["confusion"] is not None


def test_a_class_that_occurs_nowhere_has_no_bar():
    found = sample()
    for values in (*found.intersection.values(), *found.union.values()):
        values[:, 1] = 0
    picture = describe(found, classes=["road", "sky"], load=None, student="Model")["classes"]
    assert "sky" not in picture.svg and "1 of 2 classes occur in no image" in picture.caption
