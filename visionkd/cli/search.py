"""Find the student that suits a teacher, without training any.

Candidates of a space are ranked by a score of untrained networks on one batch of images, within a budget. What is found
ends as a table, a picture and the command that distils the teacher into the best candidate.

\b
Spaces: cifar_resnet, cifar_resnet_s0, mobilenetv2, vit, timm (all its networks), or a .yaml or .py file of your own.

\b
Examples:
  visionkd search --teacher runs/teacher --space cifar_resnet --data cifar10 --budget params_m=0.3,macs_g=0.04
  visionkd search --teacher runs/teacher --space timm --data path/to/images --budget latency_ms=8 --backend onnxruntime
  visionkd search --resume --out runs/search --evaluations 1000
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import new_command, option


@new_command(__doc__)
@option("--teacher", metavar="NAME", help="Network that the student is to learn from.")
@option("--space", metavar="NAME|FILE", help="Where to look for a student.")
@_options.data
@option(
    "--budget", metavar="NAME=X[,...]", help="What a student may cost at most: params_m, macs_g (10^9), latency_ms."
)
@option("--score", metavar="NAME", stated_default="diswot", help="Score that ranks the candidates ('docs/search.md').")
@option("--evaluations", type=_options.AT_LEAST_1, metavar="N", stated_default="200", help="Candidates to examine.")
@option(
    "--strategy",
    type=click.Choice(["auto", "evolution", "random", "exhaustive"]),
    stated_default="auto",
    help="How to search; 'auto' goes through a small space as a whole and evolves candidates of a large one.",
)
@option("--population", type=_options.Count(2), metavar="N", stated_default="32", help="Candidates that are parents.")
@option("--tournament", type=_options.AT_LEAST_1, metavar="N", stated_default="8", help="The best of N is a parent.")
@option("--seed", type=_options.Count(0), metavar="N", stated_default="0", help="Seed of all randomness.")
@option(
    "--init",
    type=click.Choice(["default", "gaussian"]),
    stated_default="default",
    help="How random weights are drawn.",
)
@option("--img-size", type=_options.AT_LEAST_1, metavar="N", help="Input size of candidates; the default is their own.")
@option("--batch-size", type=_options.Count(2), metavar="N", stated_default="64", help="Images that are looked at.")
@option(
    "--backend",
    metavar="NAME",
    help="Measure latencies on torch, onnxruntime or onnxruntime-int8; torch where latency is limited.",
)
@option("--workers", type=_options.AT_LEAST_1, metavar="N", stated_default="1", help="Processes that examine.")
@_options.overrides
@option("--distill", is_flag=True, help="Distil the teacher into the best candidate at the end.")
@option("--out", metavar="DIR", help="Run directory; the default is a new one below runs/.")
@option("--resume", is_flag=True, help="Go on with the search in --out.")
@option("--overwrite", is_flag=True, help="Replace the run in --out by a new one.")
@_options.as_json
def command(as_json: bool, **request: Any) -> None:
    from visionkd import workflows

    with console.working(stdout_is_data=as_json) as listener:
        result = workflows.search(**request, listener=listener)
    if as_json:
        console.write_json(result)
        return
    console.show_search(result)
