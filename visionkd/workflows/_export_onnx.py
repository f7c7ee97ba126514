"""Export to ONNX: written, compared with PyTorch on images, and the comparison recorded beside the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visionkd.benchmark.latency import measure, ort_runner
from visionkd.data.loader import eval_loader
from visionkd.data.subset import stratified_subset
from visionkd.data.transforms import EvalTransform
from visionkd.errors import RequestError
from visionkd.export.onnx import export_onnx
from visionkd.export.verify import Verification, verify_onnx
from visionkd.files import write_text
from visionkd.models.network import Network
from visionkd.models.package_file import read_card
from visionkd.types import Listener, Source
from visionkd.workflows.results import ExportResult

_RANDOM_IMAGES = 8
_LATENCY_ROUNDS = 5


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
    images, targets = verification_images(network, source, verify_images, listener)
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
    record(path, result)
    return result


def verification_images(
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


def record(path: Path, result: ExportResult, details: Mapping[str, Any] | None = None) -> None:
    """Keep how a file was checked in ``export.json`` beside it, in a run's ``export/`` only.

    Args:
        path: The file.
        result: What was found.
        details: More of it, of an INT8 file; ``latency.json`` stays that of the float file then.
    """
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
        **(details or {}),
    }
    if details is None:
        latency = measure([ort_runner(path, name=path.name)], rounds=_LATENCY_ROUNDS)[0].latency_ms
        write_text(path.parent / "latency.json", json.dumps({"onnxruntime": latency}) + "\n")
    write_text(file, json.dumps([*(old for old in rows if old["file"] != path.name), row], indent=2) + "\n")


def package_metrics(directory: Path) -> Mapping[str, float]:
    """Return the metrics in a package's ``model.json``."""
    return read_card(directory).get("metrics", {})
