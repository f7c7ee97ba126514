"""Write a model in a format for deployment, checked against PyTorch.

MODEL is a run directory, a packaged model, or a timm or torchvision name. A file that differs from its model is not
left behind.

\b
Example:
  visionkd export runs/student --format onnx --out student.onnx
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_command, option


@new_command(__doc__)
@argument("model", metavar="MODEL")
@option("--format", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="Format to write.")
@option("--out", metavar="FILE", help="File to write; the default is in the run's export/ or the working directory.")
@option("--data", metavar="DATA", help="Labelled data to check the accuracy on; the default is the run's.")
@option("--verify-images", type=_options.AT_LEAST_1, metavar="N", stated_default="256", help="Images to check on.")
@option("--opset", type=_options.AT_LEAST_1, metavar="N", help="ONNX operator set; the default is the exporter's.")
@_options.overwrite
def command(**request: Any) -> None:
    from visionkd import workflows

    with console.working() as listener:
        result = workflows.export(**request, listener=listener)
    console.show_fields(result)
