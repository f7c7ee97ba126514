"""Images without labels: what is taken of them, and what a run validates on that has no labels at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from visionkd.config.schema import DistillConfig, RunConfig
from visionkd.data.layout import Opened
from visionkd.data.unlabeled import RelabeledSource, has_labels, open_unlabeled, with_unlabeled
from visionkd.errors import DataError, Problem, RequestError
from visionkd.models.classes import align_classes
from visionkd.models.network import Network
from visionkd.types import DataSet, Listener
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._unlabeled_work import STAGE, UnlabeledWork

__all__ = ["STAGE", "check_unlabeled", "needs_preparation", "open_pool", "prepare_unlabeled"]

_AGREEMENT = (
    "The data has no labels: the validation images count as what the teacher says of them,"
    " so top-1 is agreement with the teacher, not accuracy"
)


def open_pool(config: RunConfig) -> Opened | None:
    """List the unlabelled images that a run asks for, before anything else is started.

    Raises:
        RequestError: If there is no such directory, or a setting of it is given without it.
        DataError: If it holds no image.
    """
    if config.data.unlabeled is not None:
        return open_unlabeled(config.data.unlabeled)
    if config.data.unlabeled_per_class is not None:
        problem = "chooses among unlabelled images, and none are given"
        raise RequestError(Problem("data.unlabeled_per_class", problem, "Give --unlabeled DIR."))
    return None


def check_unlabeled(
    config: RunConfig, data: DataSet, name: str, *, uses_labels: bool, teachers: Sequence[Network] = ()
) -> None:
    """Refuse images without labels where a label is needed.

    Raises:
        RequestError: If there is a pool of them, or a teacher would have to be fitted on them.
        DataError: If the data has none but them.
    """
    if data.task != "classification":  # whose data always has labels
        if config.data.unlabeled is not None:
            key = "--unlabeled" if isinstance(config, DistillConfig) else "data.unlabeled"
            problem = f"images without labels serve classification, and the data's task is {data.task}"
            raise RequestError(Problem(key, problem, "Leave them out."))
        return
    if not uses_labels:
        if not has_labels(data.splits["train"]):
            _check_teachers(config, data, teachers)
        return
    distills = isinstance(config, DistillConfig)
    way = "--method ssld" if distills else "'visionkd distill --method ssld'"
    advice = f"Use {way}, which learns from the teacher alone"
    if config.data.unlabeled is not None:
        message = f"{name} learns from labels, and the images in '{config.data.unlabeled}' have none"
        key = "--unlabeled" if distills else "data.unlabeled"
        raise RequestError(Problem(key, message, f"{advice}, or leave them out."))
    if not has_labels(data.splits["train"]):
        count = len(data.splits.get("all", data.splits["train"]))
        raise DataError(
            f"'{config.data.path}' holds {count} images but no class folders, and {name} learns from labels",
            hint=f"{advice}, or sort the images into class folders.",
        )


def _check_teachers(config: RunConfig, data: DataSet, teachers: Sequence[Network]) -> None:
    assert isinstance(config, DistillConfig) or not teachers
    if not teachers:  # nobody is asked what an image shows
        return
    mode, problems = config.fit_teacher.mode, []
    if mode in ("probe", "finetune"):
        problems.append(
            Problem("--fit-teacher", f"{mode} needs labels, and '{config.data.path}' has none", "Leave it out.")
        )
    for spec, teacher in zip(config.teachers, teachers, strict=True):
        if align_classes(teacher.classes, data.classes, teacher.num_classes).columns is None:
            message = f"the classes of {spec.name} are not those of {config.teachers[0].name}"
            problems.append(Problem("--teacher", message, "Without labels no probe can be fitted."))
    if problems:
        raise RequestError(problems)


def needs_preparation(data: DataSet, pool: Opened | None) -> bool:
    """Whether a run has images without labels."""
    return pool is not None or (data.task == "classification" and not has_labels(data.splits["val"]))


def prepare_unlabeled(
    data: DataSet,
    pool: Opened | None,
    teachers: Sequence[Network],
    *,
    config: DistillConfig,
    run: RunDirectory,
    listener: Listener,
) -> DataSet:
    """Take what is to be taken of the unlabelled images; what was found before is read back from the run.

    Args:
        data: The data set as it was opened.
        pool: The unlabelled images beside it.
        teachers: With the data's classes in the data's order.
        config: Settings of the run.
        run: Keeps what was found in ``unlabeled/``.
        listener: Is told what happens.

    Returns:
        The data set with the pool behind its training images, and with the teachers' answers as targets of validation
        images that have no labels.

    Raises:
        DataError: If nothing is left of the pool.
        RequestError: If the pool is another one than when the run was started.
    """
    work = UnlabeledWork(run.path / STAGE, teachers, config, listener)
    val = data.splits["val"]
    if not has_labels(val) and teachers:
        # an image that cannot be read is left out of every evaluation, whatever its target is
        answered = RelabeledSource(val, np.maximum(work.answers(val), 0))
        data = replace(data, splits={**data.splits, "val": answered}, note=_AGREEMENT)
        listener.message(_AGREEMENT, level="warning")
    if pool is None:
        return data
    kept = work.selected(data, pool)
    joined = with_unlabeled(data, pool, kept)
    listener.message(
        f"Training on {len(data.splits['train']):,} {'labelled' if has_labels(data.splits['train']) else 'own'}"
        f" + {len(kept):,} unlabelled images"
    )
    return joined
