"""Options that several commands share. A default named here is checked against ``visionkd.config.schema`` by a test."""

from __future__ import annotations

import math
from typing import Any

import click

from visionkd.cli._base import option, stack


class Count(click.ParamType):
    """A whole number that is not too small.

    Args:
        minimum: Smallest number allowed.
        auto: Whether ``auto`` is allowed too.
    """

    name = "N"

    def __init__(self, minimum: int = 1, *, auto: bool = False) -> None:
        self.minimum, self.auto = minimum, auto

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int) or (self.auto and value == "auto"):
            return value
        try:
            number = int(value)
        except ValueError:
            number = self.minimum - 1
        if number < self.minimum:
            other = " or 'auto'" if self.auto else ""
            self.fail(f"must be a whole number from {self.minimum} up{other} (given: '{value}')", param, ctx)
        return number


class AboveZero(click.ParamType):
    """A number above 0."""

    name = "X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0.0 < number < math.inf:
            self.fail(f"must be a number above 0 (given: '{value}')", param, ctx)
        return number


AT_LEAST_1 = Count()

as_json = option(
    "--json", "as_json", is_flag=True, help="Print JSON on standard output, everything else on standard error."
)
data = option("--data", metavar="DATA", help="Directory, archive, or name of a known data set ('visionkd data list').")
overwrite = option("--overwrite", is_flag=True, help="Write over what is there.")
accelerator = option(
    "--accelerator", type=click.Choice(["auto", "cpu", "gpu"]), stated_default="auto", help="Where to compute."
)
overrides = option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any key of the configuration; may be repeated.",
)
batch_size = option("--batch-size", type=AT_LEAST_1, metavar="N", help="Images at a time.")

task = option(
    "--task",
    type=click.Choice(["auto", "classification", "segmentation", "detection"]),
    stated_default="auto",
    help="What the data are labelled for; 'auto' goes by their layout.",
)
config = option(
    "--config", metavar="FILE|NAME", help="Start from a recipe ('visionkd configs list') or a run's config.yaml."
)
pretrained = option(
    "--pretrained/--no-pretrained",
    default=None,
    stated_default="pretrained",
    help="Start from published weights or from scratch.",
)

budget = stack(
    [
        option("--epochs", type=AT_LEAST_1, metavar="N", stated_default="20", help="Passes over the training data."),
        option(
            "--batch-size",
            type=AT_LEAST_1,
            metavar="N",
            stated_default="64",
            help="Images per optimiser step, over all devices.",
        ),
        option(
            "--lr", type=AboveZero(), metavar="X", help="Peak learning rate; the default scales with the batch size."
        ),
        option("--seed", type=Count(0), metavar="N", stated_default="0", help="Seed of all randomness."),
    ]
)
destination = stack(
    [
        option("--export", metavar="FORMAT[,...]", help="Export at the end of the run: onnx."),
        option("--out", metavar="DIR", help="Run directory; the default is a new one below runs/."),
        option("--resume", is_flag=True, help="Continue the run in --out, from its last checkpoint."),
        option("--overwrite", is_flag=True, help="Replace the run in --out by a new one."),
    ]
)
#: Of ``export --format tensorrt``.
engine = stack(
    [
        option(
            "--precision",
            type=click.Choice(["fp32", "fp16"]),
            stated_default="fp32",
            help="What an engine computes in outside INT8.",
        ),
        option("--batch", metavar="N|MIN:BEST:MAX", stated_default="1:1:16", help="Batch sizes of an engine."),
        option("--workspace-mb", type=AT_LEAST_1, metavar="N", help="Most memory that a layer of an engine may use."),
        option("--timing-cache", metavar="FILE", help="Keeps TensorRT's measurements; the default is in the cache."),
        option("--dla", type=Count(0), metavar="CORE", help="Build for this core of the deep learning accelerator."),
        option(
            "--builder",
            type=click.Choice(["tensorrt", "tensorrt_rtx"]),
            help="What builds the engine; the default is what is installed.",
        ),
        option(
            "--compute-capability", metavar="X.Y", help="GPU to build for without having it; for tensorrt_rtx only."
        ),
    ]
)
compute = stack(
    [
        accelerator,
        option(
            "--devices", type=Count(auto=True), metavar="N|auto", stated_default="auto", help="Devices on each node."
        ),
        option("--nodes", type=AT_LEAST_1, metavar="N", stated_default="1", help="Machines that train together."),
        option(
            "--strategy",
            type=click.Choice(["auto", "ddp", "fsdp"]),
            stated_default="auto",
            help="How several devices share the work.",
        ),
        option(
            "--precision",
            type=click.Choice(["32", "bf16", "16"]),
            stated_default="32",
            help="Number format of the student's forward pass.",
        ),
    ]
)
