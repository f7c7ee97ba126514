"""Train one network on labels alone: a teacher or a baseline.

\b
Examples:
  visionkd train --model resnet50 --data path/to/images --out runs/teacher
  visionkd train --model cifar_resnet20 --no-pretrained --data cifar10 --epochs 15 --precision bf16
"""

from __future__ import annotations

from typing import Any

from visionkd.cli import _options, console
from visionkd.cli._base import new_command, option


@new_command(__doc__)
@option("--model", metavar="NAME", help="Network to train: timm or torchvision name, alias, run, package, ARCH@FILE.")
@_options.data
@_options.task
@_options.config
@_options.overrides
@_options.budget
@_options.pretrained
@_options.destination
@_options.compute
def command(**request: Any) -> None:
    from visionkd import workflows

    with console.working() as listener:
        result = workflows.train(**request, listener=listener)
    console.show_run(result)
