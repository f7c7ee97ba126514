"""List known data sets, look at data before training on it, and look after stored teacher labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from visionkd.config.load import load_config
from visionkd.config.schema import RunConfig
from visionkd.data.check import CheckReport
from visionkd.data.check import check_data as check
from visionkd.data.known import KNOWN_SETS
from visionkd.data.open import open_data
from visionkd.data.shapes import CLASSES as SHAPE_CLASSES
from visionkd.errors import Problem, RequestError, WorkError
from visionkd.teachers import store_admin
from visionkd.teachers.store_admin import StoreInfo, StoreReport
from visionkd.types import Listener, MetricRow, Progress


def check_data(*, data: str, options: Sequence[str] = (), listener: Listener | None = None) -> CheckReport:
    """Look for images and classes that would harm a training.

    Args:
        data: DATA.
        options: ``KEY=VALUE`` overrides of the ``data`` section.
        listener: Is told what happens.

    Raises:
        RequestError: If the data does not exist.
        DataError: If there is nothing to look at.
    """
    listener = listener or Listener()
    config = load_config(RunConfig, overrides={"data.path": data}, options=options)
    every = config.data.model_copy(update={"novel": ()})  # nothing is hidden from this look
    dataset = open_data(
        config.data.path, config=every, seed=config.data.split_seed, task=config.task, classes=lambda: ()
    )
    if not dataset.classes:
        listener.message("No image has a label: there are no class folders")
    for text in dataset.messages:
        listener.message(text)
    return check(dataset, progress=lambda done, total: listener.progress(Progress("check", done, total)))


def list_data() -> tuple[MetricRow, ...]:
    """Return the data sets that are known by name."""
    shapes = MetricRow(
        "shapes",
        {
            "shows": "coloured shapes, drawn on the fly",
            "classes": len(SHAPE_CLASSES),
            "images": "as many as asked",
            "download_mb": 0,
        },
    )
    known = [
        MetricRow(
            each.name,
            {
                "shows": each.title,
                "classes": each.num_classes,
                "images": each.num_images,
                "download_mb": each.download_mb,
            },
        )
        for each in KNOWN_SETS
    ]
    return (shapes, *known)


def list_cache() -> tuple[StoreInfo, ...]:
    """Return the stores of teacher labels in the cache directory, the last used first."""
    return store_admin.list_stores()


def verify_cache(*, stores: Sequence[str] = (), listener: Listener | None = None) -> tuple[StoreReport, ...]:
    """Compare every shard of stores of teacher labels with its checksum.

    Args:
        stores: Ids, beginnings of ids or directories; all of the cache directory where none is named.
        listener: Is told how far it is.

    Raises:
        RequestError: If one does not exist.
    """
    listener = listener or Listener()

    def report(done: int, total: int) -> None:
        listener.progress(Progress("verify", done, total))

    paths = _find(stores) if stores else [store.path for store in store_admin.list_stores()]
    return tuple(store_admin.verify_store(path, progress=report) for path in paths)


def remove_cache(
    *,
    stores: Sequence[str] = (),
    every: bool = False,
    unused_days: float | None = None,
    confirm: Callable[[Sequence[StoreInfo]], bool] | None = None,
) -> tuple[StoreInfo, ...]:
    """Remove stores of teacher labels.

    Args:
        stores: Ids, beginnings of ids or directories.
        every: Choose every store in the cache directory.
        unused_days: Choose those that no run has used for so many days: of ``stores``, or of the cache directory.
        confirm: Is asked before anything is removed; None removes without asking.

    Returns:
        What was removed.

    Raises:
        RequestError: If none is chosen, or one does not exist; nothing is removed then.
        WorkError: If one is in use; all others are removed.
    """
    if every and stores:
        raise RequestError(
            Problem("--all", f"chooses every store, and {', '.join(stores)} besides", "Give one of them.")
        )
    if not (every or stores or unused_days is not None):
        raise RequestError(
            Problem("STORE", "is required: a store, --unused-days or --all", "See 'visionkd data cache list'.")
        )
    chosen = tuple(map(store_admin.store_info, _find(stores))) if stores else store_admin.list_stores()
    if unused_days is not None:
        chosen = store_admin.unused(chosen, days=unused_days)
    if not chosen or (confirm is not None and not confirm(chosen)):
        return ()
    removed, kept = [], []
    for store in chosen:
        try:
            removed.append(store_admin.remove_store(store.path))
        except WorkError as error:
            kept.append(error)
    if kept:
        raise WorkError("\n".join(error.message for error in kept), hint=kept[0].hint)
    return tuple(removed)


def _find(stores: Sequence[str]) -> list[Path]:
    """Return directories, each once; all problems at once."""
    paths, problems = [], []
    for name in stores:
        try:
            paths.append(store_admin.find_store(name))
        except RequestError as error:
            problems.extend(error.problems)
    if problems:
        raise RequestError(problems)
    return list(dict.fromkeys(paths))
