"""What is quantised and how its ranges are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Calibration = Literal["max", "entropy", "percentile", "mse"]


@dataclass(frozen=True)
class Int8Scheme:
    """Symmetric INT8: one scale for each output channel of a weight, one for each activation, zero point 0.

    Attributes:
        calibration: How the range of an activation follows from what it took on images: ``max`` takes all of it,
            ``percentile`` leaves out the largest values, ``entropy`` and ``mse`` weigh clipping against rounding.
        percentile: Share of the values in percent that ``percentile`` keeps.
        attention: ``int8`` quantises the products of queries, keys and values as well.
        gates: ``int8`` quantises the layers of squeeze-and-excitation and of pooling branches as well; they work on
            pooled maps, where INT8 saves nothing.
        residual: Which residual adds get a quantised skip input: those behind a convolution (``conv``), or ``all``.
        skip: Names of layers that stay in float, ``*`` allowed.
        learned_scales: Let the scales of the activations learn in training (LSQ).
    """

    calibration: Calibration = "mse"
    percentile: float = 99.99
    attention: Literal["float", "int8"] = "float"
    gates: Literal["float", "int8"] = "float"
    residual: Literal["conv", "all"] = "conv"
    skip: tuple[str, ...] = ()
    learned_scales: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Int8Scheme:
        """Build a scheme from what ``to_dict`` wrote; entries of newer versions are ignored."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "skip": tuple(known.get("skip", ()))})
