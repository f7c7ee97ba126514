"""Settings of object detection."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Factor = Annotated[float, Field(gt=0.0, le=8.0)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DetectionConfig(BaseModel):
    """How pictures and their boxes are shown to a network.

    Attributes:
        scale: Smallest and largest factor that a training picture is resized by, where 1 is the largest size that fits
            the network's input as a whole. Above 1 a part is shown, drawn anew each time.
        iou_crop: Probability of showing a part that overlaps a box by a random share, as SSD does, before that.
        min_visible: Least share of a box's area that a part must show; boxes with less are left out.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    scale: tuple[_Factor, _Factor] = (1.0, 1.0)
    iou_crop: _Share = 0.0
    min_visible: _Share = 0.1

    @model_validator(mode="after")
    def _scale_in_order(self) -> DetectionConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale takes the smallest and the largest factor, in this order")
        return self
