"""Read a recipe, apply overrides, and report everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem, RequestError, did_you_mean

C = TypeVar("C", bound=RunConfig)


def load_config(
    kind: type[C],
    *,
    text: str | None = None,
    where: str = "config",
    overrides: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
    method_options: Callable[[str], type | None] | None = None,
) -> C:
    """Build a checked configuration.

    Args:
        kind: ``DistillConfig`` or ``TrainConfig``.
        text: YAML of the recipe; None starts from the defaults.
        where: Name of the recipe's file, for messages.
        overrides: Values by dotted key; None values are ignored.
        options: ``KEY=VALUE`` strings, as given with ``-o``; they win over ``overrides``.
        method_options: Gives the frozen options dataclass of a method, or None where the method is not known yet.

    Raises:
        RequestError: With every problem found: key path, value given, what is allowed.
    """
    problems: list[Problem] = []
    values = _read_yaml(text, where, problems)
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(values, key, value, problems)
    for option in options:
        key, equals, value_text = option.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(f"-o {option}", "is not of the form KEY=VALUE", "Example: -o training.epochs=5"))
            continue
        try:
            value = yaml.safe_load(value_text)
        except yaml.YAMLError:
            value = value_text
        _put(values, key.strip(), value, problems)
    config = None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        problems += _explain(error, kind)
    method = values.get("method", "auto")
    schema = method_options(method) if method_options and isinstance(method, str) else None
    if schema is not None:
        given = values.get("options") or {}
        if isinstance(given, dict):
            problems += options_problems(schema, given)
    if problems:
        raise RequestError(problems, hint="See 'visionkd configs list' and 'visionkd configs show NAME' for complete recipes.")
    assert config is not None
    return config


def dump_config(config: BaseModel) -> str:
    """Return ``config`` as YAML that :func:`load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def build_options(schema: type, given: Mapping[str, Any]) -> Any:
    """Build a method's options dataclass, with values converted to the annotated types."""
    return TypeAdapter(schema).validate_python(dict(given))


def options_problems(schema: type, given: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with a method's options; unknown names are answered with the nearest."""
    assert is_dataclass(schema)
    known = list(schema.__dataclass_fields__)
    problems = [
        Problem(f"options.{name}", "unknown option of this method", did_you_mean(str(name), known) or f"Known: {', '.join(known)}")
        for name in given
        if name not in known
    ]
    try:
        build_options(schema, {name: value for name, value in given.items() if name in known})
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(["options", *map(str, item["loc"])])
            problems.append(Problem(key, f"{_message(item)} (given: {item.get('input')!r})"))
    return problems


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(text: str | None, where: str, problems: list[Problem]) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, a lone surrogate
        problems.append(Problem(where, f"is not valid YAML: {' '.join(str(error).split())}"))
        return {}
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        problems.append(Problem(where, "must be a mapping of names to values"))
        return {}
    return values


def _put(values: dict[str, Any], key: str, value: Any, problems: list[Problem]) -> None:
    """Set a dotted key; numbers index into lists."""
    at: Any = values
    parts = key.split(".")
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(at, list) and part.isdecimal() and int(part) < len(at):
            index: Any = int(part)
        elif isinstance(at, dict):
            index = part
        else:
            problems.append(Problem(key, f"'{'.'.join(parts[:number])}' has no part '{part}'"))
            return
        if last:
            at[index] = value
            return
        if isinstance(at, dict) and at.get(index) is None:
            at[index] = {}
        at = at[index]


def _explain(error: ValidationError, kind: type[BaseModel]) -> Iterator[Problem]:
    known = dict(_all_keys(kind))
    for item in error.errors():
        loc = [str(part) for part in item["loc"] if not _is_union_branch(part)]
        key = ".".join(loc)
        if item["type"] == "extra_forbidden":
            siblings = [path.rsplit(".", 1)[-1] for path in known if path.rpartition(".")[0] == ".".join(loc[:-1])]
            elsewhere = [f"'{path}'" for path in known if path.rsplit(".", 1)[-1] == loc[-1]]
            hint = f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(loc[-1], siblings)
            yield Problem(key, f"unknown key (given: {item['input']!r})", hint or f"Allowed here: {', '.join(sorted(siblings))}")
        elif item["type"] == "missing":
            yield Problem(key, "is required", _MISSING_HINTS.get(key))
        else:
            yield Problem(key or "config", f"{_message(item)} (given: {item['input']!r})")


_MISSING_HINTS = {
    "student": "Give --student NAME, such as --student resnet50",
    "teachers": "Give --teacher NAME, such as --teacher vit_l",
    "model": "Give --model NAME, such as --model resnet18",
}


def _message(item: Any) -> str:
    text = item["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _is_union_branch(part: Any) -> bool:
    """Pydantic adds the tried branch of a union to the path ('constrained-int', "literal['auto']")."""
    return isinstance(part, str) and (part.startswith(("constrained-", "literal[", "function-")) or part in ("int", "float", "str"))


def _all_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in kind.model_fields.items():
        yield prefix + name, info
        for inner in (info.annotation, *get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _all_keys(inner, f"{prefix}{name}.")
                break
