"""List known data sets, and check data before training on them.

\b
Examples:
  visionkd data list
  visionkd data check path/to/images
"""

from __future__ import annotations

from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_group


@new_group(__doc__)
def command() -> None:
    pass


@command.command("list", help="List the data sets that are known by name.")
def list_() -> None:
    from visionkd import workflows

    console.show_table(workflows.list_data())


@command.command("check")
@argument("data", metavar="DATA")
@_options.overrides
@_options.as_json
@click.pass_context
def check(ctx: click.Context, as_json: bool, **request: Any) -> None:
    """Look for images and classes that would harm a training.

    Reports unreadable, truncated, duplicate, grey and tiny images, empty and one-image classes, and files that are in
    more than one split. The exit code is 1 where something is wrong.
    """
    from visionkd import workflows

    with console.working(stdout_is_data=as_json) as listener:
        report = workflows.check_data(**request, listener=listener)
    if as_json:
        console.write_json({**console.as_mapping(report), "problems": report.problems})
    else:
        console.show_check(report)
    if report.problems:
        ctx.exit(1)
