"""Distil one or more teachers into a student.

The run directory holds the student as a package, its metrics, checkpoints and a report. Without --data the embedded
'shapes' are used.

\b
Examples:
  visionkd distill --teacher vit_l --student resnet50 --data path/to/images
  visionkd distill --teacher runs/teacher --student resnet18 --data images.tar --export onnx --out runs/student
  visionkd distill --teacher runs/teacher --student resnet18 --data images.tar --int8 --out runs/student
  visionkd distill --config runs/student/config.yaml --out runs/again
  visionkd distill --resume --out runs/student
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import comma_list, new_command, option


@new_command(__doc__)
@option("--teacher", "teacher", multiple=True, metavar="NAME[,NAME...]", help="Network or networks to learn from.")
@option("--student", metavar="NAME", help="Network to train: timm or torchvision name, alias, run, package, ARCH@FILE.")
@_options.data
@option("--method", metavar="NAME", stated_default="auto", help="Distillation method, such as kd.")
@_options.task
@_options.config
@_options.overrides
@_options.budget
@option(
    "--fit-teacher",
    type=click.Choice(["auto", "probe", "finetune", "none"]),
    stated_default="auto",
    help="What to do with a teacher whose classes are not the data's: fit a linear probe, train all of it, or refuse.",
)
@option(
    "--cache-teacher/--no-cache-teacher",
    "cache_teacher",
    default=None,
    stated_default="where views repeat",
    help="Keep what the teachers say of each view on disk, so that they see it once.",
)
@option("--unlabeled", metavar="DIR", help="Images without labels to train on too, for methods that use none.")
@option("--augment", type=click.Choice(["hard"]), help="Train an augmentor that looks for what the student gets wrong.")
@option(
    "--int8/--no-int8",
    "int8",
    default=None,
    stated_default="no",
    help="Bring the student to INT8 with the teacher, and export it for ONNX Runtime and TensorRT.",
)
@_options.pretrained
@option("--baseline", metavar="RUN", help="Run of the same student trained alone, to compare with in the report.")
@_options.destination
@_options.compute
def command(teacher: tuple[str, ...], **request: Any) -> None:
    from visionkd import workflows

    with console.working() as listener:
        result = workflows.distill(teacher=comma_list(teacher), **request, listener=listener)
    console.show_run(result)
