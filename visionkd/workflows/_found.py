"""What a detector finds on one picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from visionkd.models.network import Network
from visionkd.runtime.boxes import FoundBoxes
from visionkd.runtime.preprocess import letterbox, to_batch


def found_boxes(network: Network, picture: Any, *, device: Any) -> FoundBoxes:
    """Return the boxes on an RGB picture of any size, in its own pixels.

    Args:
        network: A detector, on ``device`` and in eval mode.
        picture: The picture.
        device: Where to run.
    """
    view, scale = letterbox(picture, network.input)
    with torch.inference_mode():
        (found,) = network(torch.from_numpy(to_batch([view])).to(device)).boxes
    boxes, scores, labels = (getattr(found, name).float().cpu().numpy() for name in ("boxes", "scores", "labels"))
    return FoundBoxes(boxes, scores, labels.astype(np.int64)).on_picture(scale, (picture.height, picture.width))
