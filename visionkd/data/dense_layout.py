"""What a list of paths says about pictures and their maps of classes: which map belongs to which picture.

Folders and archives are read by the same rules. Known are ``<split>/images`` beside ``<split>/labels``, ``images``
beside ``labels`` with the splits below them or without any, ``<split>`` beside ``<split>annot``, and the layouts of VOC
and Cityscapes.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from visionkd.data.layout import SPLIT_NAMES, some
from visionkd.errors import DataError, RequestError
from visionkd.runtime.images import is_hidden, is_image_name
from visionkd.types import IGNORE

EXPECTED = (
    "Expected <split>/images/*.jpg and <split>/labels/*.png with splits train, val and test, images/<split> and"
    " labels/<split>, or the layout of VOC or Cityscapes"
)
#: What :attr:`DenseLayout.table` holds for values that stand for nothing.
INVALID = 254
_IMAGES = frozenset(("images", "image", "imgs", "img"))
_MAPS = frozenset(("labels", "label", "masks", "mask", "annotations", "annotation", "annots", "annot", "gt"))
_BESIDE = ("annot", "_annot", "_labels", "_label", "_masks", "_mask")
_CLASS_FILES = ("classes.txt", "class_names.txt")
#: Ends of a map's name that its picture's does not have.
_ENDINGS = ("_mask", "_label", "_labels", "_labelids", "_labeltrainids", "_gt", "_seg", "_l")
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
_OTHER_LABELS = (".txt", ".xml", ".json")
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person"
    " pottedplant sheep sofa train tvmonitor"
).split()
#: The 19 classes of Cityscapes that are evaluated, in the order of their training ids, by their values in ``labelIds``.
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """The samples of one split: positions of pictures and of their maps in the list of files."""

    images: np.ndarray
    maps: np.ndarray


@dataclass
class DenseLayout:
    """What :func:`read_dense_layout` found.

    Attributes:
        splits: Pairs by split; ``all`` without splits.
        classes: Class names, where the layout sets them.
        table: Class of each of the 256 values, 255 to be ignored, 254 for values that stand for nothing; None where a
            value is its class.
        class_file: Position of the file with the class names.
        messages: What was left out, to be said aloud.
    """

    splits: dict[str, Pairs]
    classes: tuple[str, ...] | None = None
    table: np.ndarray | None = None
    class_file: int | None = None
    messages: list[str] = field(default_factory=list)


@dataclass
class _Tree:
    """The paths of a data set."""

    where: str
    files: Sequence[str]
    read: Callable[[int], bytes]
    below: dict[str, dict[str, str]]  # folders in each folder, by name in lower case
    inside: dict[str, list[int]]  # files in each folder and those below it

    def path(self, *parts: str) -> str:
        return "/".join(part for part in parts if part)

    def pictures(self, folder: str) -> dict[str, int]:
        """Images in a folder and those below it, by their path in it without the suffix."""
        found = {}
        for index in self.inside.get(folder, ()):
            name = self.files[index]
            if is_image_name(posixpath.basename(name)):
                found[posixpath.splitext(name[len(folder) + 1 if folder else 0 :])[0]] = index
        return found


def read_dense_layout(
    files: Sequence[str], folders: Iterable[str], *, where: str, read: Callable[[int], bytes]
) -> DenseLayout | None:
    """Find pictures and their maps in a list of paths.

    Args:
        files: Relative paths of all files, with forward slashes.
        folders: Relative paths of all folders.
        where: What to call the data in messages.
        read: Gives the content of a file by its position.

    Returns:
        The layout, or None if this is none of a data set for segmentation.

    Raises:
        DataError: If a picture has no map or a map no picture, or if a split has none at all.
    """
    tree = _tree(files, folders, where, read)
    root = ""
    while True:
        names = tree.below.get(root, {})
        for reader in (_read_voc, _read_cityscapes, _read_splits, _read_beside, _read_two_folders):
            layout = reader(tree, root, names)
            if layout is not None:
                if layout.class_file is None:
                    layout.class_file = _class_file(tree, root)
                return layout
        if len(names) != 1 or next(iter(names)) in SPLIT_NAMES:
            return None
        root = tree.path(root, *names.values())


def _tree(files: Sequence[str], folders: Iterable[str], where: str, read: Callable[[int], bytes]) -> _Tree:
    below: dict[str, dict[str, str]] = defaultdict(dict)
    inside: dict[str, list[int]] = defaultdict(list)
    for folder in folders:
        if not any(is_hidden(part) for part in folder.split("/")):
            parent, name = posixpath.split(folder)
            below[parent][name.lower()] = name
    for index, path in enumerate(files):
        parts = path.split("/")[:-1]
        if not any(is_hidden(part) for part in parts):
            for depth in range(len(parts) + 1):
                inside["/".join(parts[:depth])].append(index)
    return _Tree(where, files, read, below, inside)


def _class_file(tree: _Tree, root: str) -> int | None:
    positions = {tree.files[index]: index for index in tree.inside.get(root, ())}
    for folder in dict.fromkeys((root, "")):
        for name in _CLASS_FILES:
            if (index := positions.get(tree.path(folder, name))) is not None:
                return index
    return None


def _pick(names: Mapping[str, str], wanted: Iterable[str]) -> str | None:
    """The one folder of those that may be meant."""
    found = [names[name] for name in sorted(names) if name in wanted]
    return found[0] if found else None


def _pick_maps(tree: _Tree, folder: str, names: Mapping[str, str]) -> str | None:
    """The folder of maps among those in ``folder``; of several one with pictures: others hold boxes or captions."""
    found = [tree.path(folder, names[name]) for name in sorted(names) if name in _MAPS]
    return next((each for each in found if tree.pictures(each)), found[0] if found else None)


def _holds_maps(tree: _Tree, folder: str) -> bool:
    """Whether a folder may be one of maps: it holds pictures, or nothing that labels for another task are kept in."""
    ends = {posixpath.splitext(tree.files[index])[1].lower() for index in tree.inside.get(folder, ())}
    return bool(tree.pictures(folder)) or not ends & set(_OTHER_LABELS)


def _read_splits(tree: _Tree, root: str, names: Mapping[str, str]) -> DenseLayout | None:
    """``<split>/images`` and ``<split>/labels``."""
    places: dict[str, tuple[str, str | None]] = {}
    for lower, name in names.items():
        inner = tree.below.get(tree.path(root, name), {})
        images = _pick(inner, _IMAGES)
        if lower in SPLIT_NAMES and images is not None:
            base = tree.path(root, name)
            _add(places, tree, lower, tree.path(base, images), _pick_maps(tree, base, inner))
    found = [maps for _, maps in places.values() if maps is not None]
    if not found or not all(_holds_maps(tree, maps) for maps in found):
        return None
    return _paired(tree, places)


def _read_two_folders(tree: _Tree, root: str, names: Mapping[str, str]) -> DenseLayout | None:
    """``images`` and ``labels``, with the same splits below them or without any."""
    images, maps = _pick(names, _IMAGES), _pick_maps(tree, root, names)
    if images is None or maps is None or not _holds_maps(tree, maps):
        return None
    images = tree.path(root, images)
    splits = {lower: name for lower, name in tree.below.get(images, {}).items() if lower in SPLIT_NAMES}
    if not splits:
        return _paired(tree, {"all": (images, maps)})
    places: dict[str, tuple[str, str | None]] = {}
    for lower, name in splits.items():
        other = tree.below.get(maps, {}).get(lower)
        _add(places, tree, lower, tree.path(images, name), tree.path(maps, other) if other else None)
    return _paired(tree, places)


def _read_beside(tree: _Tree, root: str, names: Mapping[str, str]) -> DenseLayout | None:
    """``<split>`` and ``<split>annot``."""
    places: dict[str, tuple[str, str | None]] = {}
    for lower in [name for name in names if name in SPLIT_NAMES]:
        maps = _pick(names, [lower + ending for ending in _BESIDE])
        _add(places, tree, lower, tree.path(root, names[lower]), tree.path(root, maps) if maps else None)
    return _paired(tree, places) if any(maps for _, maps in places.values()) else None


def _read_voc(tree: _Tree, root: str, names: Mapping[str, str]) -> DenseLayout | None:
    if not {"jpegimages", "segmentationclass"} <= set(names):
        return None
    pictures = tree.pictures(tree.path(root, names["jpegimages"]))
    maps = tree.pictures(tree.path(root, names["segmentationclass"]))
    lists = {
        posixpath.basename(tree.files[index])[:-4]: index
        for index in tree.inside.get(tree.path(root, "ImageSets/Segmentation"), ())
        if tree.files[index].endswith(".txt")
    }
    splits, messages = {}, []
    for name, index in sorted(lists.items()):
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            continue
        wanted = tree.read(index).decode("utf-8", "replace").split()
        if split == "test" and not any(each in maps for each in wanted):
            messages.append(f"{split} has no maps and is left out.")
            continue
        for each, files, folder in [(each, files, folder) for each in wanted for files, folder in (
            (pictures, names["jpegimages"]), (maps, names["segmentationclass"]),
        )]:  # fmt: skip
            if each not in files:
                raise DataError(
                    f"'{tree.files[index]}' of '{tree.where}' names '{each}', which '{folder}' does not have"
                )
        splits[split] = _pairs([(pictures[each], maps[each]) for each in wanted])
    if not splits:
        splits["all"] = _pairs([(pictures[each], maps[each]) for each in sorted(maps) if each in pictures])
    return DenseLayout(splits, tuple(_VOC), None, None, messages)


def _read_cityscapes(tree: _Tree, root: str, names: Mapping[str, str]) -> DenseLayout | None:
    maps = _pick(names, ("gtfine", "gtcoarse"))
    if "leftimg8bit" not in names or maps is None:
        return None
    images = tree.path(root, names["leftimg8bit"])
    ends = [f"_{maps}_{kind}" for kind in ("labelIds", "labelTrainIds")]
    coded = {end: [name for name in tree.pictures(tree.path(root, maps)) if name.endswith(end)] for end in ends}
    end = next((end for end in ends if coded[end]), ends[0])
    values = list(_CITYSCAPES) if end == ends[0] else list(range(len(_CITYSCAPES)))
    table = np.full(256, IGNORE if end == ends[0] else INVALID, dtype=np.uint8)
    table[values] = np.arange(len(values))
    places: dict[str, tuple[str, str | None]] = {}
    for lower, name in tree.below.get(images, {}).items():
        if lower in SPLIT_NAMES:
            _add(places, tree, lower, tree.path(images, name), tree.path(root, maps, name))
    layout = _paired(tree, places, image_end="_leftImg8bit", map_end=end)
    layout.classes, layout.table = tuple(_CITYSCAPES.values()), table
    return layout


def _add(places: dict[str, tuple[str, str | None]], tree: _Tree, lower: str, images: str, maps: str | None) -> None:
    split = SPLIT_NAMES[lower]
    if split in places:
        both = ", ".join(sorted((places[split][0], images)))
        raise RequestError(f"'{tree.where}' has two folders for one split: {both}", hint=EXPECTED)
    places[split] = (images, maps)


def _paired(
    tree: _Tree, places: Mapping[str, tuple[str, str | None]], *, image_end: str = "", map_end: str = ""
) -> DenseLayout:
    """Give each picture the map of its name."""
    splits, messages = {}, []
    for split, (images, maps) in places.items():
        pictures = {name.removesuffix(image_end): index for name, index in tree.pictures(images).items()}
        labels = {} if maps is None else tree.pictures(maps)
        if map_end:
            labels = {name.removesuffix(map_end): index for name, index in labels.items() if name.endswith(map_end)}
        lossy = [tree.files[index] for index in labels.values() if tree.files[index].lower().endswith(_LOSSY)]
        if lossy:
            raise DataError(
                f"'{tree.where}': {some(lossy)}: a format that changes values cannot hold a map of classes",
                hint="Make them PNG files again from what they were made of.",
            )
        if not labels and split == "test" and len(places) > 1:
            messages.append(f"test has no maps in '{tree.path(maps or images)}' and is left out.")
            continue
        if pictures and not labels:
            place = f"none in '{maps}'" if maps else f"no folder for maps beside '{images}'"
            raise DataError(
                f"'{tree.where}': the split '{split}' has {len(pictures)} images and no maps: {place}", hint=EXPECTED
            )
        splits[split] = _match(tree, split, pictures, labels, images, maps or "")
    return DenseLayout(splits, messages=messages)


def _match(
    tree: _Tree, split: str, pictures: Mapping[str, int], labels: Mapping[str, int], images: str, maps: str
) -> Pairs:
    left = dict(labels)
    pairs, alone = [], []
    plain = {_without_ending(name): name for name in labels}
    for name, index in pictures.items():
        found = name if name in left else plain.get(name, "")
        if found in left:
            pairs.append((index, left.pop(found)))
        else:
            alone.append(tree.files[index])
    problems = []
    if alone:
        problems.append(f"{len(alone)} images of {split} have no map in '{maps}': {some(alone)}")
    if left:
        problems.append(
            f"{len(left)} maps of {split} have no image in '{images}': {some([tree.files[i] for i in left.values()])}"
        )
    if problems:
        raise DataError(
            f"'{tree.where}': {'; '.join(problems)}", hint="A map bears the name of its image, as a PNG file."
        )
    return _pairs(pairs)


def _without_ending(name: str) -> str:
    lower = name.lower()
    ending = next((ending for ending in _ENDINGS if lower.endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _pairs(pairs: Sequence[tuple[int, int]]) -> Pairs:
    table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return Pairs(table[:, 0].copy(), table[:, 1].copy())
