"""What methods on pairs of detectors share: which pairs suit each other, and the size that both see."""

from __future__ import annotations

from collections.abc import Sequence

from visionkd.errors import Problem
from visionkd.models.network import Network


def view_size(*networks: Network) -> tuple[int, int]:
    """Return the height and width of the images that networks are trained on together, those of the largest."""
    sizes = [network.input.img_size for network in networks]
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def teacher_problems(method: str, teachers: Sequence[Network]) -> list[Problem]:
    """Return what is wrong with teachers of which there must be one, a detector."""
    if len(teachers) != 1:
        return [Problem("--teacher", f"{method} takes one teacher, and {len(teachers)} are named")]
    if teachers[0].task != "detection":
        text = f"'{teachers[0].architecture}' answers {teachers[0].task}, and {method} takes a detector"
        hint = "Train one: visionkd train --model DETECTOR_BACKBONE --data DATA"
        return [Problem("--teacher", text, hint)]
    if teachers[0].quantization is not None:
        return [Problem("--teacher", f"{method} looks into its teacher, which is quantised", "Take its float model.")]
    return []
