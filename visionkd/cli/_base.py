"""What every command is made of: groups, commands and parameters on top of click.

A group that loads its commands lazily never imports one to list it, and a command reports everything that is wrong with
its arguments at once, where click stops at the first.
"""

from __future__ import annotations

import importlib
import importlib.resources
from collections.abc import Callable, Iterable
from typing import Any

import click

from visionkd import registry
from visionkd.errors import Problem, RequestError, did_you_mean

#: Files of ``visionkd/cli`` that are no commands; helpers with a leading underscore are none either.
NOT_COMMANDS = frozenset({"main", "console"})
_PACKAGE = "visionkd.cli"
_PROBLEMS = "visionkd.problems"


class _Collects:
    """A parameter whose wrong value is kept for the list of problems instead of ending the parsing."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            converted = super().process_value(ctx, value)  # type: ignore[misc]
            given = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(one, str) and not one.strip() for one in given):
                raise click.BadParameter("is empty")
            return converted
        except click.BadParameter as error:
            if ctx.resilient_parsing:  # shell completion looks at half a command line
                raise
            message = "is required" if isinstance(error, click.MissingParameter) else error.message.strip().rstrip(".")
            ctx.meta.setdefault(_PROBLEMS, []).append(Problem(_spelling(self), message))
            return None


class Option(_Collects, click.Option):
    """A click option; see :class:`_Collects`.

    Args:
        stated_default: What the help names as default where the workflow supplies it, not the command line.
    """

    def __init__(self, *args: Any, stated_default: str | None = None, **kwargs: Any) -> None:
        if stated_default is not None:
            kwargs["help"] = f"{kwargs['help']} Default: {stated_default}."
        super().__init__(*args, **kwargs)
        self.stated_default = stated_default


class Argument(_Collects, click.Argument):
    """A click argument; see :class:`_Collects`."""


class Command(click.Command):
    """A command with ``--debug``, which answers with every wrong value at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        problems = ctx.meta.get(_PROBLEMS)
        if problems:
            raise RequestError(problems, hint=f"See '{ctx.command_path} --help'.")
        return rest


class Group(click.Group):
    """A group that answers an unknown command with the nearest ones."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = str(args[0])
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            hint = did_you_mean(name, known) or f"Known: {', '.join(known)}"
            raise RequestError(f"unknown command '{name}'. {hint}", hint=f"See '{ctx.command_path} --help'.")
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """The commands are the files of ``visionkd/cli``: a new command is one new file and nothing else.

    A command file starts with a docstring, whose first line is the short help and which as a whole is the help, and
    defines ``command``. Listing reads the first line of each file; only the command that runs is imported.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name.replace("_", "-") for name in registry.names(_PACKAGE) if name not in NOT_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{_PACKAGE}.{_file_name(cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help(name)) for name in self.list_commands(ctx)])


def short_help(name: str) -> str:
    """Return the first line of the docstring of a command's file, without importing it."""
    file = importlib.resources.files(_PACKAGE) / f"{_file_name(name)}.py"
    with file.open(encoding="utf-8") as lines:
        return next(iter(lines)).strip().strip('"').rstrip(".")


def _file_name(command: str) -> str:
    return command.replace("-", "_")


def _spelling(parameter: Any) -> str:
    """Return how a user writes a parameter: its longest option name, or its metavar."""
    if isinstance(parameter, click.Option):
        return max((*parameter.opts, *parameter.secondary_opts), key=len)
    return str(parameter.human_readable_name)


def debug_option() -> click.Option:
    """Return ``--debug``, which works before and after the command's name."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(dict)["debug"] = True

    return click.Option(
        ["--debug"], is_flag=True, is_eager=True, expose_value=False, callback=remember, help="Show full tracebacks."
    )


def new_command(text: str | None) -> Callable[[Callable[..., Any]], Command]:
    """Make a command whose help is ``text``: the docstring of its file."""
    return click.command(cls=Command, help=text)


def new_group(text: str | None) -> Callable[[Callable[..., Any]], Group]:
    """Make a group of commands whose help is ``text``: the docstring of its file."""
    return click.group(cls=Group, help=text)


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Like :func:`click.option`; its problems are listed together with those of the others."""
    return click.option(*names, cls=Option, **settings)


def argument(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Like :func:`click.argument`; its problems are listed together with those of the others."""
    return click.argument(*names, cls=Argument, **settings)


def stack(decorators: Iterable[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Return one decorator that applies several, so that the first one is listed first in the help."""
    ordered = list(decorators)

    def decorate(function: Any) -> Any:
        for one in reversed(ordered):
            function = one(function)
        return function

    return decorate


def comma_list(values: Iterable[str]) -> tuple[str, ...] | None:
    """Return the parts of a repeated, comma-separated option; None where it was not given."""
    parts = tuple(part.strip() for value in values for part in value.split(",") if part.strip())
    return parts or None
