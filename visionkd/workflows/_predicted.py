"""What a model says of pictures, by task: its answers, what they are called, and how they are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionkd.errors import RequestError
from visionkd.runtime.boxes import FoundBoxes
from visionkd.runtime.draw import class_shares, draw_boxes, draw_labels, draw_map, map_picture
from visionkd.runtime.preprocess import preprocess, to_batch
from visionkd.runtime.session import Session, top_classes
from visionkd.workflows.results import Prediction

#: Least score of a box that is answered, where nobody says.
MIN_SCORE = 0.3


class Labels:
    """The likeliest classes of a picture.

    Args:
        loaded: A session of a file, or a network.
        classes: Names of the classes.
        model: What the user called it.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        top_k: Labels or boxes of a picture, at most; None takes the task's own number.
        min_score: Least score of a box; None takes :data:`MIN_SCORE`.
    """

    #: Labels of a picture where nobody says.
    most = 5

    def __init__(
        self, loaded: Any, classes: Sequence[str] | None, *, model: str, accelerator: str | None,
        top_k: int | None, min_score: float | None = None,
    ) -> None:  # fmt: skip
        self.loaded, self.classes, self.model, self.accelerator = loaded, classes, model, accelerator
        self.top_k = top_k or self.most
        self.min_score = MIN_SCORE if min_score is None else min_score

    def answers(self, pictures: Sequence[Image.Image]) -> Iterator[Any]:
        """Yield an answer for each picture."""
        batch = to_batch([preprocess(each, self.loaded.input) for each in pictures])
        yield from top_classes(self._probs(batch), self.classes, self.top_k)

    def _probs(self, batch: np.ndarray) -> np.ndarray:
        if isinstance(self.loaded, Session):
            return self.loaded.predict_probs(batch)
        import torch

        device = self._on_device()
        with torch.inference_mode():
            return self.loaded(torch.from_numpy(batch).to(device)).logits.float().softmax(1).cpu().numpy()

    def files(self, saved: Path) -> tuple[Path, ...]:
        """Return the names of the pictures that :meth:`drawn` returns; ``saved`` is the first."""
        return (saved,)

    def drawn(self, picture: Image.Image, answer: Any) -> tuple[Image.Image, ...]:
        """Return pictures of an answer."""
        return (draw_labels(picture, answer),)

    def prediction(self, file: Path, answer: Any, saved: Path | None) -> Prediction:
        """Return an answer in words."""
        return Prediction(file, tuple(label for label, _ in answer), tuple(score for _, score in answer), saved)

    def _on_device(self) -> Any:
        """Move the network to its device."""
        import torch

        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise RequestError("--accelerator gpu: no GPU is usable here.", hint="Use --accelerator cpu.")
        device = torch.device("cuda" if torch.cuda.is_available() and self.accelerator != "cpu" else "cpu")
        self.loaded.to(device).eval()
        return device

    def _names(self) -> tuple[str, ...]:
        return tuple(self.classes or (f"class {index}" for index in range(self.loaded.num_classes)))


class Maps(Labels):
    """The class of each pixel of a picture; its labels are those on it, the largest first."""

    def answers(self, pictures: Sequence[Image.Image]) -> Iterator[np.ndarray]:
        if isinstance(self.loaded, Session):
            yield from self.loaded.predict_maps(pictures)
            return
        from visionkd.workflows._segmentation import class_map
        from visionkd.workflows.evaluate import data_config, run_of

        run, device = run_of(self.model), self._on_device()
        config = data_config(None, run=run) if run is not None else None  # as the run evaluated
        for picture in pictures:
            yield class_map(self.loaded, picture, config=config, device=device)

    def files(self, saved: Path) -> tuple[Path, ...]:
        return saved, saved.with_name(f"{saved.stem}.map.png")

    def drawn(self, picture: Image.Image, answer: np.ndarray) -> tuple[Image.Image, ...]:
        names = self._names()
        return draw_map(picture, answer, names), map_picture(answer, len(names))

    def prediction(self, file: Path, answer: np.ndarray, saved: Path | None) -> Prediction:
        names = self._names()
        shares = class_shares(answer, len(names))[: self.top_k]
        saved_map = self.files(saved)[1] if saved is not None else None
        labels = tuple(names[index] for index, _ in shares)
        return Prediction(file, labels, tuple(share / 100.0 for _, share in shares), saved, saved_map)


class Boxes(Labels):
    """The boxes on a picture, the highest score first."""

    most = 100

    def answers(self, pictures: Sequence[Image.Image]) -> Iterator[FoundBoxes]:
        for found in self._found(pictures):
            yield found.above(self.min_score, self.top_k)

    def _found(self, pictures: Sequence[Image.Image]) -> Iterator[FoundBoxes]:
        if isinstance(self.loaded, Session):
            yield from self.loaded.predict_boxes(pictures)
            return
        from visionkd.workflows._found import found_boxes

        device = self._on_device()
        for picture in pictures:
            yield found_boxes(self.loaded, picture, device=device)

    def drawn(self, picture: Image.Image, answer: FoundBoxes) -> tuple[Image.Image, ...]:
        return (draw_boxes(picture, answer.boxes, answer.labels.tolist(), answer.scores.tolist(), self._names()),)

    def prediction(self, file: Path, answer: FoundBoxes, saved: Path | None) -> Prediction:
        names = self._names()
        boxes = tuple((left, top, right, bottom) for left, top, right, bottom in answer.boxes.tolist())
        labels = tuple(names[label] for label in answer.labels.tolist())
        return Prediction(file, labels, tuple(answer.scores.tolist()), saved, boxes=boxes)


BY_TASK: Mapping[str, type[Labels]] = {"segmentation": Maps, "detection": Boxes}
