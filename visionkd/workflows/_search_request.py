"""From the parameters of a search to its checked settings, and from a candidate to the command that distils it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from timm.models import get_pretrained_cfg

from visionkd.config.schema import DistillConfig, NetworkConfig
from visionkd.config.search import SearchConfig
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.models import torchvision_zoo
from visionkd.models.names import resolve_name
from visionkd.search.budget import parse_budget
from visionkd.search.scores import INITS, score_names
from visionkd.search.spaces import Space, open_space, space_names
from visionkd.workflows._request import build_config
from visionkd.workflows._rundir import read_run_config
from visionkd.workflows._search_latency import BACKENDS

_KEYS = {"compute.workers": "--workers", "teacher": "--teacher", "space": "--space", "data": "--data"}
_SPACES = f"Known spaces: {', '.join(space_names())}, or a file of your own, .yaml or .py."


def search_config(given: Mapping[str, Any], *, out: str | None, resume: bool) -> tuple[SearchConfig, Space]:
    """Return the settings of a search, checked, and its space.

    Args:
        given: Values by field of :class:`SearchConfig`; None is what was not given.
        out: Run directory.
        resume: Take what was not given from the run that is resumed.

    Raises:
        RequestError: With everything that is wrong.
    """
    given = {name: value for name, value in given.items() if value is not None}
    workers = given.pop("workers", None)
    values: dict[str, Any] = {}
    if resume:
        if out is None:
            raise RequestError(Problem("--resume", "needs the run directory to go on in", "Give --resume --out DIR."))
        values = yaml.safe_load(read_run_config(Path(out))) or {}
        if not isinstance(values, dict) or "space" not in values:
            raise RequestError(Problem("--out", f"{out} holds no search", "Name the directory of one."))
    problems, space = _problems(given, resume=resume)
    if "budget" in given:
        try:
            given["budget"] = parse_budget(given["budget"])
        except RequestError as error:
            problems += error.problems
            del given["budget"]
    values |= given
    if workers is not None:
        values["compute"] = {"workers": workers}
    if "latency_ms" in values.get("budget", {}) and values.get("backend") is None:
        values["backend"] = "torch"
    try:
        config = SearchConfig.model_validate(values)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        problems += [problem for problem in _explained(error) if problem.key not in known]
    if problems:
        raise RequestError(problems)
    return config, space or open_space(config.space, img_size=config.img_size)


def _problems(given: Mapping[str, Any], *, resume: bool) -> tuple[list[Problem], Space | None]:
    problems: list[Problem] = []
    space = None
    if not resume:
        if "teacher" not in given:
            problems.append(Problem("--teacher", "is required", "Name the network that the student is to learn from."))
        if "space" not in given:
            problems.append(Problem("--space", "is required", _SPACES))
    if "space" in given and not resume:
        try:
            space = open_space(given["space"], img_size=given.get("img_size"))
        except RequestError as error:
            problems += error.problems or [Problem("--space", error.message)]
    for option, name, known in (("--score", "score", score_names()), ("--init", "init", INITS)):
        value = given.get(name)
        if value is not None and value not in known:
            hint = did_you_mean(str(value), known) or f"Known: {', '.join(known)}"
            problems.append(Problem(option, f"unknown name '{value}'", hint))
    backend = given.get("backend")
    if backend is not None and backend not in BACKENDS:
        hint = did_you_mean(str(backend), BACKENDS) or f"Known: {', '.join(BACKENDS)}"
        problems.append(Problem("--backend", f"unknown name '{backend}'", hint))
    return problems, space


def _explained(error: ValidationError) -> list[Problem]:
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not str(part).startswith("literal["))
        option = _KEYS.get(key, f"--{key.replace('_', '-')}")
        found.append(Problem(option, f"{item['msg']} (given: {item.get('input')!r})"))
    return found


def distill_settings(config: SearchConfig) -> DistillConfig:
    """Return the settings of the distillation that follows, with the teacher in the student's place.

    Raises:
        RequestError: With everything that is wrong with teacher, data or options.
    """
    overrides = {"teachers": [{"name": config.teacher}], "student.name": config.teacher, "data.path": config.data}
    return build_config(DistillConfig, config=None, options=config.options, overrides=overrides, out=None, resume=False)


def no_weights(config: SearchConfig) -> Problem | None:
    """Return what keeps the teacher from teaching after the search: it is a bare architecture; None where nothing does.

    Raises:
        RequestError: If its name is unknown.
    """
    resolved = resolve_name(config.teacher)
    if resolved.source in ("package", "file") or ":" in str(resolved.architecture):
        return None
    if resolved.library == "timm":
        published = bool(get_pretrained_cfg(resolved.architecture).has_weights)
    else:
        published = torchvision_zoo.weights(resolved.architecture, resolved.tag) is not None
    if published:
        return None
    data = "" if config.data == "shapes" else f" --data {shlex.quote(config.data)}"
    return Problem(
        "--teacher",
        f"'{config.teacher}' has no published weights",
        f"Train it first (visionkd train --model {config.teacher}{data}) and name its run directory.",
    )


def student_options(student: NetworkConfig) -> list[str]:
    """Return the ``KEY=VALUE`` settings that, beside its name, make a distillation train ``student``."""
    options = [f"student.args.{name}={_yaml(value)}" for name, value in student.args.items()]
    if student.img_size is not None:
        options.append(f"student.img_size={student.img_size}")
    if not student.pretrained:
        options.append("student.pretrained=false")
    return options


def distill_command(config: SearchConfig, student: NetworkConfig) -> str:
    """Return the command that distils the teacher into ``student``, to be pasted into a shell."""
    words = ["visionkd", "distill", "--teacher", config.teacher, "--student", student.name]
    if config.data != "shapes":
        words += ["--data", config.data]
    if config.seed:
        words += ["--seed", str(config.seed)]
    for option in (*config.options, *student_options(student)):
        words += ["-o", option]
    return shlex.join(words)


def described(student: NetworkConfig) -> str:
    """Return a student in one line."""
    return " ".join(
        [student.name, *(f"{name}={_yaml(value)}".replace(" ", "") for name, value in student.args.items())]
    )


def _yaml(value: Any) -> str:
    """Return a value as the command line reads it back."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]


def options_of(options: Sequence[str] | None) -> list[str] | None:
    """Return what was given, None where nothing was."""
    return list(options) or None if options is not None else None
