"""Say what is on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from visionkd.errors import Problem, RequestError, UnreadableImageError
from visionkd.files import check_writable, replacing
from visionkd.runtime.bundle_file import file_to_run
from visionkd.runtime.images import decode_rgb, find_images
from visionkd.runtime.session import is_model_file, open_session
from visionkd.types import Listener, Progress
from visionkd.workflows._predicted import BY_TASK, Labels
from visionkd.workflows.results import Prediction, PredictResult

_BATCH = 16


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
    teller = BY_TASK.get(loaded.task, Labels)(
        loaded, names, model=model, accelerator=accelerator, top_k=top_k, min_score=min_score
    )
    targets = _saved_names(files, Path(save), overwrite=overwrite, teller=teller) if save is not None else {}
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
        answers = teller.answers(pictures) if readable else ()
        for file, picture, answer in zip(readable, pictures, answers, strict=True):
            saved = targets.get(file)
            if saved is not None:
                for path, drawn in zip(teller.files(saved), teller.drawn(picture, answer), strict=True):
                    _save(drawn, path)
            predictions.append(teller.prediction(file, answer, saved))
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


def _saved_names(files: Sequence[Path], directory: Path, *, overwrite: bool, teller: Labels) -> dict[Path, Path]:
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
    written = [path for saved in names.values() for path in teller.files(saved)]
    taken_files = [path for path in written if path.exists()]
    if taken_files and not overwrite:
        raise RequestError(
            f"{taken_files[0]} exists ({len(taken_files)} in all), and nothing is written over unasked.",
            hint="Give --overwrite, or another directory with --save.",
        )
    return names
