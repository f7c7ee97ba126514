"""From a request to an ONNX file, in float or in INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from visionkd.data.subset import SubsetSource
from visionkd.errors import Problem, RequestError
from visionkd.export import gate
from visionkd.export.int8_graph import is_int8
from visionkd.export.qdq import TARGETS
from visionkd.files import check_writable
from visionkd.models.network import Network
from visionkd.types import DataSet, Listener, Source
from visionkd.workflows._export_int8 import INT8_FILES, export_int8
from visionkd.workflows._export_onnx import default_images, export_network
from visionkd.workflows._int8 import images_for
from visionkd.workflows._networks import load_network
from visionkd.workflows.evaluate import choose_split, data_config, match_classes, run_of
from visionkd.workflows.results import ExportResult

#: Of data without a training split, every so-manieth image is calibrated on, and the others are measured.
_CALIBRATE_EVERY = 5


def export_model(
    *,
    model: str,
    out: str | None,
    data: str | None,
    verify_images: int | None,
    opset: int | None,
    overwrite: bool,
    int8: bool,
    target: str | None,
    max_drop: float | None,
    min_speedup: float | None,
    listener: Listener,
) -> ExportResult:
    """Export ``model`` to ONNX; the arguments are those of :func:`visionkd.workflows.export`."""
    _check_options(target, min_speedup, max_drop)
    run = run_of(model)
    network = load_network(model)
    int8 = int8 or is_int8(network)
    if int8 and network.task == "detection" and network.two_stage:
        raise network.no_plain_graph()
    if not int8 and (given := _named(target, max_drop, min_speedup)):
        raise RequestError([Problem(name, "is for INT8 only", "Give --int8.") for name in given])
    chosen = target or "cpu"
    name = INT8_FILES[chosen] if int8 else "model.onnx"
    if out is not None:
        path = Path(out) / name if Path(out).is_dir() else Path(out)
    elif run is not None:
        path = run / "export" / name
    else:
        path = Path(network.architecture.replace("/", "_") + name.removeprefix("model"))
    if path.exists() and not overwrite:
        raise RequestError(
            f"{path} exists, and nothing is written over unasked.", hint="Give --overwrite, or another --out FILE."
        )
    check_writable(path)
    dataset, columns = None, None
    if data is not None or run is not None:
        config = data_config(data, run=run)
        dataset = images_for(network, config, model=model, listener=listener)
        columns, _ = match_classes(network.classes, dataset.classes, network.num_classes, model)
    if int8:
        calibration, source = _parts(dataset, network, listener)
        return export_int8(
            network, path, target=chosen, source=source, calibration=calibration, columns=columns,  # type: ignore[arg-type]
            verify_images=verify_images or default_images(network), opset=opset, listener=listener,
            max_drop=gate.MAX_DROP if max_drop is None else max_drop,
            min_speedup=gate.MIN_SPEEDUP if min_speedup is None else min_speedup,
        )  # fmt: skip
    source = None if dataset is None else choose_split(dataset, None, trained_here=data is None)[1]
    return export_network(
        network, path, source=source, columns=columns, verify_images=verify_images or default_images(network),
        opset=opset, listener=listener,
    )  # fmt: skip


def _check_options(target: str | None, min_speedup: float | None, max_drop: float | None) -> None:
    problems = []
    if target is not None and target not in TARGETS:
        problems.append(Problem("--target", f"'{target}' is unknown", f"Use one of: {', '.join(TARGETS)}."))
    if target == "tensorrt" and min_speedup is not None:
        problems.append(
            Problem("--min-speedup", "is measured in ONNX Runtime on this machine, and a tensorrt file runs elsewhere",
                    "Leave it out, and time the engine: visionkd bench")
        )  # fmt: skip
    for name, value in (("--max-drop", max_drop), ("--min-speedup", min_speedup)):
        if value is not None and not value >= 0.0:
            problems.append(Problem(name, f"must be 0 or more (given: {value:g})"))
    if problems:
        raise RequestError(problems)


def _named(target: str | None, max_drop: float | None, min_speedup: float | None) -> list[str]:
    given = {"--target": target, "--max-drop": max_drop, "--min-speedup": min_speedup}
    return [name for name, value in given.items() if value is not None]


def _parts(dataset: DataSet | None, network: Network, listener: Listener) -> tuple[Source | None, Source | None]:
    """Return images to calibrate on and others to measure on."""
    if dataset is None:
        return None, None
    splits = dataset.splits
    if len(splits.get("train", ())) and len(splits.get("val", ())):
        return splits["train"], splits["val"]
    whole = splits["all"] if "all" in splits else splits["val"] if "val" in splits else next(iter(splits.values()))
    if is_int8(network) and "train" not in splits:
        return None, whole
    indices = np.arange(len(whole))
    chosen = indices % _CALIBRATE_EVERY == 0
    listener.message(
        f"{dataset.name} has no training and validation split: ranges come from every {_CALIBRATE_EVERY}th image"
        f" ({int(chosen.sum())}), and the others are measured"
    )
    return SubsetSource(whole, indices[chosen]), SubsetSource(whole, indices[~chosen])
