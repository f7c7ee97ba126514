"""Read a recipe, apply overrides, and report everything that is wrong with it at once."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from visionkd.config.plain import Dumper, plain, read_value, read_yaml, shown
from visionkd.config.schema import DistillConfig, RunConfig, TrainConfig
from visionkd.errors import Problem, RequestError, did_you_mean

C = TypeVar("C", bound=RunConfig)

#: Whose recipe a configuration is, and the keys that only it has; the first ones are those that tell a reader.
_COMMANDS: dict[str, tuple[type[RunConfig], tuple[str, ...]]] = {
    "distill": (DistillConfig, ("student", "teachers", "method", "options", "fit_teacher")),
    "train": (TrainConfig, ("model",)),
}
_RECIPES = "See 'visionkd configs list' and 'visionkd configs show NAME' for complete recipes."
_UNKNOWN = "unknown key"


def load_config(
    kind: type[C],
    *,
    text: str | None = None,
    where: str = "config",
    overrides: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
    method_options: Callable[[str], type | None] | None = None,
    spelled: Mapping[str, str] | None = None,
    again: str | None = None,
    check: Callable[[Mapping[str, Any]], Iterable[Problem]] | None = None,
    complete: Callable[[dict[str, Any]], None] | None = None,
) -> C:
    """Build a checked configuration.

    Args:
        kind: ``DistillConfig`` or ``TrainConfig``.
        text: YAML of the recipe; None starts from the defaults.
        where: Name of the recipe's file, for messages.
        overrides: Values by dotted key; None values are ignored.
        options: ``KEY=VALUE`` strings, as given with ``-o``; they win over ``overrides``.
        method_options: Gives the frozen options dataclass of a method, or None where the method is not known yet.
        spelled: The command line's option behind a key of ``overrides``, such as ``--lr``, for messages.
        again: How the recipe was named on the command line, such as ``--config NAME``, to say what to run instead.
        check: Finds further problems in the values that were read and overridden, which may be of any type.
        complete: Adds, in place, what follows from these values.

    Raises:
        RequestError: With every problem found: key path, value given, what is allowed.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    if text is not None:
        values, problems = plain(read_yaml(text, where))
        _check_command(kind, values, where, again)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    for key, value in given.items():
        _put(values, key, copy.deepcopy(value), problems)
    by_option = [_put_option(values, option, problems) for option in options]
    values, found = plain(values)
    problems += found
    if complete is not None:
        complete(values)
    config = None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        problems += [problem for problem in _explain(error, kind) if problem.key not in known]
    problems += _method_problems(kind, values, method_options)
    problems = [_spell(problem, given, by_option, spelled or {}) for problem in dict.fromkeys(problems)]
    for problem in check(values) if check else ():
        option = _option_of(problem.key, given, by_option, spelled or {})
        problems.append(replace(problem, key=option) if option else problem)
    if problems:
        helps = any(problem.message.startswith(_UNKNOWN) for problem in problems)
        raise RequestError(problems, hint=_RECIPES if helps else None)
    assert config is not None
    return config


def dump_config(config: BaseModel) -> str:
    """Return ``config`` as YAML that :func:`load_config` reads back to an equal configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def build_options(schema: type, given: Mapping[str, Any]) -> Any:
    """Build a method's options dataclass, with values converted to the annotated types."""
    return TypeAdapter(schema).validate_python(dict(given))


def options_problems(schema: type, given: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with a method's options; unknown names are answered with the nearest."""
    assert is_dataclass(schema)
    known = list(schema.__dataclass_fields__)
    problems = [
        Problem(
            f"options.{name}",
            "unknown option of this method",
            did_you_mean(str(name), known) or f"Known: {', '.join(known)}",
        )
        for name in given
        if name not in known
    ]
    try:
        build_options(schema, {name: value for name, value in given.items() if name in known})
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(["options", *map(str, item["loc"])])
            problems.append(Problem(key, f"{_message(item)} (given: {shown(item.get('input'))})"))
    return problems


def _method_problems(
    kind: type[RunConfig], values: Mapping[str, Any], method_options: Callable[[str], type | None] | None
) -> list[Problem]:
    method, given = values.get("method", "auto"), values.get("options") or {}
    if method_options is None or "method" not in kind.model_fields or not isinstance(method, str):
        return []
    schema = method_options(method)
    return options_problems(schema, given) if schema is not None and isinstance(given, dict) else []


# Where a value came from ----------------------------------------------------------------------------------------------


def _check_command(kind: type[RunConfig], values: Mapping[str, Any], where: str, again: str | None) -> None:
    """Refuse the recipe of another command in one line, where each of its keys would be unknown otherwise."""
    own = next((keys for known, keys in _COMMANDS.values() if known is kind), None)
    if own is None or any(key in values for key in own):
        return
    for command, (_, keys) in _COMMANDS.items():
        found = [key for key in keys if key in values]
        if found:
            has = " and ".join(found[:2])
            message = f"is a recipe for 'visionkd {command}' (it has {has})"
            raise RequestError(Problem(where, message), hint=f"Run: visionkd {command} {again}" if again else None)


def _spell(problem: Problem, given: Mapping[str, Any], by_option: Sequence[str], spelled: Mapping[str, str]) -> Problem:
    """Put the option that the user typed before the key."""
    option = _option_of(problem.key, given, by_option, spelled)
    return replace(problem, key=f"{option} ({problem.key})") if option else problem


def _option_of(key: str, given: Mapping[str, Any], by_option: Sequence[str], spelled: Mapping[str, str]) -> str | None:
    if any(_within(key, other) for other in by_option):
        return None  # -o wins, and names the key itself
    return next((spelled[other] for other in given if other in spelled and _within(key, other)), None)


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _put_option(values: dict[str, Any], option: str, problems: list[Problem]) -> str:
    """Apply a ``KEY=VALUE`` string and return its key."""
    key, equals, text = option.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(Problem(f"-o {option}", "is not of the form KEY=VALUE", "Example: -o training.epochs=5"))
    else:
        _put(values, key, read_value(text), problems)
    return key


def _put(values: dict[str, Any], key: str, value: Any, problems: list[Problem]) -> None:
    """Set a dotted key; numbers index into lists."""
    at: Any = values
    parts = key.split(".")
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(at, list) and part.isdecimal() and len(part) < 6 and int(part) < len(at):
            index: Any = int(part)
        elif isinstance(at, dict):
            index = part
        else:
            above = ".".join(parts[:number])
            length = f": it has {len(at)}, counted from 0" if isinstance(at, list) else ""
            problems.append(Problem(key, f"'{above}' has no part '{part}'{length}"))
            return
        if last:
            at[index] = value
            return
        if isinstance(at, dict) and at.get(index) is None:
            at[index] = {}
        at = at[index]


# What is wrong with it ------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, kind: type[BaseModel]) -> Iterator[Problem]:
    known = list(_all_keys(kind))
    found: dict[str, list[Any]] = {}
    for item in error.errors():
        unknown = item["type"] == "extra_forbidden"
        loc = [str(part) for part in item["loc"] if unknown or not _is_union_branch(part)]
        found.setdefault(".".join(loc) or "config", []).append(item)
    for key, items in found.items():
        item = items[0]
        if item["type"] == "extra_forbidden":
            yield Problem(key, f"{_UNKNOWN} (given: {shown(item['input'])})", _nearest_key(key, known))
        elif item["type"] == "missing":
            yield Problem(key, "is required", _MISSING_HINTS.get(key))
        elif item["type"] in ("model_type", "model_attributes_type"):
            below = [path for path in known if path.startswith(f"{_schema_path(key)}.")]
            example = f"Set one of its keys, such as {key}.{below[0].rsplit('.', 1)[-1]}" if below else None
            yield Problem(key, f"is a section with keys of its own (given: {shown(item['input'])})", example)
        else:  # several for one key: the branches of a union
            messages = " or ".join(dict.fromkeys(map(_message, items))).replace(" or must be ", " or ")
            yield Problem(key, f"{messages} (given: {shown(item['input'])})")


_MISSING_HINTS = {
    "student": "Give --student NAME, such as --student resnet50",
    "student.name": "Give --student NAME, such as --student resnet50",
    "teachers": "Give --teacher NAME, such as --teacher vit_l",
    "model": "Give --model NAME, such as --model resnet18",
    "model.name": "Give --model NAME, such as --model resnet18",
}


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """Return the key that was meant: of the same name elsewhere, of a like name here, of a like name elsewhere."""
    section, _, name = _schema_path(key).rpartition(".")
    here = [path.rsplit(".", 1)[-1] for path in known if path.rpartition(".")[0] == section]
    elsewhere = [path for path in known if path.rsplit(".", 1)[-1] == name]
    if elsewhere:  # those nearest to the top: a setting of a setting is rarely what was meant
        depth = min(path.count(".") for path in elsewhere)
        elsewhere = [path for path in elsewhere if path.count(".") == depth]
        return f"Did you mean {' or '.join(repr(path) for path in elsewhere)}?"
    if near := did_you_mean(name, here):
        return near
    like = difflib.get_close_matches(name.lower(), [path.rsplit(".", 1)[-1] for path in known], n=1, cutoff=0.8)
    meant = [path for path in known if path.rsplit(".", 1)[-1] in like]
    if meant:
        return f"Did you mean {' or '.join(map(repr, meant))}?"
    return f"Allowed here: {', '.join(sorted(here))}"


def _schema_path(key: str) -> str:
    """Return a key without the numbers of list items."""
    return ".".join(part for part in key.split(".") if not part.isdecimal())


def _message(item: Any) -> str:
    text = item["msg"].removeprefix("Value error, ")
    if text.startswith("Input should be "):
        return "must be " + text.removeprefix("Input should be ").partition(", unable to parse")[0]
    return text[:1].lower() + text[1:]


def _is_union_branch(part: Any) -> bool:
    """Pydantic adds the tried branch of a union to the path ('constrained-int', "literal['auto']")."""
    return isinstance(part, str) and (
        part.startswith(("constrained-", "literal[", "function-")) or part in ("int", "float", "str")
    )


def _all_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in kind.model_fields.items():
        yield prefix + name
        for inner in (info.annotation, *get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _all_keys(inner, f"{prefix}{name}.")
                break
