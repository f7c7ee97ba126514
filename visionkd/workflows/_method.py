"""Which method a run takes, with which options, and whether it suits the networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from visionkd import registry
from visionkd.config.load import build_options, options_problems
from visionkd.config.schema import DistillConfig
from visionkd.errors import Problem, RequestError
from visionkd.methods._base import DistillationModule
from visionkd.models.network import Network
from visionkd.types import Listener, TaskName
from visionkd.workflows._request import AUTO_METHODS, METHODS


def choose_method(
    config: DistillConfig,
    *,
    student: Network,
    teachers: Sequence[Network],
    listener: Listener,
    unlabeled: bool = False,
) -> tuple[type[DistillationModule], Any]:
    """Return the method's class and options, and write what was decided into the configuration.

    Args:
        config: Settings of the run.
        student: Network to train.
        teachers: Networks to learn from.
        listener: Is told what was decided.
        unlabeled: Whether there are images without labels to train on.

    Raises:
        RequestError: If there is no such method, its options are wrong, or it does not suit the networks.
    """
    if config.losses:
        method, options = _combination(config, student)
    else:
        if config.method == "auto":
            config.method, why = suggested_method(student=student, teachers=teachers, unlabeled=unlabeled)
            if why:
                listener.message(f"{why}, so the method is {config.method} (--method chooses another)")
        method = registry.load(METHODS, config.method, key="--method").METHOD
        if problems := options_problems(method.Options, config.options):
            raise RequestError(problems)
        defaults = method.task_defaults.get(student.task, {})
        options = build_options(method.Options, {**defaults, **config.options})
        config.options = asdict(options)
    if config.augment.learned is not None:
        from visionkd.methods._learned_augmentation import with_learned_augmentation

        method = with_learned_augmentation(method)
    given = {"student": student, "teachers": teachers, "config": config, "options": options}
    if problems := method.check(**given):
        raise RequestError(problems)
    for text in method.warnings(**given):
        listener.message(text, level="warning")
    for text in method.settle(**given):
        listener.message(text)
    return method, options


def trains_own_teacher(config: DistillConfig, student: Network) -> bool:
    """Whether the method of a run trains its teacher itself; the teachers need not exist to answer that."""
    name = config.method
    if name == "auto" and not config.losses and student.task == "segmentation":
        name = AUTO_METHODS["segmentation"]
    known = name in registry.names(METHODS)
    return known and registry.load(METHODS, name, key="--method").METHOD.trains_teacher


def takes_encoder(config: DistillConfig, student: Network) -> bool:
    """Whether the teacher of a run is an image-text encoder, which is no network that names classes."""
    name = config.method
    if name == "auto" and not config.losses and student.task == "detection":
        from visionkd.teachers.encoders import is_encoder

        if not is_encoder(config.teachers[0].name):
            return False
        name = AUTO_METHODS["image-text encoder"]
    known = name in registry.names(METHODS)
    return known and registry.load(METHODS, name, key="--method").METHOD.takes_encoder


def methods_for(task: TaskName) -> list[str]:
    """Return the names of the methods that support a task."""
    names = registry.names(METHODS)
    return [name for name in names if task in registry.load(METHODS, name, key="--method").METHOD.tasks]


def suggested_method(*, student: Network, teachers: Sequence[Network], unlabeled: bool = False) -> tuple[str, str]:
    """Return what ``--method auto`` takes, and why where it is not the usual one."""
    if not teachers:
        return AUTO_METHODS["image-text encoder"], "The teacher is an image-text encoder"
    if student.task == "detection":
        return AUTO_METHODS["detection"], "Student and teacher find boxes"
    if student.task == "segmentation":
        return AUTO_METHODS["segmentation"], "The data's labels are maps, which a teacher can be shown"
    if len(teachers) > 1:
        return AUTO_METHODS["several teachers"], f"There are {len(teachers)} teachers"
    if unlabeled:
        return AUTO_METHODS["unlabeled images"], "There are images without labels"
    families = (teachers[0].family, student.family)
    if families[0] != families[1] and "hybrid" not in families:
        from visionkd.models.features import stages

        try:
            stages(student)
        except RequestError:
            return AUTO_METHODS["usual"], ""
        why = f"A teacher of the family '{families[0]}' teaches a student of the family '{families[1]}'"
        return AUTO_METHODS["other family"], why
    return AUTO_METHODS["usual"], ""


def _combination(config: DistillConfig, student: Network) -> tuple[type[DistillationModule], Any]:
    from visionkd.methods._combined import Combined, CombinedOptions, Part

    parts, problems, losses = [], [], {}
    known = registry.names(METHODS)
    for name, loss in config.losses.items():
        losses[name] = loss
        if name == "task_loss":
            if loss.options:
                problems.append(Problem(f"losses.{name}.options", "the labels' own loss has no options"))
            continue
        if name not in known:
            problems.append(Problem(f"losses.{name}", "unknown method", f"Known: task_loss, {', '.join(known)}"))
            continue
        method = registry.load(METHODS, name, key="losses").METHOD
        if method.takes_encoder:
            said = "learns from an image-text encoder, and goes with no other method"
            problems.append(Problem(f"losses.{name}", said, f"Give --method {name} alone."))
            continue
        wrong = options_problems(method.Options, loss.options)
        problems += [Problem(f"losses.{name}.{each.key}", each.message, each.hint) for each in wrong]
        if not wrong:
            defaults = method.task_defaults.get(student.task, {})
            parts.append(Part(name, method, build_options(method.Options, {**defaults, **loss.options}), loss.weight))
            losses[name] = loss.model_copy(update={"options": asdict(parts[-1].options)})
    if config.method != "auto":
        problems.append(Problem("method", f"'{config.method}' contradicts 'losses'", "Give one of the two."))
    if not problems and not any(part.weight for part in parts):
        problems.append(Problem("losses", "names no method with a weight above 0, so no teacher would be listened to"))
    if config.options:
        problems.append(Problem("options", "belong below each method's name in 'losses'"))
    if problems:
        raise RequestError(problems)
    config.losses = losses
    task_weight = config.losses["task_loss"].weight if "task_loss" in config.losses else 0.0
    return Combined.of(parts), CombinedOptions(tuple(parts), task_weight)


def method_name(config: DistillConfig) -> str:
    """Return what a run's method is called: its name, or the names of those that are combined."""
    return "+".join(name for name in config.losses if name != "task_loss") if config.losses else config.method
