"""Say what is on pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionkd.errors import RequestError, UnreadableImageError
from visionkd.files import check_writable, replacing
from visionkd.runtime.bundle_file import file_to_run
from visionkd.runtime.draw import class_shares, draw_labels, draw_map, map_picture
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
    """Label images, or the pixels of images where the model is a segmentation network.

    Args:
        model: MODEL.
        images: Files, directories and patterns.
        save: Directory for copies with the labels drawn on them; of a segmentation network also for the maps, as
            palette pictures whose values are the classes.
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
    maps = loaded.task == "segmentation"
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
            predictions += _maps(loaded, readable, pictures, classes, top_k, targets, accelerator, model)
        elif readable:
            probs = _probs(loaded, to_batch([preprocess(each, loaded.input) for each in pictures]), accelerator)
            for file, picture, best in zip(readable, pictures, top_classes(probs, classes, top_k), strict=True):
                saved = targets.get(file)
                if saved is not None:
                    _save(draw_labels(picture, best), saved)
                labels, scores = tuple(label for label, _ in best), tuple(score for _, score in best)
                predictions.append(Prediction(file, labels, scores, saved))
        listener.progress(Progress("predict", min(first + _BATCH, len(files)), len(files)))
    return PredictResult(tuple(predictions), tuple(skipped))


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
