"""Bring a trained network to INT8: from a folder of images, or by a training with its quantisers on."""

from __future__ import annotations

from collections.abc import Sequence

from visionkd.config.quantize import QuantizeConfig
from visionkd.errors import Problem, RequestError
from visionkd.types import Listener
from visionkd.workflows._quantization import Quantization
from visionkd.workflows._request import build_config, check_mode, shared_overrides
from visionkd.workflows.results import RunResult

#: What each name of --scheme stands for.
SCHEMES = {
    "int8": {},
    "int8-attention": {"int8.attention": "int8"},
    "int8-learned": {"int8.learned_scales": True},
}


def quantize(
    *,
    model: str | None = None,
    data: str | None = None,
    teacher: str | Sequence[str] | None = None,
    bits: int | None = None,
    scheme: str | None = None,
    calibration: str | None = None,
    images: int | None = None,
    config: str | None = None,
    options: Sequence[str] = (),
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    export: str | None = None,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accelerator: str | None = None,
    devices: int | str | None = None,
    nodes: int | None = None,
    strategy: str | None = None,
    precision: str | None = None,
    listener: Listener | None = None,
) -> RunResult:
    """Quantise ``model`` and leave a run directory with the INT8 model, its accuracy beside the float one's, a report.

    Without ``epochs`` ranges are found on images, which need no labels (post-training quantisation). With ``epochs``
    the quantised network is trained too, on the labels or with ``teacher`` (quantisation-aware training).

    Args:
        model: MODEL that is trained already.
        data: DATA; None takes the recipe's, or the embedded ``shapes``.
        teacher: MODELs to learn from in the training, such as the float model itself.
        bits: 8; fewer are refused with the command that trains them.
        scheme: ``int8``, ``int8-attention`` (attention's own products too) or ``int8-learned`` (ranges learn).
        calibration: ``max``, ``entropy``, ``percentile`` or ``mse``.
        images: Training images to find ranges on, at most.
        config: Recipe name or YAML file that the other arguments override.
        options: ``KEY=VALUE`` overrides of any key of the configuration.
        epochs: Passes over the training set; None trains nothing.
        batch_size: Images per optimiser step over all devices.
        lr: Peak learning rate; None takes a hundredth of what the network was trained with.
        seed: Seed of the choice of images, order and views.
        export: Formats to export at the end, separated by commas.
        out: Run directory; None makes a name from network and data.
        resume: Continue the run in ``out`` where it was stopped.
        overwrite: Replace the run in ``out``.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        devices: Number of devices, or ``auto``.
        nodes: Number of machines.
        strategy: ``auto``, ``ddp`` or ``fsdp``.
        precision: ``32``, ``bf16`` or ``16``.
        listener: Is told what happens.

    Returns:
        The run directory, metrics of the INT8 network, both networks side by side, and the files made.

    Raises:
        RequestError: If the request is wrong; all problems are listed.
        WorkError: If the network cannot be quantised, or data or training fail.
        InterruptedRunError: If the user stopped the run; it can be resumed.
    """
    check_mode(resume=resume, overwrite=overwrite)
    names = [teacher] if isinstance(teacher, str) else teacher
    teachers = [{"name": name.strip()} for text in names or () for name in text.split(",") if name.strip()]
    _check_bits(bits, model=model, data=data, teachers=[entry["name"] for entry in teachers])
    if scheme is not None and scheme not in SCHEMES:
        raise RequestError(Problem("--scheme", f"unknown name '{scheme}'", f"Known: {', '.join(SCHEMES)}"))
    overrides = shared_overrides(
        data=data, task=None, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, export=export,
        accelerator=accelerator, devices=devices, nodes=nodes, strategy=strategy, precision=precision,
    )  # fmt: skip
    overrides |= {
        "model.name": model,
        "teachers": teachers or None,
        "int8.calibration": calibration,
        "int8.images": images,
        "train": True if epochs is not None else None,
        **SCHEMES[scheme or "int8"],
    }
    settings = build_config(
        QuantizeConfig, config=config, options=options, overrides=overrides, out=out, resume=resume,
        spelled={"model.name": "MODEL", "int8.calibration": "--calibration", "int8.images": "--images"},
    )  # fmt: skip
    if settings.teachers and not settings.train:
        hint = "Give --epochs N to train with it, or leave it out: ranges alone need no teacher."
        raise RequestError(Problem("--teacher", "teaches in a training only", hint))
    return Quantization(settings, out=out, listener=listener or Listener()).run(resume=resume, overwrite=overwrite)


def _check_bits(bits: int | None, *, model: str | None, data: str | None, teachers: Sequence[str]) -> None:
    """Refuse widths that no INT8 device has, with the command that trains them."""
    if bits is None or bits == 8:
        return
    if not 2 <= bits <= 8:
        raise RequestError(Problem("--bits", f"must be a whole number from 2 to 8 (given: {bits})"))
    command = (
        f"visionkd distill --teacher {','.join(teachers) or model or 'TEACHER'} --student {model or 'MODEL'}"
        f" --data {data or 'DATA'} --method quantized -o options.bits={bits}"
    )
    raise RequestError(
        Problem("--bits", f"{bits} bits are stored, not computed with: they are what the method 'quantized' trains"),
        hint=f"Run: {command}",
    )
