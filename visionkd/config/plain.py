"""YAML as plain values: text, numbers, lists and mappings, so that what was read can be written down and read again."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import yaml

from visionkd.errors import Problem, RequestError

MAX_DEPTH = 32
MAX_VALUES = 100_000
_MAX_SHOWN = 80
# Stops early: a list whose items are aliases of one another can be longer in writing than any memory.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxset = 5, 8, 8, 8, 8
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 2 * _MAX_SHOWN


def read_yaml(text: str, where: str) -> dict[Any, Any]:
    """Return the mapping that ``text`` holds; an empty text is an empty mapping.

    Args:
        text: YAML.
        where: Name of its file, for messages.

    Raises:
        RequestError: If it is no YAML, or no mapping.
    """
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except (
        Exception
    ) as error:  # PyYAML meets ill-typed tags, impossible dates and deep nesting with errors of all kinds
        raise RequestError(Problem(where, f"is not valid YAML: {_reason(error)}")) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        example = "A line is 'name: value', such as 'method: kd'."
        raise RequestError(Problem(where, f"must be a mapping of names to values (given: {shown(values)})", example))
    return values


def read_value(text: str) -> Any:
    """Return the value after the ``=`` of an option; what is no YAML is the text itself."""
    try:
        return yaml.safe_load(text)
    except Exception:  # as in read_yaml
        return text


def plain(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return a copy that shares nothing, and what in it is neither text, number, list nor mapping.

    YAML's aliases make one list or mapping appear in several places: an override of one of them must leave the others.

    Raises:
        RequestError: If it is nested too deeply or too large, as a value that contains itself is.
    """
    copier = _Copier()
    return copier.mapping(values, ()), copier.problems


def shown(value: Any) -> str:
    """Return a value as a message shows it: short, whatever it is."""
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


class Dumper(yaml.SafeDumper):
    """Quotes text with special characters, some of which PyYAML would write as line breaks and not read back."""


def _text(dumper: Dumper, value: str) -> yaml.ScalarNode:
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


Dumper.add_representer(str, _text)


class _Copier:
    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.left = MAX_VALUES

    def mapping(self, values: Mapping[Any, Any], path: tuple[str, ...]) -> dict[str, Any]:
        copied = {}
        for name, value in values.items():
            if not isinstance(name, str):
                kind = "nothing" if name is None else f"a {type(name).__name__}"
                message = f"the name {shown(name)} is read as {kind}, and names are text"
                self.problems.append(Problem(".".join(path) or shown(name), message, "Put it in quotes."))
            elif not _is_text(name):
                self.problems.append(Problem(_key(path), f"the name {shown(name)} is not valid text"))
            else:
                copied[name] = self.value(value, (*path, name))
        return copied

    def value(self, value: Any, path: tuple[str, ...]) -> Any:
        self.left -= 1
        if len(path) > MAX_DEPTH:
            raise RequestError(Problem(_key(path[:2]), f"is nested more than {MAX_DEPTH} levels deep"))
        if self.left < 0:
            raise RequestError(Problem(_key(path[:1]), f"holds more than {MAX_VALUES:,} values, or itself"))
        if isinstance(value, Mapping):
            return self.mapping(value, path)
        if isinstance(value, (list, tuple)):
            return [self.value(item, (*path, str(number))) for number, item in enumerate(value)]
        if reason := _not_plain(value):
            self.problems.append(Problem(_key(path), f"{reason} (given: {shown(value)})"))
        return value


def _key(path: tuple[str, ...]) -> str:
    return ".".join(path) or "config"


def _not_plain(value: Any) -> str | None:
    """Return why a value cannot stand in a configuration, None where it can."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "must be a number of at most 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "must be a finite number"
    if isinstance(value, str):
        return None if _is_text(value) else "must be valid text"
    return f"must be text, a number, a list or a mapping, not a {type(value).__name__}; put it in quotes"


def _is_text(value: str) -> bool:
    """Tell whether a file can hold it; a command line that is not UTF-8 comes in as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    """Return what PyYAML objects to, in one line, with the place as an editor counts it."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        context = f" ({error.context})" if error.context and error.problem else ""
        return " ".join(f"{place}{error.problem or error.context}{context}".split())
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position + 1} may not stand in it: {error.reason}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:200] or type(error).__name__


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
