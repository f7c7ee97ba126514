"""List known data sets, check data before training on them, and look after stored teacher labels.

\b
Examples:
  visionkd data list
  visionkd data check path/to/images
  visionkd data cache list
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import Group, argument, new_group, option
from visionkd.errors import Problem, RequestError


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

    Reports unreadable, truncated, duplicate, grey and tiny images, empty and one-image classes, files that are in more
    than one split, maps of classes that are none or have another size than their image, and boxes without area, outside
    of their image, or of images that are missing. The exit code is 1 where something is wrong.
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


@command.group("cache", cls=Group)
def cache() -> None:
    """List, verify and remove stores of teacher labels.

    A run with --cache-teacher keeps its teachers' answers in a store below the cache directory, and later runs on the
    same views read them. STORE is an id from 'visionkd data cache list', the beginning of one, or a directory.

    \b
    Examples:
      visionkd data cache list
      visionkd data cache verify
      visionkd data cache remove --unused-days 30
    """


@cache.command("list", help="List the stores: teachers, data, labels, size and when each was last used.")
@_options.as_json
def list_cache(as_json: bool) -> None:
    from visionkd import workflows

    stores = workflows.list_cache()
    if as_json:
        console.write_json({"stores": stores})
    else:
        console.show_table(stores)


@cache.command("verify")
@argument("stores", metavar="[STORE]...", nargs=-1)
@_options.as_json
@click.pass_context
def verify_cache(ctx: click.Context, stores: tuple[str, ...], as_json: bool) -> None:
    """Compare every shard with its checksum; all stores where none is named.

    The exit code is 1 where a shard is damaged. The next run that uses the store computes its labels again.
    """
    from visionkd import workflows

    with console.working(stdout_is_data=as_json) as listener:
        reports = workflows.verify_cache(stores=stores, listener=listener)
    if as_json:
        console.write_json({"stores": reports})
    else:
        console.show_table({**console.as_mapping(report), "damaged": len(report.damaged)} for report in reports)
        for report in reports:
            for name, reason in report.damaged:
                console.warn(f"{report.path / name}: {reason}")
    if any(report.damaged for report in reports):
        ctx.exit(1)


@cache.command("remove")
@argument("stores", metavar="[STORE]...", nargs=-1)
@option("--all", "every", is_flag=True, help="Remove every store in the cache directory.")
@option("--unused-days", type=_options.Count(0), metavar="N", help="Remove those that no run has used for N days.")
@option("--yes", is_flag=True, help="Do not ask.")
@_options.as_json
def remove_cache(stores: tuple[str, ...], every: bool, unused_days: int | None, yes: bool, as_json: bool) -> None:
    """Remove stores: those named, all, or those long unused.

    A store that a run has open is left alone, and the exit code is then 1.
    """
    from visionkd import workflows

    removed = workflows.remove_cache(
        stores=stores, every=every, unused_days=unused_days, confirm=None if yes else _confirm
    )
    if as_json:
        console.write_json({"removed": removed})
    elif removed:
        console.show_table(removed)
    else:
        console.note("nothing was removed")


def _confirm(stores: Sequence[Any]) -> bool:
    if not console.is_terminal(sys.stdin):
        raise RequestError(Problem("--yes", f"is needed where nobody can be asked ({len(stores)} to remove)"))
    for store in stores:
        console.note(f"{store.path} ({store.size_mb:.1f} MB)")
    return click.confirm(f"Remove {console.counted(len(stores), 'store')}?", err=True)
