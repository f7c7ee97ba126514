"""Which output of a model stands for which class of the data."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from timm.data import ImageNetInfo

_WNID = re.compile(r"n\d{8}")
#: The id in the name of a folder: n01440764, n01440764_tench, or 0000_n01440764.
_IN_FOLDER = re.compile(r"(?:\d+_)?(n\d{8})(?!\d)")
# Class counts that are published for one list of ImageNet classes only.
_SUBSETS = {1000: "imagenet-1k", 11221: "imagenet-21k-miil", 11821: "imagenet-12k", 21841: "imagenet-22k"}


@dataclass(frozen=True)
class AlignResult:
    """How a model's outputs serve the data's classes.

    Attributes:
        columns: For each class of the data the index of the model's output; None where the model cannot serve them.
        note: The finding, to be said aloud.
        identity: The outputs are the data's classes in their order.
    """

    columns: tuple[int, ...] | None
    note: str
    identity: bool = False


@functools.lru_cache(maxsize=4)
def imagenet_classes(num_classes: int) -> tuple[str, ...] | None:
    """Return the WordNet ids of the ImageNet list with ``num_classes`` classes, in output order; None without one."""
    subset = _SUBSETS.get(num_classes)
    return None if subset is None else tuple(ImageNetInfo(subset).label_names())


def describe(classes: Sequence[str]) -> tuple[str, ...]:
    """Return class names for people: WordNet ids become words, other names stay as they are."""
    if not any(_WNID.fullmatch(name) for name in classes):
        return tuple(classes)
    words = _descriptions()
    return tuple(words.get(name, name).split(",")[0] for name in classes)


@functools.lru_cache(maxsize=1)
def _descriptions() -> dict[str, str]:
    return dict(ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True))


def names_or_numbers(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return class names, and numbers where there are none."""
    return tuple(classes) if classes else tuple(map(str, range(count)))


def counted(number: int, noun: str) -> str:
    """Return ``1 class`` or ``2 classes``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"


def align_classes(
    model_classes: Sequence[str] | None, data_classes: Sequence[str] | None, num_outputs: int
) -> AlignResult:
    """Find the model's output for each class of the data, by name.

    Args:
        model_classes: Names of the model's outputs, if known.
        data_classes: Names of the data's classes in index order, if known.
        num_outputs: Number of outputs of the model.
    """
    if data_classes is None:
        return AlignResult(None, "the data has no class names")
    count = len(data_classes)
    if model_classes is None:
        wnids = [_wnid(name) for name in data_classes]
        if all(wnids) and num_outputs in _SUBSETS and count != num_outputs:
            model_classes = imagenet_classes(num_outputs)
        elif count == num_outputs:
            outputs = "output has no name" if num_outputs == 1 else f"{num_outputs} outputs have no names"
            note = f"the model's {outputs}; the order of the data's classes is taken"
            return AlignResult(tuple(range(count)), note, identity=True)
        else:
            outputs, wanted = counted(num_outputs, "output"), counted(count, "class")
            return AlignResult(None, f"the model has {outputs} without names, and the data has {wanted}")
    if list(model_classes) == list(data_classes):
        return AlignResult(tuple(range(count)), f"the model's {count} classes are the data's", identity=True)
    columns = _columns(list(model_classes), list(data_classes))
    if columns is None:
        known = set(map(_key, model_classes))
        absent = [name for name in data_classes if _key(name) not in known]
        if not absent:
            return AlignResult(None, "several classes of the model or of the data share one name")
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        return AlignResult(None, f"the model does not know {len(absent)} of the data's {count} classes ({some})")
    if columns == tuple(range(num_outputs)):
        return AlignResult(columns, f"the model's {count} classes are the data's", identity=True)
    if count == num_outputs:
        return AlignResult(
            columns, f"the model has the data's {count} classes in another order; its outputs are reordered"
        )
    return AlignResult(
        columns, f"the data's {count} classes are {count} of the model's {num_outputs}; the others are left out"
    )


def _columns(model_classes: list[str], data_classes: list[str]) -> tuple[int, ...] | None:
    index = {_key(name): position for position, name in enumerate(model_classes)}
    columns = tuple(index.get(_key(name), -1) for name in data_classes)
    ambiguous = len(index) < len(model_classes) or len(set(columns)) < len(columns)
    return None if ambiguous or -1 in columns else columns


def _wnid(name: str) -> str | None:
    found = _IN_FOLDER.match(name.strip())
    return found.group(1) if found else None


def _key(name: str) -> str:
    """Compare names without case, blanks and underscores; an ImageNet folder by its WordNet id alone."""
    return _wnid(name) or re.sub(r"[\s_\-]+", " ", name.strip().lower())
