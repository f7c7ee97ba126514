"""Settings of INT8 quantisation, which 'quantize' and 'distill' share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Int8Config(BaseModel):
    """How a network is brought to INT8.

    Attributes:
        calibration: How ranges of activations follow from images: ``max``, ``entropy``, ``percentile`` or ``mse``.
        percentile: Share of the values in percent that ``percentile`` keeps.
        images: Training images that ranges are found on, at most.
        equalize: Bring the channels between two layers to like ranges first.
        correct_bias: Take back the shift that rounding gives to the mean of each channel.
        attention: ``int8`` quantises the products of queries, keys and values too.
        gates: ``int8`` quantises the layers of squeeze-and-excitation and of pooling branches too.
        residual: Residual adds that get a quantised skip input: those behind a convolution (``conv``), or ``all``.
        skip: Names of layers that stay in float, ``*`` allowed.
        learned_scales: Let the ranges of activations learn in training; they stay as calibrated otherwise.
        frozen_share: Share of the training, at its end, in which batch norms and the ranges of weights no longer move.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    calibration: Literal["max", "entropy", "percentile", "mse"] = "mse"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    images: Annotated[int, Field(ge=16)] = 512
    equalize: bool = False
    correct_bias: bool = True
    attention: Literal["float", "int8"] = "float"
    gates: Literal["float", "int8"] = "float"
    residual: Literal["conv", "all"] = "conv"
    skip: tuple[str, ...] = ()
    learned_scales: bool = False
    frozen_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25


class Int8RunConfig(Int8Config):
    """INT8 at the end of a distillation: calibrate, train on with the teacher, export, and compare with float.

    Attributes:
        enabled: Bring the distilled student to INT8 (``--int8``).
        epochs: Passes over the training set with the quantisers on; null takes a tenth of the training's, 0 calibrates
            only.
        lr_ratio: Learning rate of that training as a share of the one before it.
        targets: Whom to export for: ``cpu`` (ONNX Runtime), ``tensorrt``.
        max_drop: Largest loss of top-1 (or mIoU) against the float student, in points; layers stay in float to keep it.
        min_speedup: Least speed-up against the float student in ONNX Runtime, of target ``cpu``.
    """

    enabled: bool = False
    epochs: Annotated[int, Field(ge=0)] | None = None
    lr_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    targets: tuple[Literal["cpu", "tensorrt"], ...] = ("cpu", "tensorrt")
    max_drop: Annotated[float, Field(ge=0.0)] = 1.0
    min_speedup: Annotated[float, Field(ge=0.0)] = 1.0
