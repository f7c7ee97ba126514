"""Finding cards: in the folders of ``VISIONKD_ZOO``, then in the installed package or the checkout. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

import visionkd
from visionkd.config.plain import plain, read_yaml, shown
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.hub.card import CARD_FORMAT, Card
from visionkd.runtime.zoo_name import PREFIX

_SUFFIX = ".yaml"
_TASKS = ("classification", "segmentation", "detection")
_MAX_CARD_BYTES = 1 << 20


def zoo_directories() -> tuple[Path, ...]:
    """Return the folders that hold cards, the first to be looked at first.

    Those of the environment variable ``VISIONKD_ZOO`` (several are separated as in ``PATH``) come before the project's
    own, which lies inside an installed package and beside it in a checkout.
    """
    given = [Path(part).expanduser() for part in os.environ.get("VISIONKD_ZOO", "").split(os.pathsep) if part.strip()]
    own = own_directory()
    return tuple(dict.fromkeys([*given, *([own] if own is not None else [])]))


def own_directory() -> Path | None:
    """Return the project's own folder of cards, None without one."""
    package = Path(visionkd.__file__).resolve().parent
    installed, checkout = package / "_zoo", package.parent / "zoo"
    if installed.is_dir():
        return installed
    return checkout if checkout.is_dir() and (package.parent / "setup.cfg").is_file() else None


def card_files() -> dict[str, Path]:
    """Return the file of every card by the model's name, sorted by name.

    Raises:
        RequestError: If a folder of ``VISIONKD_ZOO`` does not exist, or one folder has two cards of the same name.
    """
    found: dict[str, Path] = {}
    for directory in zoo_directories():
        if not directory.is_dir():
            raise RequestError(
                f"the folder '{directory}' of VISIONKD_ZOO does not exist", hint="Correct or unset VISIONKD_ZOO."
            )
        here: dict[str, Path] = {}
        for task in _TASKS:
            for file in sorted((directory / task).glob(f"*{_SUFFIX}")):
                if file.stem in here:
                    raise RequestError(f"'{file}' and '{here[file.stem]}' have the same name", hint="Rename one.")
                here[file.stem] = file
        found = {**here, **found}
    return dict(sorted(found.items()))


def find_card(name: str) -> Card:
    """Return the card of a model.

    Args:
        name: The model's name, with or without ``zoo:`` and an artifact.

    Raises:
        RequestError: If there is no such model (the nearest are offered), or its card is wrong.
    """
    return read_card(card_file(name))


def card_file(name: str) -> Path:
    """Return the file of a model's card; raises as :func:`find_card`."""
    name, files = split_name(name)[0], card_files()
    if name not in files:
        near = did_you_mean(name, files)
        raise RequestError(
            f"the zoo has no model '{name}'", hint=f"{near} See: visionkd zoo list".strip() if files else None
        )
    return files[name]


def all_cards() -> Iterator[Card]:
    """Yield every card, sorted by name; raises at the first that is wrong."""
    for file in card_files().values():
        yield read_card(file)


def split_name(name: str) -> tuple[str, str | None]:
    """Return a model's name and the artifact that is asked for, from ``[zoo:]NAME[@ARTIFACT]``."""
    model, at, artifact = name.strip().removeprefix(PREFIX).partition("@")
    if not model or (at and not artifact):
        raise RequestError(f"'{name}' does not name a model of the zoo", hint="Write zoo:NAME or zoo:NAME@ARTIFACT.")
    return model, artifact or None


def read_card(path: str | os.PathLike[str]) -> Card:
    """Read and check a card.

    Raises:
        RequestError: With everything that is wrong with it, by key.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_CARD_BYTES + 1)
        if len(content) > _MAX_CARD_BYTES:
            raise RequestError(f"'{path}' is longer than 1 MB, which no card is")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the card '{path}' cannot be read: {error}") from error
    values, problems = plain(read_yaml(text, str(path)))
    written = values.get("format")
    if isinstance(written, int) and written > CARD_FORMAT:
        raise RequestError(
            f"'{path}' is a card of format {written}, and this version reads {CARD_FORMAT}",
            hint="Update visionkd: pip install --upgrade visionkd",
        )
    card = None
    try:
        card = Card.model_validate(values)
    except ValidationError as error:
        problems += _explain(error)
    if card is not None and card.name != path.stem:
        problems.append(Problem("name", f"is '{card.name}', and the file is called {path.name}"))
    if card is not None and card.task != path.parent.name and path.parent.name in _TASKS:
        problems.append(Problem("task", f"is {card.task}, and the file lies in {path.parent.name}/"))
    if problems or card is None:
        raise RequestError(problems, hint=f"Correct the card {path}")
    return card


def _explain(error: ValidationError) -> list[Problem]:
    found: dict[str, Problem] = {}
    for item in error.errors():
        key = _key(item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        text = {"extra_forbidden": "unknown key", "missing": "is required"}.get(item["type"], text)
        if item["type"] == "too_short" and any(other.startswith(f"{key}.") for other in found):
            continue  # pydantic counts the items that are right
        told = isinstance(item["input"], dict) or item["type"] == "missing" or "(given" in text
        given = "" if told else f" (given: {shown(item['input'])})"
        found.setdefault(key, Problem(key, f"{text[:1].lower()}{text[1:]}{given}"))
    return list(found.values())


def _key(parts: tuple[int | str, ...]) -> str:
    """Return a key as the card spells it: pydantic adds which kind of artifact or source it took something for."""
    kept = [
        str(part)
        for number, part in enumerate(parts)
        if not (number == 2 and parts[0] == "artifacts") and not (number > 1 and parts[number - 2] == "sources")
    ]
    return ".".join(kept) or "card"
