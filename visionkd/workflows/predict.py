"""Say what is on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionkd.errors import RequestError, UnreadableImageError
from visionkd.files import check_writable, replacing
from visionkd.runtime.bundle_file import file_to_run
from visionkd.runtime.draw import draw_labels
from visionkd.runtime.images import decode_rgb, find_images
from visionkd.runtime.preprocess import preprocess, to_batch
from visionkd.runtime.session import Session, is_model_file, open_session, top_classes
from visionkd.types import Listener, Progress
from visionkd.workflows.results import Prediction, PredictResult

_BATCH = 16


def predict(
    *,
    model: str,
    images: Sequence[str],
    save: str | None = None,
    top_k: int = 5,
    accelerator: str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> PredictResult:
    """Label images.

    Args:
        model: MODEL.
        images: Files, directories and patterns.
        save: Directory for copies with the labels drawn on them.
        top_k: Labels per image.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        overwrite: Replace pictures that exist in ``save``.
        listener: Is told what happens.

    Raises:
        RequestError: If the model or an image does not exist.
    """
    listener = listener or Listener()
    files = find_images(images)
    loaded: Any
    model = file_to_run(model)
    if is_model_file(model):
        loaded = open_session(model, accelerator=accelerator or "auto")  # type: ignore[arg-type]
        classes = loaded.classes
    else:
        from visionkd.models.classes import describe
        from visionkd.workflows._networks import load_classifier

        loaded = load_classifier(model)
        classes = describe(loaded.classes) if loaded.classes is not None else None
    targets = _saved_names(files, Path(save), overwrite=overwrite) if save is not None else {}
    if targets:
        check_writable(next(iter(targets.values())))
    predictions: list[Prediction] = []
    skipped: list[tuple[str, str]] = []
    for first in range(0, len(files), _BATCH):
        readable: list[Path] = []
        arrays = []
        for file in files[first : first + _BATCH]:
            try:
                arrays.append(preprocess(decode_rgb(file), loaded.input))
                readable.append(file)
            except UnreadableImageError as error:
                skipped.append((str(file), error.message))
        if readable:
            probs = _probs(loaded, to_batch(arrays), accelerator)
            for file, best in zip(readable, top_classes(probs, classes, top_k), strict=True):
                saved = targets.get(file)
                if saved is not None:
                    with replacing(saved) as temporary:
                        draw_labels(decode_rgb(file), best).save(temporary, format="PNG")
                labels, scores = tuple(label for label, _ in best), tuple(score for _, score in best)
                predictions.append(Prediction(file, labels, scores, saved))
        listener.progress(Progress("predict", min(first + _BATCH, len(files)), len(files)))
    return PredictResult(tuple(predictions), tuple(skipped))


def _probs(loaded: Any, batch: np.ndarray, accelerator: str | None) -> np.ndarray:
    if isinstance(loaded, Session):
        return loaded.predict_probs(batch)
    import torch

    if accelerator == "gpu" and not torch.cuda.is_available():
        raise RequestError("--accelerator gpu: no GPU is usable here.", hint="Use --accelerator cpu.")
    device = torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")
    loaded.to(device)
    with torch.inference_mode():
        return loaded(torch.from_numpy(batch).to(device)).logits.float().softmax(1).cpu().numpy()


def _saved_names(files: Sequence[Path], directory: Path, *, overwrite: bool) -> dict[Path, Path]:
    """Give each picture a name of its own in ``directory``, also where files of several folders share one."""
    taken: set[str] = set()
    names = {}
    for file in files:
        name, number = f"{file.stem}.png", 2
        while name in taken:
            name, number = f"{file.stem}-{number}.png", number + 1
        taken.add(name)
        names[file] = directory / name
        if file.parent.resolve() == directory.resolve():
            raise RequestError(
                f"--save {directory} would add pictures to the folder they come from.", hint="Give another directory."
            )
    taken_files = [path for path in names.values() if path.exists()]
    if taken_files and not overwrite:
        raise RequestError(
            f"{taken_files[0]} exists ({len(taken_files)} in all), and nothing is written over unasked.",
            hint="Give --overwrite, or another directory with --save.",
        )
    return names
