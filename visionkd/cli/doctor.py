"""Tell what this machine can do: devices, versions, optional packages.

The exit code is 1 where something is installed but does not work.
"""

from __future__ import annotations

import click

from visionkd.cli import _options, console
from visionkd.cli._base import new_command


@new_command(__doc__)
@_options.as_json
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    from visionkd import workflows

    with console.working(stdout_is_data=as_json):
        result = workflows.doctor()
    if as_json:
        console.write_json(result)
    else:
        console.show_table(result.rows)
    if any(row.status == "broken" for row in result.rows):
        ctx.exit(1)
