"""Write a model in a format for deployment, checked against PyTorch.

MODEL is a run directory, a packaged model, or a timm or torchvision name. A file that differs from its model is not
left behind. TensorRT engines are built on the device that runs them, from an .onnx file or a run that has one; no torch
is needed there, and --bundle writes what to take along.

--int8 writes what was quantised by 'visionkd quantize', or quantises a float model on images. A file that loses more
than --max-drop keeps its most sensitive layers in float, by name; one that is not faster is not left behind.

\b
Examples:
  visionkd export runs/student --format onnx --out student.onnx
  visionkd export runs/student --int8 --target cpu
  visionkd export runs/student --bundle student_bundle
  visionkd export student_bundle --format tensorrt --precision fp16
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_command, option


@new_command(__doc__)
@argument("model", metavar="MODEL")
@option("--format", type=click.Choice(["onnx", "tensorrt"]), default="onnx", show_default=True, help="Format to write.")
@option("--out", metavar="FILE", help="File to write; the default is in the run's export/ or the working directory.")
@option("--data", metavar="DATA", help="Labelled data to check the accuracy on; the default is the run's.")
@option("--verify-images", type=_options.AT_LEAST_1, metavar="N", stated_default="256", help="Images to check on.")
@option("--opset", type=_options.AT_LEAST_1, metavar="N", help="ONNX operator set; the default is the exporter's.")
@option("--int8", is_flag=True, help="Write INT8; a float model is quantised on images of --data first.")
@option("--target", type=click.Choice(["cpu", "tensorrt"]), help="Whom INT8 is for; the default is cpu.")
@option("--max-drop", type=float, metavar="POINTS", stated_default="1", help="Most top-1 or mIoU that INT8 may lose.")
@option("--min-speedup", type=float, metavar="X", stated_default="1", help="Least speed-up of INT8 on this machine.")
@option("--bundle", metavar="DIR", help="Write a directory with all that a device without torch needs.")
@_options.engine
@_options.overwrite
def command(**request: Any) -> None:
    from visionkd import workflows

    given = {name: value for name, value in request.items() if value is not None}
    with console.working() as listener:
        result = workflows.export(**given, listener=listener)
    console.show_fields(result)
