"""Say what is on pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionkd.errors import Problem, RequestError, UnreadableImageError
from visionkd.files import check_writable, replacing
from visionkd.runtime.boxes import FoundBoxes
from visionkd.runtime.bundle_file import file_to_run
from visionkd.runtime.draw import class_shares, draw_boxes, draw_labels, draw_map, map_picture
from visionkd.runtime.images import decode_rgb, find_images
from visionkd.runtime.preprocess import preprocess, to_batch
from visionkd.runtime.session import Session, is_model_file, open_session, top_classes
from visionkd.types import Listener, Progress
from visionkd.workflows.results import Prediction, PredictResult

_BATCH = 16
#: Least score of a box that is answered, where nobody says.
MIN_SCORE = 0.3
_LABELS, _BOXES = 5, 100


def predict(
    *,
    model: str,
    images: Sequence[str],
    save: str | None = None,
    top_k: int | None = None,
    min_score: float | None = None,
    classes: Sequence[str] | None = None,
    encoder: str | None = None,
    accelerator: str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> PredictResult:
    """Label images, their pixels where the model is a segmentation network, or find boxes where it is a detector.

    Args:
        model: MODEL.
        images: Files, directories and patterns.
        save: Directory for copies with the labels drawn on them; of a segmentation network also for the maps, as
            palette pictures whose values are the classes.
        top_k: Labels per image, at most; None takes 5, and 100 boxes.
        min_score: Least score of a box, from 0 to 1; None takes 0.3. Nothing below the model's own threshold is found.
        classes: Names of other classes to look for, of a detector whose classes are texts.
        encoder: MODEL of the image-text encoder that reads them; None takes the one that the detector's package names.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        overwrite: Replace pictures that exist in ``save``.
        listener: Is told what happens.

    Raises:
        RequestError: If the model or an image does not exist, or ``min_score`` is given for another task.
    """
    listener = listener or Listener()
    files = find_images(images)
    loaded: Any
    model = file_to_run(model)
    if is_model_file(model):
        _refuse_classes(model, classes, encoder)
        loaded = open_session(model, accelerator=accelerator or "auto")  # type: ignore[arg-type]
        names = loaded.classes
    else:
        from visionkd.models.classes import describe
        from visionkd.workflows._networks import load_classifier

        loaded = load_classifier(model)
        if classes is not None:
            from visionkd.workflows._open_classes import take_classes

            take_classes(loaded, classes, model=model, encoder=encoder)
        elif encoder is not None:
            raise RequestError(Problem("--encoder", "reads the names of --classes, and none are given"))
        names = describe(loaded.classes) if loaded.classes is not None else None
    if min_score is not None and loaded.task != "detection":
        raise RequestError(Problem("--min-score", f"is about boxes, and {model} finds none", "Leave it out."))
    maps = loaded.task == "segmentation"
    top_k = top_k or (_BOXES if loaded.task == "detection" else _LABELS)
    targets = _saved_names(files, Path(save), overwrite=overwrite, maps=maps) if save is not None else {}
    if targets:
        check_writable(next(iter(targets.values())))
    predictions: list[Prediction] = []
    skipped: list[tuple[str, str]] = []
    for first in range(0, len(files), _BATCH):
        readable: list[Path] = []
        pictures = []
        for file in files[first : first + _BATCH]:
            try:
                pictures.append(decode_rgb(file))
                readable.append(file)
            except UnreadableImageError as error:
                skipped.append((str(file), error.message))
        if readable and loaded.task == "segmentation":
            predictions += _maps(loaded, readable, pictures, names, top_k, targets, accelerator, model)
        elif readable and loaded.task == "detection":
            least = MIN_SCORE if min_score is None else min_score
            predictions += _boxes(loaded, readable, pictures, names, top_k, targets, accelerator, least)
        elif readable:
            probs = _probs(loaded, to_batch([preprocess(each, loaded.input) for each in pictures]), accelerator)
            for file, picture, best in zip(readable, pictures, top_classes(probs, names, top_k), strict=True):
                saved = targets.get(file)
                if saved is not None:
                    _save(draw_labels(picture, best), saved)
                labels, scores = tuple(label for label, _ in best), tuple(score for _, score in best)
                predictions.append(Prediction(file, labels, scores, saved))
        listener.progress(Progress("predict", min(first + _BATCH, len(files)), len(files)))
    return PredictResult(tuple(predictions), tuple(skipped))


def _refuse_classes(model: str, classes: Sequence[str] | None, encoder: str | None) -> None:
    """Refuse other classes for a model file, whose classes lie in its graph."""
    if classes is not None or encoder is not None:
        key = "--classes" if classes is not None else "--encoder"
        hint = "Take the run or the packaged model that it was exported from."
        raise RequestError(Problem(key, f"the classes of '{model}' were fixed when it was exported", hint))


def _save(picture: Image.Image, file: Path) -> None:
    with replacing(file) as temporary:
        picture.save(temporary, format="PNG")


def _probs(loaded: Any, batch: np.ndarray, accelerator: str | None) -> np.ndarray:
    if isinstance(loaded, Session):
        return loaded.predict_probs(batch)
    import torch

    device = _device(accelerator)
    loaded.to(device)
    with torch.inference_mode():
        return loaded(torch.from_numpy(batch).to(device)).logits.float().softmax(1).cpu().numpy()


def _device(accelerator: str | None) -> Any:
    import torch

    if accelerator == "gpu" and not torch.cuda.is_available():
        raise RequestError("--accelerator gpu: no GPU is usable here.", hint="Use --accelerator cpu.")
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


def _maps(
    loaded: Any,
    files: Sequence[Path],
    pictures: Sequence[Image.Image],
    classes: Sequence[str] | None,
    top_k: int,
    targets: Mapping[Path, Path],
    accelerator: str | None,
    model: str,
) -> Iterator[Prediction]:
    """Yield what a segmentation network says of images; where they are saved, a map beside each picture."""
    names = tuple(classes) if classes else tuple(f"class {index}" for index in range(loaded.num_classes))
    for file, picture, found in zip(files, pictures, _class_maps(loaded, pictures, accelerator, model), strict=True):
        shares = class_shares(found, len(names))[:top_k]
        saved = targets.get(file)
        saved_map = None
        if saved is not None:
            saved_map = _map_file(saved)
            _save(draw_map(picture, found, names), saved)
            _save(map_picture(found, len(names)), saved_map)
        labels, parts = tuple(names[index] for index, _ in shares), tuple(share / 100.0 for _, share in shares)
        yield Prediction(file, labels, parts, saved, saved_map)


def _class_maps(
    loaded: Any, pictures: Sequence[Image.Image], accelerator: str | None, model: str
) -> Iterator[np.ndarray]:
    if isinstance(loaded, Session):
        yield from loaded.predict_maps(pictures)
        return
    from visionkd.workflows._segmentation import class_map
    from visionkd.workflows.evaluate import data_config, run_of

    run, device = run_of(model), _device(accelerator)
    config = data_config(None, run=run) if run is not None else None  # as the run evaluated
    loaded.to(device).eval()
    for picture in pictures:
        yield class_map(loaded, picture, config=config, device=device)


def _boxes(
    loaded: Any,
    files: Sequence[Path],
    pictures: Sequence[Image.Image],
    classes: Sequence[str] | None,
    top_k: int,
    targets: Mapping[Path, Path],
    accelerator: str | None,
    min_score: float,
) -> Iterator[Prediction]:
    """Yield the boxes that a detector finds on images, drawn on a copy of each where they are saved."""
    names = tuple(classes) if classes else tuple(f"class {index}" for index in range(loaded.num_classes))
    for file, picture, all_found in zip(files, pictures, _found(loaded, pictures, accelerator), strict=True):
        found = all_found.above(min_score, top_k)
        saved = targets.get(file)
        if saved is not None:
            _save(draw_boxes(picture, found.boxes, found.labels.tolist(), found.scores.tolist(), names), saved)
        boxes = tuple((left, top, right, bottom) for left, top, right, bottom in found.boxes.tolist())
        labels = tuple(names[label] for label in found.labels.tolist())
        yield Prediction(file, labels, tuple(found.scores.tolist()), saved, boxes=boxes)


def _found(loaded: Any, pictures: Sequence[Image.Image], accelerator: str | None) -> Iterator[FoundBoxes]:
    if isinstance(loaded, Session):
        yield from loaded.predict_boxes(pictures)
        return
    from visionkd.workflows._found import found_boxes

    device = _device(accelerator)
    loaded.to(device).eval()
    for picture in pictures:
        yield found_boxes(loaded, picture, device=device)


def _map_file(saved: Path) -> Path:
    return saved.with_name(f"{saved.stem}.map.png")


def _saved_names(files: Sequence[Path], directory: Path, *, overwrite: bool, maps: bool = False) -> dict[Path, Path]:
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
    written = [*names.values(), *(map(_map_file, names.values()) if maps else ())]
    taken_files = [path for path in written if path.exists()]
    if taken_files and not overwrite:
        raise RequestError(
            f"{taken_files[0]} exists ({len(taken_files)} in all), and nothing is written over unasked.",
            hint="Give --overwrite, or another directory with --save.",
        )
    return names
