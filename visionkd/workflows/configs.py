"""Recipes: complete configurations to read, to copy and to run. They live in ``configs/<task>/<name>.yaml``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import visionkd
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.files import write_text

_LIST = "See 'visionkd configs list'."
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ConfigRow:
    """A recipe's name, such as ``classification/cifar10_kd``, and the first line of its header."""

    name: str
    summary: str


def list_configs() -> tuple[ConfigRow, ...]:
    """Return all recipes, sorted by name."""
    return tuple(ConfigRow(name, _summary(file)) for name, file in _recipes().items())


def show_config(name: str) -> str:
    """Return the text of a configuration.

    Args:
        name: Name of a recipe, with or without its task where that is unambiguous, or the path of a YAML file or of a
            run directory. A recipe wins over a file of the same name.

    Raises:
        RequestError: If there is no such recipe or file.
    """
    recipes = _recipes()
    if not name.strip():
        raise RequestError("the name of the recipe is empty", hint=_LIST)
    if name not in recipes:
        path = os.path.expanduser(name)
        file = os.path.join(path, "config.yaml") if os.path.isdir(path) else path
        if os.path.isfile(file):
            return _read(Path(file))
    return _read(_find(name, recipes))


def copy_config(name: str, file: str | Path, overwrite: bool = False) -> Path:
    """Write a copy of a recipe and return its path.

    Args:
        name: Name of the recipe.
        file: File to write; in a directory the recipe keeps its file name.
        overwrite: Write over a file that exists.

    Raises:
        RequestError: If there is no such recipe, or the file exists.
    """
    recipe = _find(name, _recipes())
    target = Path(os.path.expanduser(file))
    if target.is_dir():
        target = target / recipe.name
    if target.exists() and not overwrite:
        raise RequestError(
            f"{target} exists, and nothing is written over unasked.", hint="Give another file, or --overwrite."
        )
    write_text(target, _read(recipe))
    return target


def config_directory() -> Path | None:
    """Return the folder of the recipes: inside an installed package, beside it in a checkout; None without any."""
    package = Path(visionkd.__file__).resolve().parent
    installed, checkout = package / "_configs", package.parent / "configs"
    if installed.is_dir():
        return installed
    return checkout if checkout.is_dir() and (package.parent / "setup.cfg").is_file() else None


def _recipes() -> dict[str, Path]:
    """Return the file of each recipe by name: its path below the folder, with ``/`` on every system and no suffix."""
    folder = config_directory()
    if folder is None:
        return {}
    files = sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _find(name: str, recipes: Mapping[str, Path]) -> Path:
    wanted = name.replace("\\", "/")
    for suffix in _SUFFIXES:
        wanted = wanted.removesuffix(suffix)
    if wanted in recipes:
        return recipes[wanted]
    if os.path.isdir(os.path.expanduser(name)):
        problem = Problem(
            name, "is a directory without a config.yaml", "Name a run directory, a recipe or a YAML file."
        )
        raise RequestError(problem, hint=_LIST)
    matches = [full for full in recipes if full.rsplit("/", 1)[-1] == wanted]
    if len(matches) == 1:
        return recipes[matches[0]]
    if matches:
        problem = Problem(name, "names several recipes", f"Give one of: {', '.join(matches)}")
        raise RequestError(problem, hint=_LIST)
    tails = {full.rsplit("/", 1)[-1]: full for full in recipes}
    near = did_you_mean(wanted, [*recipes, *tails])
    raise RequestError(Problem(name, "is neither a recipe nor a file", near or None), hint=_LIST)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not a text file in UTF-8: {error.reason} at byte {error.start}") from None


def _summary(file: Path) -> str:
    """Return the first line of the comment that a recipe begins with."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            text = line.strip().lstrip("#").strip()
            if text:
                return text if line.startswith("#") else ""
    return ""
