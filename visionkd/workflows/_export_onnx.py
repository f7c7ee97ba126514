"""Export to ONNX: written, compared with PyTorch on images, and the comparison recorded beside the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visionkd.benchmark.latency import measure, ort_runner
from visionkd.data.loader import eval_loader
from visionkd.data.subset import SubsetSource
from visionkd.data.views import eval_view
from visionkd.errors import RequestError
from visionkd.export.accuracy import Truth, boxes_truth, truth_of
from visionkd.export.onnx import export_onnx
from visionkd.export.verify import Verification, verify_onnx
from visionkd.files import write_text
from visionkd.models.network import Network
from visionkd.models.package_file import read_card
from visionkd.types import IGNORE, Listener, Source
from visionkd.workflows._tasks import work_of
from visionkd.workflows.results import ExportResult

_RANDOM_IMAGES = 8
_LATENCY_ROUNDS = 5
_IMAGES, _LEAST_IMAGES, _PIXELS, _NUMBERS = 256, 16, 2**24, 2**26


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
    images, truth = verification_images(network, source, verify_images, listener, columns=columns)
    found: list[Verification] = []
    written = export_onnx(
        network,
        path,
        task=network.task,
        classes=network.classes,
        metrics=metrics or {},
        opset=opset,
        check=lambda file: found.append(verify_onnx(network, file, images, truth)),
    )
    check = found[0]
    listener.message(
        f"{path} agrees with PyTorch on {check.num_images} images: largest difference of a"
        f" {'score' if network.task == 'detection' else 'logit'} {check.max_abs_diff:.2g},"
        f" same class for {check.agreement:.1f} %{of_pixels(network)}"
    )
    result = replace(
        ExportResult(path, written.size_mb, check.max_abs_diff, None, None, check.num_images),
        **accuracies(truth, torch=check.torch, exported=check.exported),
    )
    record(path, result)
    return result


def of_pixels(network: Network) -> str:
    """Say what the share of equal answers is of, where it is not of the images."""
    return {"segmentation": " of the pixels", "detection": " of the candidates"}.get(network.task, "")


def accuracies(truth: Truth | None, **values: float | None) -> dict[str, float | None]:
    """Name accuracies by their measure, such as ``top1_torch``; nothing without right answers."""
    return {} if truth is None else {f"{truth.metric}_{name}": value for name, value in values.items()}


def default_images(network: Network) -> int:
    """Return how many images a file is compared on where nothing is said: fewer of them where each is a large map."""
    if network.task == "classification":
        return _IMAGES
    most = _PIXELS // math.prod(network.input.img_size)
    if network.task == "detection":  # all candidates of all images are kept
        columns = (5 if network.rule().own_boxes else 1 + 4 / network.num_classes) * network.num_classes
        most = min(most, int(_NUMBERS / (network.num_candidates * columns)))
    return min(_IMAGES, max(_LEAST_IMAGES, most))


def verification_images(
    network: Network, source: Source | None, count: int, listener: Listener, *, columns: Sequence[int] | None = None
) -> tuple[torch.Tensor, Truth | None]:
    """Return images, N x 3 x H x W, at the network's size, and the right answers about them if there are any.

    Args:
        network: Whose input they are for.
        source: Images; None makes random ones.
        count: Most images.
        listener: Is told what happens.
        columns: Output of the network for each class of ``source``; None where they are the same.

    Raises:
        RequestError: If no image can be read.
    """
    if source is None:
        listener.message(
            "Without --data the file is compared on random images, and no accuracy is measured", level="warning"
        )
        generator = torch.Generator().manual_seed(0)
        return torch.rand(_RANDOM_IMAGES, 3, *network.input.img_size, generator=generator), None
    chosen = source
    if len(source) > count:
        chosen = SubsetSource(source, work_of(network.task).some(source, count, seed=0))
    batches = [
        batch
        for batch in eval_loader(chosen, eval_view(network.task, network.input), batch_size=64, workers=0)
        if len(batch["target"])
    ]
    if not batches:
        raise RequestError("None of the images to compare on can be read.", hint="Give other data with --data.")
    images = torch.cat([batch["image"] for batch in batches])
    if network.task == "detection":
        boxes = [target for batch in batches for target in batch["target"]]
        views = [(float(target["scale"]), tuple(target["size"].tolist())) for target in boxes]
        return images, boxes_truth(
            boxes, views, rule=network.rule(), columns=columns, num_classes=network.num_classes
        )  # fmt: skip
    targets = [np.asarray(target) for batch in batches for target in batch["target"]]
    if network.task == "segmentation":
        known = targets[0].ndim == 2 and any((target != IGNORE).any() for target in targets)
    else:
        known = all(target >= 0 for target in targets)
    return images, truth_of(targets, columns=columns, num_classes=network.num_classes) if known else None


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
        **{
            name: value
            for name in ("miou_torch", "miou_exported", "ap_torch", "ap_exported")
            if (value := getattr(result, name)) is not None
        },
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
