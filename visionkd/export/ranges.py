"""Ranges of tensors inside of an ONNX graph, measured with ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from visionkd.errors import DataError
from visionkd.export.qdq import own_zero_points
from visionkd.quantization.ranges import HistogramObserver, range_of
from visionkd.runtime.ort import open_precisely

_SILENT = 4
_TINY = 127.0 * np.finfo(np.float32).tiny  # below, the scale would underflow


def measure_ranges(model: ir.Model, names: Sequence[str], batches: Iterable[np.ndarray]) -> dict[str, float]:
    """Return the magnitude that each tensor of ``names`` is best clipped to: the least squared error of rounding.

    Args:
        model: A graph with one input of images; it is left as it is.
        names: Tensors inside of it.
        batches: Images, B x 3 x H x W float32 in [0, 1].

    Raises:
        DataError: If a tensor is not finite.
    """
    if not names:
        return {}
    own_zero_points(model.graph)
    proto = ir.to_proto(model)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        ir.to_proto(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))) for name in names if name not in known
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = _SILENT, 1
    session, _ = open_precisely(onnxruntime, proto.SerializeToString(), options, ["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    seen = {name: HistogramObserver() for name in names}
    finite = True
    for batch in batches:
        for name, value in zip(names, session.run(list(names), {image.name: batch}), strict=True):
            finite &= bool(np.isfinite(value).all())
            seen[name](torch.from_numpy(value))
    for name, observer in seen.items():
        if not (finite and math.isfinite(observer.amax)):
            raise DataError(
                f"The result of '{name}' is not finite on the images, which gives no range",
                hint="The network itself overflows: evaluate it first.",
            )
    # a branch that is zero throughout, as the last norm of a block may make it, is so on any grid
    return {name: range_of(observer, "mse", 100.0) if observer.amax > _TINY else 1.0 for name, observer in seen.items()}
