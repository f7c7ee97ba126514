"""Time models side by side: latency, throughput, parameters, MACs, size.

MODEL is a run directory, a packaged model, a timm or torchvision name, an .onnx file or an .engine file. Rounds of
the models are interleaved, so that a busy machine slows all of them alike.

\b
Examples:
  visionkd bench runs/teacher runs/student
  visionkd bench runs/student --backend torch,onnxruntime --threads 2 --json
"""

from __future__ import annotations

from typing import Any

from visionkd.cli import _options, console
from visionkd.cli._base import argument, comma_list, new_command, option
from visionkd.errors import Problem, RequestError, did_you_mean

BACKENDS = ("torch", "onnxruntime", "tensorrt")


@new_command(__doc__)
@argument("models", nargs=-1, required=True, metavar="MODEL...")
@option(
    "--backend",
    "backend",
    multiple=True,
    metavar="NAME[,NAME...]",
    help=f"What runs the models: {', '.join(BACKENDS)}; by default each model's format decides.",
)
@option("--batch-size", type=_options.AT_LEAST_1, metavar="N", stated_default="1", help="Images at a time.")
@option("--threads", type=_options.AT_LEAST_1, metavar="N", stated_default="1", help="Threads of the processor to use.")
@option("--rounds", type=_options.AT_LEAST_1, metavar="N", help="Interleaved rounds of measurement.")
@option(
    "--img-size", type=_options.AT_LEAST_1, metavar="N", help="Input size in pixels; the default is each model's own."
)
@_options.accelerator
@option("--cuda-graph", is_flag=True, default=None, help="Launch engines as CUDA graphs.")
@_options.as_json
def command(models: tuple[str, ...], backend: tuple[str, ...], as_json: bool, **request: Any) -> None:
    from visionkd import workflows

    backends = comma_list(backend)
    unknown = [name for name in backends or () if name not in BACKENDS]
    if unknown:
        known = f"Known: {', '.join(BACKENDS)}"
        raise RequestError(
            [Problem("--backend", f"unknown name '{name}'", did_you_mean(name, BACKENDS) or known) for name in unknown]
        )
    given = {name: value for name, value in request.items() if value is not None}
    if backends:
        given["backend"] = backends
    with console.working(stdout_is_data=as_json) as listener:
        result = workflows.bench(models=models, **given, listener=listener)
    if as_json:
        console.write_json(result)
    else:
        console.show_table(result.rows)
