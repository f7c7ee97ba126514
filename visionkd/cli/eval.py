"""Measure the accuracy of a model on labelled data.

MODEL is a run directory, a packaged model, a timm or torchvision name, an .onnx file or an .engine file. The last
two need no torch.

\b
Examples:
  visionkd eval runs/student --data path/to/images
  visionkd eval runs/student/export/model.onnx --data path/to/images --json
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_command, option


@new_command(__doc__)
@argument("model", metavar="MODEL")
@_options.data
@option("--split", metavar="NAME", help="Split to measure on; the default is the validation split.")
@_options.batch_size
@option("--limit", type=_options.AT_LEAST_1, metavar="N", help="Use at most so many images, spread over the classes.")
@_options.accelerator
@option(
    "--backend",
    type=click.Choice(["torch", "onnxruntime", "tensorrt"]),
    help="What runs the model; by default its format decides.",
)
@_options.overrides
@_options.as_json
def command(as_json: bool, **request: Any) -> None:
    from visionkd import workflows

    with console.working(stdout_is_data=as_json) as listener:
        result = workflows.evaluate(**request, listener=listener)
    if as_json:
        console.write_json(result)
    else:
        console.show_evaluation(result)
