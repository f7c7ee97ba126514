"""Bring a trained model to INT8: from a folder of images, or by training it with its quantisers on.

MODEL is a run directory, a packaged model, or a timm or torchvision name. Without --epochs, ranges are found on images,
which need no labels. With --epochs the quantised model is trained too, on the labels or with --teacher.

\b
Examples:
  visionkd quantize runs/student --data path/to/images
  visionkd quantize runs/student --data path/to/images --epochs 3 --teacher runs/student
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_command, option


@new_command(__doc__)
@argument("model", metavar="MODEL", required=False)
@_options.data
@option("--teacher", metavar="NAME[,...]", help="Networks to learn from, such as MODEL itself; goes with --epochs.")
@option("--bits", type=_options.Count(2), metavar="N", stated_default="8", help="Bits of weights and activations.")
@option(
    "--scheme",
    type=click.Choice(["int8", "int8-attention", "int8-learned"]),
    stated_default="int8",
    help="What is quantised: also the products of attention, or with ranges that learn.",
)
@option(
    "--calibration",
    type=click.Choice(["max", "entropy", "percentile", "mse"]),
    stated_default="mse",
    help="How the ranges of activations follow from images.",
)
@option("--images", type=_options.Count(16), metavar="N", stated_default="512", help="Images to find ranges on.")
@_options.config
@_options.overrides
@option("--epochs", type=_options.AT_LEAST_1, metavar="N", help="Train for so many passes; without it, nothing trains.")
@option("--batch-size", type=_options.AT_LEAST_1, metavar="N", stated_default="64", help="Images per optimiser step.")
@option("--lr", type=_options.AboveZero(), metavar="X", help="Peak learning rate; the default is 1 % of MODEL's own.")
@option("--seed", type=_options.Count(0), metavar="N", stated_default="0", help="Seed of all randomness.")
@_options.destination
@_options.compute
def command(**request: Any) -> None:
    from visionkd import workflows

    with console.working() as listener:
        result = workflows.quantize(**request, listener=listener)
    console.show_run(result)
