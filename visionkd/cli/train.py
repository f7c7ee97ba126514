"""Train one network without a teacher: on labels, as a masked autoencoder that needs none, or on captions.

\b
Examples:
  visionkd train --model resnet50 --data path/to/images --out runs/teacher
  visionkd train --model cifar_resnet20 --no-pretrained --data cifar10 --epochs 15 --precision bf16
  visionkd train --objective mae --model vit_small_patch16_224 --no-pretrained --data path/to/images --out runs/mae
  visionkd train --objective contrastive --model vit_ti --no-pretrained --data shapes --out runs/image_text
  visionkd train --init runs/mae --data path/to/images -o optimizer.layer_decay=0.75
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import new_command, option


@new_command(__doc__)
@option("--model", metavar="NAME", help="Network to train: timm or torchvision name, alias, run, package, ARCH@FILE.")
@option(
    "--objective",
    type=click.Choice(["supervised", "mae", "contrastive", "linear_probe"]),
    stated_default="supervised",
    help="What to learn: labels, removed patches of images, captions, or only a classifier on features that stay.",
)
@option("--init", metavar="MODEL", help="Begin with the weights of a run or package, apart from its classifier.")
@option("--linear-probe", is_flag=True, help="The same as --objective linear_probe.")
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
