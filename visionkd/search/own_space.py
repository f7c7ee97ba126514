"""A user's own space: a short YAML file with lists of arguments, or a Python file that defines ``SPACE``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from visionkd.config.plain import plain, read_yaml, shown
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.search.spaces import GridSpace, Space

_KEYS = ("name", "network", "args", "fixed", "img_size", "pretrained")
_METHODS = ("sample", "mutate", "crossover", "enumerate", "network")
_EXAMPLE = "network: resnet18, and below args: a list of values for each argument"


def read_space(path: Path, *, img_size: int | None = None) -> Space:
    """Return the space that a file describes.

    Args:
        path: ``.yaml``, ``.yml`` or ``.py``. A Python file is run, with all that it may do.
        img_size: Takes the place of the file's own; a Python file is not told.

    Raises:
        RequestError: If there is no such file, or with everything that is wrong in it.
    """
    if not path.is_file():
        raise RequestError(Problem("--space", f"there is no file '{path}'"))
    return _from_python(path) if path.suffix == ".py" else _from_yaml(path, img_size)


def _from_yaml(path: Path, img_size: int | None) -> Space:
    values, problems = plain(read_yaml(path.read_text(encoding="utf-8"), str(path)))
    for key in values:
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS, count=1) or f"Known: {', '.join(_KEYS)}"
            problems.append(Problem(f"{path}: {key}", "unknown key", hint))
    axes: dict[str, Any] = {}
    networks = values.get("network")
    if isinstance(networks, str):
        networks = [networks]
    if not _is_list(networks) or not all(isinstance(name, str) for name in networks):
        problems.append(Problem(f"{path}: network", "is required: a name or a list of names", _EXAMPLE))
    elif len(networks) > 1:
        axes["network"] = networks
    args = values.get("args", {})
    if not isinstance(args, dict):
        problems.append(Problem(f"{path}: args", f"must be a mapping (given: {shown(args)})", _EXAMPLE))
    else:
        for name, choices in args.items():
            if not _is_list(choices):
                problems.append(Problem(f"{path}: args.{name}", f"must be a list of values (given: {shown(choices)})"))
            else:
                axes[name] = choices
        problems += _list_problems(path, args)
    for key, kinds, what in (
        ("name", str, "text"),
        ("fixed", dict, "a mapping"),
        ("img_size", int, "a whole number"),
        ("pretrained", bool, "true or false"),
    ):
        if key in values and not isinstance(values[key], kinds):
            problems.append(Problem(f"{path}: {key}", f"must be {what} (given: {shown(values[key])})"))
    if not problems and not axes:
        problems.append(Problem(str(path), "leaves nothing to choose", _EXAMPLE))
    if problems:
        raise RequestError(problems)
    return GridSpace(
        values.get("name", path.stem),
        network=networks[0],
        axes=axes,
        fixed=values.get("fixed"),
        img_size=img_size or values.get("img_size"),
        pretrained=values.get("pretrained", False),
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def _list_problems(path: Path, args: dict[str, Any]) -> list[Problem]:
    """Find list arguments whose items are not numbered 0, 1, 2, ..."""
    numbers: dict[str, set[str]] = {}
    for axis in args:
        name, dot, index = axis.partition(".")
        if dot:
            numbers.setdefault(name, set()).add(index)
    return [
        Problem(f"{path}: args.{name}", "items must be numbered from 0 on", f"Such as {name}.0, {name}.1")
        for name, found in numbers.items()
        if found != {str(index) for index in range(len(found))}
    ]


def _from_python(path: Path) -> Space:
    spec = importlib.util.spec_from_file_location(f"visionkd_space_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        message = f"'{path}' cannot be run: {type(error).__name__}: {error}"
        raise RequestError(Problem("--space", message)) from error
    space = getattr(module, "SPACE", None)
    missing = [name for name in _METHODS if not callable(getattr(space, name, None))]
    missing += [name for name in ("name", "size") if not hasattr(space, name)]
    if space is None or missing:
        lacks = "defines no SPACE" if space is None else f"defines a SPACE without {', '.join(missing)}"
        example = "from visionkd.search.spaces import GridSpace; SPACE = GridSpace(...)"
        raise RequestError(Problem("--space", f"'{path}' {lacks}", f"Write: {example}"))
    return space
