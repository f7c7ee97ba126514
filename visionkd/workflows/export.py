"""Write a model in a format for deployment, checked against PyTorch before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visionkd.benchmark.latency import measure, ort_runner
from visionkd.data.loader import eval_loader
from visionkd.data.open import open_data
from visionkd.data.subset import stratified_subset
from visionkd.data.transforms import EvalTransform
from visionkd.errors import Problem, RequestError
from visionkd.export.onnx import export_onnx
from visionkd.export.verify import Verification, verify_onnx
from visionkd.files import check_writable, write_text
from visionkd.models.classes import names_or_numbers
from visionkd.models.network import Network
from visionkd.models.package_file import read_card
from visionkd.runtime.session import is_model_file
from visionkd.types import DataSet, Listener, Source
from visionkd.workflows._networks import load_network
from visionkd.workflows.evaluate import choose_split, data_config, match_classes, run_of
from visionkd.workflows.results import ExportResult

_RANDOM_IMAGES = 8
_LATENCY_ROUNDS = 5


def export(
    *,
    model: str,
    format: str = "onnx",
    out: str | None = None,
    data: str | None = None,
    verify_images: int | None = None,
    opset: int | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> ExportResult:
    """Export ``model``.

    Args:
        model: MODEL, but no exported file.
        format: ``onnx``.
        out: File to write; None takes ``export/`` of the run, or the working directory.
        data: DATA to compare on; None takes the run's, or random images without accuracy.
        verify_images: Images to compare on.
        opset: ONNX operator set; None takes the exporter's own.
        overwrite: Replace a file that exists.
        listener: Is told what happens.

    Raises:
        RequestError: If a name is unknown or the file exists.
        WorkError: If the file answers differently from the network; no file is left then.
    """
    listener = listener or Listener()
    if format != "onnx":
        raise RequestError(Problem("--format", f"'{format}' is unknown", "Use onnx."))
    if is_model_file(model):
        raise RequestError(f"{model} is an exported file already.", hint="Give the run or package it came from.")
    run = run_of(model)
    network = load_network(model)
    if out is not None:
        path = Path(out)
        path = path / "model.onnx" if path.is_dir() else path
    else:
        path = (
            run / "export" / "model.onnx" if run is not None else Path(f"{network.architecture.replace('/', '_')}.onnx")
        )
    if path.exists() and not overwrite:
        raise RequestError(
            f"{path} exists, and nothing is written over unasked.", hint="Give --overwrite, or another --out FILE."
        )
    check_writable(path)
    source, columns = None, None
    if data is not None or run is not None:
        config = data_config(data, run=run)
        dataset: DataSet = open_data(
            config.data.path, config=config.data, seed=config.data.split_seed, img_size=max(network.input.img_size),
            classes=lambda: names_or_numbers(network.classes, network.num_classes),
        )  # fmt: skip
        _, source = choose_split(dataset, None, trained_here=data is None)
        columns, _ = match_classes(network.classes, dataset.classes, network.num_classes, model)
    return export_network(
        network,
        path,
        source=source,
        columns=columns,
        verify_images=verify_images or 256,
        opset=opset,
        listener=listener,
    )


def export_network(
    network: Network,
    path: Path,
    *,
    source: Source | None,
    verify_images: int,
    columns: Any = None,
    opset: int | None = None,
    metrics: Mapping[str, float] | None = None,
    listener: Listener,
) -> ExportResult:
    """Export to ONNX, compare on images of ``source`` (or random ones), and record the comparison beside the file."""
    images, targets = _verification_images(network, source, verify_images, listener)
    if targets is not None and columns is not None:
        targets = torch.as_tensor(columns)[targets]
    found: list[Verification] = []
    written = export_onnx(
        network,
        path,
        task="classification",
        classes=network.classes,
        metrics=metrics or {},
        opset=opset,
        check=lambda file: found.append(verify_onnx(network, file, images, targets)),
    )
    check = found[0]
    listener.message(
        f"{path} agrees with PyTorch on {check.num_images} images: largest difference of a logit"
        f" {check.max_abs_diff:.2g},"
        f" same class for {check.agreement:.1f} %"
    )
    result = ExportResult(
        path, written.size_mb, check.max_abs_diff, check.top1_torch, check.top1_exported, check.num_images
    )
    _record(path, result)
    return result


def _verification_images(
    network: Network, source: Source | None, count: int, listener: Listener
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if source is None:
        listener.message(
            "Without --data the file is compared on random images, and no accuracy is measured", level="warning"
        )
        generator = torch.Generator().manual_seed(0)
        return torch.rand(_RANDOM_IMAGES, 3, *network.input.img_size, generator=generator), None
    chosen = stratified_subset(source, count, seed=0)
    batches = [
        batch
        for batch in eval_loader(chosen, EvalTransform(network.input), batch_size=64, workers=0)
        if len(batch["target"])
    ]
    if not batches:
        raise RequestError("None of the images to compare on can be read.", hint="Give other data with --data.")
    targets = torch.cat([batch["target"] for batch in batches])
    return torch.cat([batch["image"] for batch in batches]), targets if (targets >= 0).all() else None


def _record(path: Path, result: ExportResult) -> None:
    """Keep how a file was checked in ``export.json`` beside it, in a run's ``export/`` only."""
    if path.parent.name != "export":
        return
    file = path.parent / "export.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    row = {
        "file": path.name,
        "format": "onnx",
        "size_mb": result.size_mb,
        "max_abs_diff": result.max_abs_diff,
        "top1_torch": result.top1_torch,
        "top1_exported": result.top1_exported,
        "num_verify_images": result.num_verify_images,
    }
    latency = measure([ort_runner(path, name=path.name)], rounds=_LATENCY_ROUNDS)[0].latency_ms
    write_text(path.parent / "latency.json", json.dumps({"onnxruntime": latency}) + "\n")
    write_text(file, json.dumps([*(old for old in rows if old["file"] != path.name), row], indent=2) + "\n")


def package_metrics(directory: Path) -> Mapping[str, float]:
    """Return the metrics in a package's ``model.json``."""
    return read_card(directory).get("metrics", {})
