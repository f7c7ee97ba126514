"""Settings of semantic segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Side = Annotated[int, Field(ge=16)]


class SegmentationConfig(BaseModel):
    """How pictures and their maps of classes are shown to a network.

    Attributes:
        crop_size: Pixels of a training crop, one number or height and width; None takes the network's input size.
        scale: Smallest and largest factor that a training picture is resized by before the crop.
        aux_weight: Weight of the loss of each auxiliary head beside that of the main one.
        evaluation: ``resize`` brings the whole picture to the network's input size, ``native`` takes it as it is,
            ``slide`` moves a window of the input size over it. A factor of ``scale`` is against the same size.
        slide_overlap: Least share of a window that the next one covers again.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    crop_size: _Side | tuple[_Side, _Side] | None = None
    scale: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (0.5, 2.0)
    aux_weight: Annotated[float, Field(ge=0.0)] = 0.4
    evaluation: Literal["resize", "native", "slide"] = "resize"
    slide_overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.33

    @model_validator(mode="after")
    def _scale_in_order(self) -> SegmentationConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale takes the smallest and the largest factor, in this order")
        return self
