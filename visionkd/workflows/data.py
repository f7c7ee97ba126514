"""List known data sets, and look at data before training on it."""

from __future__ import annotations

from collections.abc import Sequence

from visionkd.config.load import load_config
from visionkd.config.schema import RunConfig
from visionkd.data.check import CheckReport
from visionkd.data.check import check_data as check
from visionkd.data.known import KNOWN_SETS
from visionkd.data.open import open_data
from visionkd.data.shapes import CLASSES as SHAPE_CLASSES
from visionkd.types import Listener, MetricRow, Progress


def check_data(*, data: str, options: Sequence[str] = (), listener: Listener | None = None) -> CheckReport:
    """Look for images and classes that would harm a training.

    Args:
        data: DATA.
        options: ``KEY=VALUE`` overrides of the ``data`` section.
        listener: Is told what happens.

    Raises:
        RequestError: If the data does not exist.
        DataError: If there is nothing to look at.
    """
    listener = listener or Listener()
    config = load_config(RunConfig, overrides={"data.path": data}, options=options)
    dataset = open_data(config.data.path, config=config.data, seed=config.data.split_seed, task=config.task)
    for text in dataset.messages:
        listener.message(text)
    return check(dataset, progress=lambda done, total: listener.progress(Progress("check", done, total)))


def list_data() -> tuple[MetricRow, ...]:
    """Return the data sets that are known by name."""
    shapes = MetricRow(
        "shapes",
        {
            "shows": "coloured shapes, drawn on the fly",
            "classes": len(SHAPE_CLASSES),
            "images": "as many as asked",
            "download_mb": 0,
        },
    )
    known = [
        MetricRow(
            each.name,
            {
                "shows": each.title,
                "classes": each.num_classes,
                "images": each.num_images,
                "download_mb": each.download_mb,
            },
        )
        for each in KNOWN_SETS
    ]
    return (shapes, *known)
