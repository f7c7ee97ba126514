"""From a command's parameters to a checked configuration."""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from visionkd import registry
from visionkd.config.load import load_config
from visionkd.config.schema import NetworkConfig, RunConfig
from visionkd.data.open import known_names as known_data
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.workflows._rundir import read_run_config
from visionkd.workflows.configs import show_config

C = TypeVar("C", bound=RunConfig)
METHODS = "visionkd.methods"
#: What ``--method auto`` takes, by the reason for it.
AUTO_METHODS = {
    "usual": "kd",
    "several teachers": "meal_v2",
    "unlabeled images": "ssld",
    "other family": "ofa_kd",
    "segmentation": "lad",
    "detection": "fgd",
    "image-text encoder": "oadp",
}
#: Methods whose teacher may be an image-text encoder.
_ENCODED = ("auto", AUTO_METHODS["image-text encoder"])
#: The command line's option behind each key of the configuration that has one.
_OPTIONS = {
    "teachers": "--teacher",
    "student.name": "--student",
    "model.name": "--model",
    "model.pretrained": "--pretrained",
    "objective": "--objective",
    "init": "--init",
    "data.path": "--data",
    "method": "--method",
    "task": "--task",
    "fit_teacher.mode": "--fit-teacher",
    "label_store.mode": "--cache-teacher",
    "data.unlabeled": "--unlabeled",
    "augment.learned": "--augment",
    "report.baseline": "--baseline",
    "training.epochs": "--epochs",
    "training.batch_size": "--batch-size",
    "optimizer.lr": "--lr",
    "training.seed": "--seed",
    "training.precision": "--precision",
    "export.formats": "--export",
    "compute.accelerator": "--accelerator",
    "compute.devices": "--devices",
    "compute.nodes": "--nodes",
    "compute.strategy": "--strategy",
}


def build_config(
    kind: type[C],
    *,
    config: str | None,
    options: Sequence[str],
    overrides: Mapping[str, Any],
    out: str | None,
    resume: bool,
    spelled: Mapping[str, str] | None = None,
) -> C:
    """Read the recipe, or the configuration of the run that is resumed, and apply what was given on the command line.

    ``spelled`` names the options of a command that calls them otherwise.

    Raises:
        RequestError: With everything that is wrong.
    """
    _check_places(config=config, out=out, resume=resume)
    text, where, again = None, "config", None
    if resume and config is None and out is not None:
        text, where, again = read_run_config(Path(out)), f"{out}/config.yaml", f"--resume --out {shlex.quote(out)}"
    elif config is not None:
        again = f"--config {shlex.quote(config)}"
        try:
            text, where = show_config(config), config
        except RequestError as error:  # the names that were given beside it are wrong or right without the recipe
            problems = list(error.problems) or [Problem("--config", error.message)]
            problems += [
                replace(wrong, key=_OPTIONS.get(wrong.key, "--teacher")) for wrong in _wrong_names(_nested(overrides))
            ]
            raise RequestError(problems, hint=error.hint) from None
    return load_config(
        kind,
        text=text,
        where=where,
        overrides=overrides,
        options=options,
        method_options=method_options,
        spelled={**_OPTIONS, **(spelled or {})},
        again=again,
        check=_wrong_names,
        complete=_add_teacher,
    )


def _add_teacher(values: dict[str, Any]) -> None:
    """Give a method that trains its own teacher one of the student's architecture, where none is named."""
    method, student = values.get("method", "auto"), values.get("student")
    if method == "auto" and values.get("task") == "segmentation":
        method = AUTO_METHODS["segmentation"]
    if values.get("teachers") or not isinstance(method, str) or not isinstance(student, dict):
        return
    if method in registry.names(METHODS) and registry.load(METHODS, method, key="--method").METHOD.trains_teacher:
        values["teachers"] = [copy.deepcopy(student)]


def _check_places(*, config: str | None, out: str | None, resume: bool) -> None:
    problems = [
        Problem(option, "is empty", hint)
        for option, value, hint in (
            ("--config", config, "Give the name of a recipe or a file ('visionkd configs list')."),
            ("--out", out, "Give a directory, such as --out runs/student."),
        )
        if value is not None and not value.strip()
    ]
    if resume and out is None:
        problems.append(Problem("--resume", "needs the run directory to continue in", "Give --resume --out DIR."))
    if problems:
        raise RequestError(problems)


def _wrong_names(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Find out whether everything that is named exists, before anything is fetched or built.

    Args:
        values: A configuration's values; what is not of its type is reported elsewhere.
    """
    from visionkd.models.names import OPEN_CLIP, resolve_name  # needs timm, which not every command does

    for key, name in _names(values):
        if key.startswith("teachers.") and name.startswith(OPEN_CLIP) and values.get("method", "auto") in _ENCODED:
            continue  # the method opens it
        try:
            resolve_name(name)
        except RequestError as error:
            yield Problem(key, error.message, error.hint)
        else:
            if key.endswith(".name"):
                yield from _wrong_args(values, key, name)
    method = values.get("method")
    if isinstance(method, str) and method not in ("auto", *(known := registry.names(METHODS))):
        hint = did_you_mean(method, ("auto", *known)) or f"Known: auto, {', '.join(known)}"
        yield Problem("method", f"unknown name '{method}'", hint)
    if isinstance(values.get("options"), dict) and method in (None, "auto") and "model" not in values:
        yield from _options_of_none(values["options"])
    path = _part(values, "data", "path")
    if isinstance(path, str) and not _is_data(path):
        message = (
            f"'{path}' is neither a directory, nor an archive, nor a known data set" if path.strip() else "is empty"
        )
        near = did_you_mean(path, known_data()) if os.sep not in path else ""
        yield Problem("data.path", message, near or "'visionkd data list' shows the known names.")


def _options_of_none(options: Mapping[str, Any]) -> Iterator[Problem]:
    """Find options that none of the methods has which ``auto`` may take; which one it takes, the networks decide."""
    options_of = map(method_options, AUTO_METHODS.values())
    known = {name for each in options_of for name in getattr(each, "__dataclass_fields__", ())}
    for name in sorted(set(map(str, options)) - known):
        hint = did_you_mean(name, sorted(known)) or "Give --method as well."
        yield Problem(f"options.{name}", "unknown option of this method", hint)


def _wrong_args(values: Mapping[str, Any], key: str, name: str) -> Iterator[Problem]:
    """Find out whether the network behind a name's key takes the arguments beside it."""
    section, number = key.removesuffix(".name"), key.split(".")[1]
    network = values[section.split(".")[0]]
    network = network[int(number)] if isinstance(network, list) else network
    kinds = {"args": dict, "backbone": str, "img_size": (list, tuple)}
    given = {each: network.get(each) for each, kind in kinds.items() if isinstance(network.get(each), kind)}
    given = {each: value for each, value in given.items() if value}
    if not given:
        return
    from visionkd.models.factory import args_problems  # needs torch

    task = values["task"] if values.get("task") in ("segmentation", "detection") else None
    try:
        config = NetworkConfig(name=name, **given)
    except ValidationError:  # reported with all other values of the wrong type
        return
    for problem in args_problems(config, task=task):
        yield replace(problem, key=f"{section}.{problem.key}")


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            (values.setdefault(section, {}) if section else values)[name] = value
    return values


def _names(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of each network and its key."""
    teachers = values.get("teachers")
    found = {f"{role}.name": _part(values, role, "name") for role in ("student", "model")}
    for number, teacher in enumerate(teachers if isinstance(teachers, list) else ()):
        for key in ("name", "backbone"):
            found[f"teachers.{number}.{key}"] = _part({"teacher": teacher}, "teacher", key)
    for role in ("student", "model"):
        found[f"{role}.backbone"] = _part(values, role, "backbone")
    found["report.baseline"] = _part(values, "report", "baseline")
    found["init"] = values.get("init")
    for key, name in found.items():
        if isinstance(name, str):
            yield key, name


def _part(values: Mapping[str, Any], section: str, key: str) -> Any:
    inner = values.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


def _is_data(path: str) -> bool:
    return path in known_data() or (bool(path.strip()) and os.path.exists(os.path.expanduser(path)))


def method_options(name: str) -> type | None:
    """Return the frozen options dataclass of a method, None for ``auto`` and names that do not exist."""
    if name not in registry.names(METHODS):
        return None
    return registry.load(METHODS, name, key="--method").METHOD.Options


def shared_overrides(
    *,
    data: str | None,
    task: str | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int | None,
    export: str | None,
    accelerator: str | None,
    devices: int | str | None,
    nodes: int | None,
    strategy: str | None,
    precision: str | None,
) -> dict[str, Any]:
    """Return the configuration keys behind the options that ``distill`` and ``train`` share."""
    return {
        "data.path": data,
        "task": task,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "optimizer.lr": lr,
        "training.seed": seed,
        "training.precision": precision,
        "export.formats": None if export is None else export.split(","),
        "compute.accelerator": accelerator,
        "compute.devices": int(devices) if isinstance(devices, str) and devices.isdecimal() else devices,
        "compute.nodes": nodes,
        "compute.strategy": strategy,
    }


def check_mode(*, resume: bool, overwrite: bool) -> None:
    """Refuse options that contradict each other."""
    if resume and overwrite:
        raise RequestError(Problem("--resume", "contradicts --overwrite", "Give one of the two."))


def command_line() -> str:
    """Return how this process was called, for ``environment.json`` and the header of ``config.yaml``."""
    name = Path(sys.argv[0]).name
    words = ["visionkd" if name in ("visionkd", "__main__.py") else name, *sys.argv[1:]]
    return " ".join(f"'{word}'" if not word or set(word) & set(" '\"$&|;<>*?()") else word for word in words)
