"""Opening a DATA argument: a directory, an archive, the name of a known data set, or ``shapes``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from visionkd.config.schema import DataConfig
from visionkd.data import known
from visionkd.data.archive import open_archive
from visionkd.data.boxes import BOX_CLASSES, BoxOptions, NovelClasses, ShapesBoxes
from visionkd.data.folder import open_folder
from visionkd.data.layout import Labels, Opened, fingerprint, some
from visionkd.data.segmentation import MASK_CLASSES, DenseOptions, ShapesMasks
from visionkd.data.shapes import CLASSES, MAX_SIZE, MIN_SIZE, ShapesSource
from visionkd.data.subset import SubsetSource, stratified_split, stratified_subset, targets_of
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.types import DataSet, Source

SHAPES = "shapes"
# Far beyond any number of training scenes, and a multiple of the number of classes.
_VAL_SCENES = 1 << 40
_TRAINED = ("train", "all")
_TASKS = ("classification", "segmentation", "detection")


def known_names() -> tuple[str, ...]:
    """Return the names that stand for a data set."""
    return (SHAPES, *known.names())


def open_data(
    path: str,
    *,
    config: DataConfig | None = None,
    seed: int = 0,
    img_size: int = 224,
    task: str = "auto",
    classes: Callable[[], Sequence[str]] | None = None,
) -> DataSet:
    """Open a data set.

    Args:
        path: Directory, archive, or known name.
        config: Splits, limits and the settings of ``shapes``; its own ``path`` is not read.
        seed: Decides which samples are held out or kept where that is left to chance.
        img_size: Size of drawn scenes where ``config.shapes.size`` is None.
        task: ``auto`` takes what the layout says; ``segmentation`` of ``shapes`` gives its maps, ``detection`` its
            boxes.
        classes: Gives the class names of images that have no labels, whose targets are then -1. None refuses such data.

    Returns:
        The data set. Splits are ``train`` and ``val`` where present, whatever else was found (``test``), and ``all``
        for a folder of classes without splits, which evaluation of such a folder wants.

    Raises:
        RequestError: If the path is unknown, or its task or split.
        DataError: If the data cannot be used.
        DownloadError: If a known data set cannot be fetched.
    """
    config = config or DataConfig()
    path = os.fspath(path)
    if task not in ("auto", *_TASKS):
        raise RequestError(Problem("--task", f"'{task}' is unknown", f"Use {' or '.join(_TASKS)}"))
    opened = _open(path, config, img_size, "required" if classes is None else "optional", task)
    labeled = bool(opened.classes) and opened.task == "classification"
    if classes is not None and not opened.classes:
        opened = dataclasses.replace(opened, classes=tuple(classes()))
    splits, messages = _choose_splits(opened, config, seed)
    for split, limit in (("train", config.limit_train), ("val", config.limit_val)):
        if limit is not None and split in splits and limit < len(splits[split]):
            source = splits[split]
            splits[split] = stratified_subset(source, limit, seed=seed)
            spread = ", spread over the classes" if labeled else ""
            messages.append(f"{split} is limited to {limit} of {len(source)} images{spread}.")
            if labeled and limit < len(opened.classes):
                messages.append(f"{limit} images cannot show all {len(opened.classes)} classes.")
    parts = [opened.fingerprint.encode()]
    novel = _novel(opened, config)
    if isinstance(splits.get("train"), SubsetSource):
        # Sample numbers count within the training split: what was taken out of it belongs to its identity.
        parts.append(splits["train"].indices.tobytes())
    if novel:
        indices = [opened.classes.index(name) for name in novel]
        splits = {name: NovelClasses(each, indices, hidden=name == "train") for name, each in splits.items()}
        parts.append("\n".join(novel).encode())
        messages.append(f"Boxes of the {len(novel)} novel classes are left out of training: {some(novel)}.")
    return DataSet(
        name=opened.name,
        task=opened.task,
        classes=opened.classes,
        splits=splits,
        fingerprint=fingerprint(parts) if len(parts) > 1 else opened.fingerprint,
        messages=(*opened.messages, *messages),
        novel=novel,
    )


def _novel(opened: Opened, config: DataConfig) -> tuple[str, ...]:
    """Return the novel classes, in the order of the data's.

    Raises:
        RequestError: If one is none of the data's, if all are, or if the data has no boxes.
    """
    wanted = config.novel
    if not wanted:
        return ()
    if opened.task != "detection":
        raise RequestError(Problem("data.novel", f"'{opened.name}' has no boxes to leave out", "Leave it out."))
    if missing := [name for name in wanted if name not in opened.classes]:
        hint = did_you_mean(missing[0], opened.classes) or f"Its classes: {some(opened.classes, 20)}"
        raise RequestError(Problem("data.novel", f"'{opened.name}' has no class {some(missing)}", hint))
    if set(wanted) == set(opened.classes):
        raise RequestError(Problem("data.novel", "names all classes, and none is left to train on", "Leave some out."))
    return tuple(name for name in opened.classes if name in wanted)


def _open(path: str, config: DataConfig, img_size: int, labels: Labels, task: str) -> Opened:
    place = os.path.expanduser(path)
    dense = boxes = None
    if task in ("auto", "segmentation"):
        dense = DenseOptions(required=task == "segmentation", classes=config.classes, ignore=config.ignore)
    if task in ("auto", "detection"):
        boxes = BoxOptions(required=task == "detection", classes=config.classes)
    if path in known_names():
        if not os.path.isdir(place) or not os.listdir(place):
            return _open_shapes(config, img_size, task) if path == SHAPES else _open_known(path, task)
        opened = open_folder(place, labels=labels, dense=dense, boxes=boxes)
        said = f"'{path}' is taken as the directory of that name here, not as the known data set."
        return dataclasses.replace(opened, messages=(said, *opened.messages))
    if os.path.isdir(place):
        return open_folder(place, labels=labels, dense=dense, boxes=boxes)
    if os.path.exists(place):
        return open_archive(place, labels=labels, dense=dense, boxes=boxes)
    hint = did_you_mean(path, known_names()) if os.sep not in path else ""
    listing = "'visionkd data list' shows the known names."
    raise RequestError(
        Problem("--data", f"'{path}' is neither a directory, nor an archive, nor a known data set", hint or listing),
        hint=listing if hint else None,
    )


def _open_known(name: str, task: str) -> Opened:
    if task in ("segmentation", "detection"):
        what = "maps of classes" if task == "segmentation" else "boxes"
        raise RequestError(Problem("--task", f"'{name}' has no {what} for {task}", "Give a directory, or shapes"))
    return known.open_known(name)


def _open_shapes(config: DataConfig, img_size: int, task: str) -> Opened:
    shapes = config.shapes
    kind: Any = {"segmentation": ShapesMasks}.get(task, ShapesSource)
    classes = {"segmentation": MASK_CLASSES}.get(task, CLASSES)
    if task == "detection":
        classes = _shapes_classes(config)
        kind = partial(ShapesBoxes, classes=classes)
    version = {"segmentation": b"shapes-maps-v1", "detection": b"shapes-boxes-v1"}.get(task, b"shapes-v1")
    size = shapes.size or min(max(img_size, MIN_SIZE), MAX_SIZE)
    return Opened(
        name=SHAPES,
        classes=classes,
        sources={
            "train": kind(shapes.seed, shapes.num_train, size),
            "val": kind(shapes.seed, shapes.num_val, size, first=_VAL_SCENES),
        },
        # Bump the version whenever the drawing changes: stored teacher labels belong to the pictures.
        fingerprint=fingerprint(
            [
                version,
                str((shapes.seed, shapes.num_train, shapes.num_val, size)).encode(),
                *([] if classes in (CLASSES, MASK_CLASSES) else [repr(classes).encode()]),
            ]
        ),
        task="classification" if task == "auto" else task,  # type: ignore[arg-type]
    )


def _shapes_classes(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the classes of the scenes' boxes; objects of no other class have one.

    Raises:
        RequestError: If a class asked for is none of theirs.
    """
    known = BOX_CLASSES[config.shapes.vocabulary]
    if missing := [name for name in config.classes or () if name not in known]:
        hint = did_you_mean(missing[0], known)
        if missing[0] in BOX_CLASSES["combinations"]:
            hint = "Name boxes by colour and shape: data.shapes.vocabulary=combinations."
        raise RequestError(Problem("data.classes", f"'{SHAPES}' has no class {some(missing)}", hint or None))
    return config.classes or known


def _choose_splits(opened: Opened, config: DataConfig, seed: int) -> tuple[dict[str, Source], list[str]]:
    """Find the split to train on and the one to validate on, and say what had to be decided."""
    splits = dict(opened.sources)
    wanted = config.val_split
    if wanted is not None and wanted not in splits:
        found = ", ".join(sorted(splits))
        raise RequestError(
            Problem("data.val_split", f"'{wanted}' is not a split of this data", did_you_mean(wanted, splits)),
            hint=f"Found: {found}.",
        )
    if wanted is not None:
        splits["val"] = splits[wanted]
        if wanted == "all":
            splits["train"] = splits["all"]
        seen = ", which is trained on too: its accuracy says nothing about new images" if wanted in _TRAINED else ""
        return splits, [] if wanted == "val" else [f"Validating on the split '{wanted}'{seen}."]
    if "val" in splits:
        return splits, []
    if "test" in splits:
        splits["val"] = splits["test"]
        return splits, ["There is no validation split: validating on test."] if "train" in splits else []
    whole = splits.pop("train", None) or splits["all"]
    targets = targets_of(whole)
    labeled = bool((targets >= 0).any())
    train, val = stratified_split(targets, config.val_fraction, seed)
    splits["train"] = SubsetSource(whole, train)
    splits["all"] = whole
    counts = [(name, int((targets == label).sum())) for label, name in enumerate(opened.classes)]
    single = [name for name, count in counts if count == 1]
    said = []
    if len(val):
        splits["val"] = SubsetSource(whole, val)
        share = f"{config.val_fraction:.0%}{' of each class' if labeled else ''}, seed {seed}"
        said.append(
            f"There is no validation split: {len(val)} of {len(whole)} images are held out, "
            f"{share}; {len(train)} are left to train on."
        )
    if single:
        shown = ", ".join(f"'{name}'" for name in single[:5]) + (f" and {len(single) - 5} more" if single[5:] else "")
        kept = "Classes with one image, which stays in training"
        said.append(f"{kept}: {shown}." if len(val) else f"{kept} so that none is left to validate on: {shown}.")
    return splits, said
