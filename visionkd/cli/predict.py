"""Label images with a model, or their pixels with a segmentation network, or find objects with a detector.

MODEL is a run directory, a packaged model, a timm or torchvision name, an .onnx file or an .engine file. IMAGE is a
file, a directory or a pattern. Images that cannot be read are named on standard error, and the exit code is then 1.

\b
Examples:
  visionkd predict runs/student photo.jpg
  visionkd predict runs/student/export/model.onnx photos/ --save labelled/
  visionkd predict runs/student photo.jpg --classes "red circle,blue star"

A segmentation network prints the classes on each image with the share of pixels that each covers. --save writes the
picture with the classes laid over it and a legend below, and beside it the map itself, NAME.map.png, whose values are
the class indices.

A detector prints class, score and place of each box: left, top, right and bottom in pixels. --save writes the picture
with the boxes on it. One that was distilled by oadp looks for --classes, whatever its encoder has words for.
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_command, option


@new_command(__doc__)
@argument("model", metavar="MODEL")
@argument("images", nargs=-1, required=True, metavar="IMAGE...")
@option("--save", metavar="DIR", help="Write copies of the images there with the labels drawn on them.")
@option("--top-k", type=_options.AT_LEAST_1, metavar="N", help="Labels per image; 5, and 100 boxes, if left out.")
@option(
    "--min-score", type=click.FloatRange(0.0, 1.0), metavar="X", help="Least score of a box; 0.3 if left out."
)
@option("--classes", metavar="NAME[,NAME...]", help="Look for these, with a detector whose classes are texts.")
@option(
    "--encoder", metavar="MODEL", help="Reads their names; the one that the detector was trained with, if left out."
)
@_options.overwrite
@_options.accelerator
@_options.as_json
@click.pass_context
def command(
    ctx: click.Context, images: tuple[str, ...], as_json: bool, classes: str | None, **request: Any
) -> None:
    from visionkd import workflows

    request["classes"] = None if classes is None else classes.split(",")
    with console.working(stdout_is_data=as_json) as listener:
        result = workflows.predict(images=images, **request, listener=listener)
    if as_json:
        console.write_json(result)
    else:
        console.show_predictions(result)
    for path, reason in result.skipped:
        console.warn(f"{path} was skipped: {reason}")
    if result.skipped:
        ctx.exit(1)
