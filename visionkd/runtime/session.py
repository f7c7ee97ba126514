"""A model file that describes itself: images in; probabilities, maps or boxes, and class names out, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL.Image import Image

from visionkd.errors import Problem, RequestError
from visionkd.runtime.boxes import BoxRule, FoundBoxes, choose_boxes, joined
from visionkd.runtime.engine_file import ENGINE_SUFFIX
from visionkd.runtime.metrics import resize_maps, softmax
from visionkd.runtime.ort import Accelerator, OrtModel
from visionkd.runtime.preprocess import letterbox, preprocess, stretch, to_batch
from visionkd.types import InputSpec, TaskName

if TYPE_CHECKING:
    from visionkd.runtime.trt import TrtModel

ONNX_SUFFIX = ".onnx"
_SUFFIXES = (ONNX_SUFFIX, ENGINE_SUFFIX)
_REQUIRED = ("visionkd_version", "task", "input")


class Session:
    """An exported model with what its file says about it.

    Attributes:
        path: The file.
        task: Task that its outputs serve.
        classes: Class names in output order, if the file names them.
        input: Size and resizing of its images; it normalises for itself.
        architecture: Name of the network, if the file names it.
        metadata: All that the file says, parsed where it is JSON.
        rule: How boxes are chosen from what a detector's file gives; None for another task.
    """

    def __init__(self, model: OrtModel | TrtModel) -> None:
        missing = [key for key in _REQUIRED if key not in model.metadata]
        if missing:
            raise RequestError(
                f"'{model.path}' was not exported by visionkd: its metadata lacks {', '.join(missing)}, so that its "
                "classes, input size and statistics are unknown",
                hint="Export it from the model it came from: visionkd export MODEL --format onnx",
            )
        self._model = model
        self.path: Path = model.path
        self.metadata: dict[str, Any] = {key: _parsed(value) for key, value in model.metadata.items()}
        self.task: TaskName = self.metadata["task"]
        self.input = InputSpec.from_dict(self.metadata["input"])
        classes = self.metadata.get("classes")
        self.classes: tuple[str, ...] | None = tuple(classes) if classes else None
        self.architecture: str | None = self.metadata.get("architecture")
        self.rule = BoxRule.from_dict(self.metadata.get("boxes", {})) if self.task == "detection" else None

    def predict_logits(self, batch: np.ndarray) -> np.ndarray:
        """Return logits, float32, for ``batch``, N x 3 x H x W float32 in [0, 1].

        Returns:
            N x C, or N x C x h x w of a segmentation network.
        """
        return self._model.run(np.ascontiguousarray(batch, dtype=np.float32))[0]

    @property
    def num_classes(self) -> int:
        """Number of outputs; where the file names no classes, the model is run once to see."""
        if self.classes is not None:
            return len(self.classes)
        blank = np.zeros((1, 3, *self.input.img_size), np.float32)
        if self.task == "detection":
            return self.predict_candidates(blank)[1].shape[2]
        return self.predict_logits(blank).shape[1]

    def predict_probs(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, N x C float32, for ``batch``, N x 3 x H x W float32 in [0, 1]."""
        return softmax(self.predict_logits(batch))

    def predict_images(self, images: Iterable[Image], *, batch_size: int = 16) -> np.ndarray:
        """Return probabilities, N x C, for RGB images of any size."""
        found, waiting = [], []
        for image in images:
            waiting.append(preprocess(image, self.input))
            if len(waiting) == batch_size:
                found.append(self.predict_probs(to_batch(waiting)))
                waiting = []
        if waiting:
            found.append(self.predict_probs(to_batch(waiting)))
        if not found:
            raise ValueError("there are no images")
        return np.concatenate(found)

    def predict_maps(
        self, images: Iterable[Image], *, batch_size: int = 1, columns: Sequence[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the class of each pixel, uint8 H x W at the image's own size, of RGB images of any size.

        Args:
            images: What to look at; each is resized to the network's input as a whole.
            batch_size: Images at a time.
            columns: Outputs that compete, in the order of the classes that are answered; None takes all.
        """
        waiting: list[tuple[np.ndarray, tuple[int, int]]] = []
        for image in images:
            waiting.append((stretch(image, self.input), (image.height, image.width)))
            if len(waiting) == batch_size:
                yield from self._maps(waiting, columns)
                waiting = []
        if waiting:
            yield from self._maps(waiting, columns)

    def _maps(
        self, views: Sequence[tuple[np.ndarray, tuple[int, int]]], columns: Sequence[int] | None
    ) -> Iterator[np.ndarray]:
        logits = self.predict_logits(to_batch([view for view, _ in views]))
        if columns is not None:
            logits = logits[:, list(columns)]
        for values, (_, size) in zip(logits, views, strict=True):
            yield resize_maps(values, size).argmax(0).astype(np.uint8)

    def predict_candidates(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all boxes of a detector and their scores for ``batch``, N x 3 x H x W float32 in [0, 1].

        Returns:
            Boxes, N x M x 4 in pixels of the batch, or N x M x C x 4 where each class has its own, and scores from 0 to
            1, N x M x C.
        """
        answers = self._model.run(np.ascontiguousarray(batch, dtype=np.float32))
        named = dict(zip(self._model.outputs, answers, strict=True))
        return named["boxes"], named["scores"]

    def answers(self, batch: np.ndarray) -> np.ndarray:
        """Return logits, or of a detector its candidates in one array, as :func:`joined` makes it."""
        if self.task == "detection":
            return joined(*self.predict_candidates(batch))
        return self.predict_logits(batch)

    def predict_boxes(
        self, images: Iterable[Image], *, batch_size: int = 1, columns: Sequence[int] | None = None
    ) -> Iterator[FoundBoxes]:
        """Yield what is on RGB images of any size, in their own pixels.

        Args:
            images: What to look at; each is letterboxed into the network's input.
            batch_size: Images at a time.
            columns: Classes that count, in the order of the labels that are answered; None takes all.
        """
        waiting: list[tuple[np.ndarray, float, tuple[int, int]]] = []
        for image in images:
            waiting.append((*letterbox(image, self.input), (image.height, image.width)))
            if len(waiting) == batch_size:
                yield from self._boxes(waiting, columns)
                waiting = []
        if waiting:
            yield from self._boxes(waiting, columns)

    def _boxes(
        self, views: Sequence[tuple[np.ndarray, float, tuple[int, int]]], columns: Sequence[int] | None
    ) -> Iterator[FoundBoxes]:
        assert self.rule is not None
        boxes, scores = self.predict_candidates(to_batch([view for view, _, _ in views]))
        for given, values, (_, scale, size) in zip(boxes, scores, views, strict=True):
            yield choose_boxes(given, values, self.rule, columns).on_picture(scale, size)


def open_session(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    accelerator: Accelerator | None = None,
    cuda_graph: bool = False,
) -> Session:
    """Open a model file that visionkd exported.

    Args:
        path: An ``.onnx`` file, or an ``.engine`` file that was built for this device.
        threads: Threads to run with; None leaves the choice to ONNX Runtime.
        accelerator: ``cpu``, ``gpu`` or ``auto``; None takes the CPU for ONNX. An engine runs on the GPU only.
        cuda_graph: Launch an engine as a CUDA graph.

    Raises:
        RequestError: If the file is of another kind, does not describe itself, or does not run here.
        DataError: If it is damaged.
    """
    path = Path(path)
    if is_engine_file(path):
        if accelerator == "cpu":
            raise RequestError(
                Problem("--accelerator", f"'{path}' is a TensorRT engine, which runs on a GPU only", "Leave it out.")
            )
        from visionkd.runtime.trt import TrtModel

        return Session(TrtModel(path, cuda_graph=cuda_graph))
    if not is_model_file(path):
        raise RequestError(f"'{path}' is not a model file that this version runs; known: {', '.join(_SUFFIXES)}")
    return Session(OrtModel(path, threads=threads, accelerator=accelerator or "cpu"))


def is_model_file(name: str | os.PathLike[str]) -> bool:
    """Tell whether ``name`` looks like a file for :func:`open_session`."""
    return os.fspath(name).lower().endswith(_SUFFIXES)


def is_engine_file(name: str | os.PathLike[str]) -> bool:
    """Tell whether ``name`` looks like a TensorRT engine."""
    return os.fspath(name).lower().endswith(ENGINE_SUFFIX)


def backend_of(name: str | os.PathLike[str]) -> Literal["onnxruntime", "tensorrt"]:
    """Return what runs a model file."""
    return "tensorrt" if is_engine_file(name) else "onnxruntime"


def top_classes(probs: np.ndarray, classes: Sequence[str] | None, k: int) -> list[list[tuple[str, float]]]:
    """Return the ``k`` likeliest classes of each row of ``probs``, N x C, with their probabilities."""
    names = classes if classes is not None else [str(index) for index in range(probs.shape[1])]
    order = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    return [[(names[c], float(row[c])) for c in best] for row, best in zip(probs, order, strict=True)]


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
