"""ONNX by PyTorch's dynamo exporter: dynamic batch, normalisation inside, self-describing."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visionkd
from visionkd.benchmark.complexity import measure_complexity
from visionkd.errors import Problem, RequestError, VisionKDError, WorkError
from visionkd.export.int8_graph import is_int8, signed_form
from visionkd.export.operators import translations
from visionkd.files import replacing
from visionkd.models.factory import Network
from visionkd.models.weights import weights_sha256
from visionkd.types import Output, TaskName

INPUT_NAME = "image"
_NOISY = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir", "onnx")
_SINGLE_FILE_BYTES = 2 * 1000**3  # protobuf ends at 2 GiB, and the graph needs room beside the weights


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file that was written.

    Attributes:
        file: Where it is.
        size_mb: Its size in 10^6 bytes.
        opset: Operator set it uses.
        metadata: Key-value pairs inside it.
    """

    file: Path
    size_mb: float
    opset: int
    metadata: Mapping[str, str]


class _Logits(nn.Module):
    """The graph to export: images in [0, 1] to logits."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return file_logits(self.network, self.network(image))


class _Candidates(nn.Module):
    """The graph to export of a detector: images in [0, 1] to all boxes and their scores."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("anchors", torch.cat(network.anchors()))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = self.network.candidates(image, self.anchors)
        return boxes, scores


def export_onnx(
    network: Network,
    path: str | os.PathLike[str],
    *,
    task: TaskName,
    classes: Sequence[str] | None,
    metrics: Mapping[str, float],
    opset: int | None = None,
    check: Callable[[Path], Any] | None = None,
    rewrite: Callable[[Any], Any] | None = None,
    extra_metadata: Mapping[str, str] | None = None,
) -> OnnxExport:
    """Write ``network`` as one ONNX file.

    Its input is ``image``, float32 N x 3 x H x W in [0, 1] with the network's own H and W. Its output is ``logits``,
    N x C, or N x C x H x W for segmentation; N is free. Normalisation is part of the graph. The network itself is left
    as it is. A network quantised to INT8 becomes a signed Q/DQ graph, for ``qdq.to_target`` to rewrite.

    A detector has two outputs, all its candidates: ``boxes``, N x M x 4 (left, top, right, bottom in pixels of the
    input), and ``scores``, N x M x C from 0 to 1. Thresholds and the suppression of boxes that cover one another are
    not part of the graph: :func:`visionkd.runtime.boxes.choose_boxes` applies them, as the file's metadata says. Of two
    stages M is the most proposals of an image, whose choice is part of the graph; what is behind the last one is 0, and
    where each class has a box of its own ``boxes`` are N x M x C x 4.

    Args:
        network: What to export.
        path: File to write; it appears complete or not at all.
        task: Task that the outputs serve.
        classes: Class names in output order; None takes the network's.
        metrics: Measured values by name.
        opset: Operator set; None takes the exporter's own choice.
        check: Called with the finished file before it gets its name; if it raises, no file is left.
        rewrite: Changes the graph, an ``onnx_ir.Model``, before it is written.
        extra_metadata: Further key-value pairs.

    Raises:
        RequestError: If the exporter does not write ``opset``.
        WorkError: If the network cannot be expressed in ONNX, or is too large for a file.
    """
    path = Path(path)
    classes = network.classes if classes is None else tuple(classes)
    if classes is not None and len(classes) != network.num_classes:
        raise ValueError(f"{len(classes)} class names for {network.num_classes} outputs")
    rule = network.rule() if network.task == "detection" else None  # before: the signed form cannot be run
    copied = signed_form(network) if is_int8(network) else portable(network)
    size = sum(value.numel() * value.element_size() for value in copied.state_dict().values())
    if size > _SINGLE_FILE_BYTES:
        raise WorkError(
            f"'{network.architecture}' has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2 GB",
            hint="Export a smaller student.",
        )
    metadata = {
        "visionkd_version": visionkd.__version__,
        "task": task,
        "classes": json.dumps(list(classes) if classes is not None else None, ensure_ascii=False),
        "input": json.dumps(network.input.to_dict()),
        "architecture": network.architecture,
        "source": network.source,
        "metrics": json.dumps(dict(metrics)),
        "weights_sha256": weights_sha256(network.net),
        "complexity": json.dumps(asdict(measure_complexity(network))),
        **({} if rule is None else {"boxes": json.dumps(rule.to_dict())}),
        **(extra_metadata or {}),
    }
    program = _export(copied, network.architecture, opset)
    version = program.model.opset_imports[""]
    if opset not in (None, version):  # the exporter goes its own way without a word
        raise RequestError(
            Problem(
                "--opset",
                f"'{network.architecture}' cannot be written in opset {opset}",
                f"Leave it out, or take {version}.",
            )
        )
    for node in [*program.model.graph, *(node for function in program.model.functions.values() for node in function)]:
        node.metadata_props.clear()  # stack traces with the paths of this machine, a fifth of a small file
    program.model.metadata_props.update(metadata)
    program.model.producer_name, program.model.producer_version = "visionkd", visionkd.__version__
    if rewrite is not None:
        rewrite(program.model)
    with replacing(path) as temporary:
        with _silence():
            program.save(temporary, external_data=False)
        if check is not None:
            check(temporary)
    return OnnxExport(path, path.stat().st_size / 1e6, version, metadata)


def file_logits(network: Network, output: Output) -> Tensor:
    """Return logits as an exported file gives them: N x C, or maps at the size of the input, N x C x H x W.

    A detector's are what :func:`visionkd.export.answers.answers` gives.
    """
    return network.at_input_size(output) if network.task == "segmentation" else output.logits


def unit(images: Tensor) -> Tensor:
    """Return images in [0, 1], from uint8 or from what is so already."""
    return images.float().div(255.0) if images.dtype == torch.uint8 else images.float()


def portable(network: Network) -> Network:
    """Return a float32 copy of ``network`` on the CPU, in eval mode and in the usual memory layout."""
    return copy.deepcopy(network).cpu().float().to(memory_format=torch.contiguous_format).eval()


def _export(network: Network, name: str, opset: int | None) -> Any:
    try:
        import onnxscript  # noqa: F401  (the exporter needs it, and names it only in a traceback)
    except ImportError as error:
        raise RequestError(
            "exporting to ONNX needs onnx and onnxscript, which are not installed",
            hint="Run: pip install visionkd[train]",
        ) from error
    example = torch.rand(2, 3, *network.input.img_size, generator=torch.Generator().manual_seed(0))
    try:
        try:
            return _trace(network, example, opset)
        except Exception:
            # Fused attention has a memory layout that the exporter cannot always follow; the same sums written out do.
            if not _unfuse(network):
                raise
            return _trace(network, example, opset)
    except VisionKDError:
        raise
    except Exception as error:
        raise WorkError(f"'{name}' cannot be exported to ONNX: {_reason(error)}", hint=_advice(opset)) from error


def _trace(network: Network, example: Tensor, opset: int | None) -> Any:
    boxes = network.task == "detection"
    with _silence(), torch.no_grad():
        return torch.onnx.export(
            _Candidates(network) if boxes else _Logits(network),
            (example,),
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=["boxes", "scores"] if boxes else ["logits"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=opset,
            custom_translation_table=translations() if boxes and network.two_stage else None,
            verbose=False,
        )


def _unfuse(network: Network) -> bool:
    """Switch timm's attention layers to written-out attention; True if there were any fused ones."""
    fused = [module for module in network.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    return bool(fused)


def _advice(opset: int | None) -> str:
    hint = (
        "Its operators are beyond the exporter of this PyTorch: update torch and onnxscript, or choose another student."
    )
    return hint if opset is None else f"Leave --opset {opset} out, or: {hint}"


def _reason(error: BaseException) -> str:
    """Return the innermost sentence of an exporter error, whose outer ones are advertisements."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress and warnings from the user: what matters is an error, or the check after it."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
