"""Find, fetch, check and publish models: the zoo.

A model of the zoo has a card: licence, preprocessing, accuracy, sizes and where its files are, with their SHA-256.
zoo:NAME is a MODEL for every command, and zoo:NAME@FORM one of its forms, such as its INT8 twin.

\b
Examples:
  visionkd zoo list --task classification --max-params-m 10 --sort top1
  visionkd zoo show efficientnet_lite0
  visionkd zoo pull efficientnet_lite0
  visionkd eval zoo:efficientnet_lite0 --data path/to/images
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from visionkd.cli import _options, console
from visionkd.cli._base import argument, comma_list, new_group, option
from visionkd.cli._zoo_card import show_card

#: Columns of the table on a terminal; --json has all.
_HIDDEN = ("method", "timed")


@new_group(__doc__)
def command() -> None:
    pass


_offline = option("--offline", is_flag=True, help="Take nothing from the network.")


def _limit(name: str, text: str) -> Any:
    return option(f"--max-{name}", type=_options.AboveZero(), metavar="X", help=text)


@command.command("list")
@argument("words", nargs=-1, metavar="[WORD]...")
@option("--task", type=click.Choice(["classification", "segmentation", "detection"]), help="What the outputs serve.")
@option("--data", metavar="NAME", help="Data set that a model was trained or measured on.")
@option("--origin", type=click.Choice(["own", "upstream"]), help="Trained by this project, or by others.")
@option("--licence", multiple=True, metavar="NAME[,...]", help="One of these licences.")
@option("--commercial", is_flag=True, help="Leave out licences that forbid commercial use, and unknown ones.")
@_limit("params-m", "Most parameters in millions.")
@_limit("macs-g", "Most multiply-adds of an image in 10^9.")
@_limit("size-mb", "Largest files in 10^6 bytes.")
@_limit("latency-ms", "Slowest timing of one image; a card says what it was made with.")
@option("--min", "least", multiple=True, metavar="METRIC=X", help="Smallest metric in percent: top1, miou, ap.")
@option("--pulled", is_flag=True, help="Only what is in the cache.")
@option("--forms", is_flag=True, help="A line for each form of a model, INT8 ones too.")
@option("--sort", metavar="COLUMN", help="Column to sort by, the best first; by task, data and metric without it.")
@option("--reverse", is_flag=True, help="The other way round.")
@_options.as_json
def list_(licence: Sequence[str], as_json: bool, **request: Any) -> None:
    """List the models; every WORD must occur in the name, the title or what a model is good for.

    A value that a card does not state is no reason to be within a limit: such models are left out, and counted.
    """
    from visionkd import workflows

    with console.working(stdout_is_data=as_json) as listener:
        rows = workflows.list_zoo(licence=comma_list(licence) or (), listener=listener, **request)
    if as_json:
        console.write_json({"models": rows})
    else:
        mappings = [console.as_mapping(row) for row in rows]
        console.show_table({key: row[key] for key in row if key not in _HIDDEN} for row in mappings)


@command.command("show", help="Show the card of a model: what it is, what was measured, and its files.")
@argument("name", metavar="NAME")
@_options.as_json
def show(name: str, as_json: bool) -> None:
    from visionkd import workflows

    card = workflows.show_zoo(name=name)
    if as_json:
        console.write_json(card.model_dump(mode="json"))
    else:
        show_card(card)


@command.command("pull")
@argument("names", nargs=-1, required=True, metavar="NAME[@FORM]...")
@option("--all", "every", is_flag=True, help="Fetch all forms of each model, INT8 ones too.")
@_offline
@_options.as_json
def pull(names: tuple[str, ...], every: bool, offline: bool, as_json: bool) -> None:
    """Fetch models and verify them; what is there already is not fetched again.

    An interrupted pull goes on where it stopped. Files lie in $VISIONKD_CACHE/zoo; weights that timm and torchvision
    publish stay in their caches.
    """
    from visionkd import workflows

    with console.working(stdout_is_data=as_json) as listener:
        files = workflows.pull_zoo(names=names, every=every, offline=offline or None, listener=listener)
    if as_json:
        console.write_json({"models": files})
    else:
        console.show_table(files)


@command.command("verify")
@argument("names", nargs=-1, metavar="[NAME[@FORM]]...")
@option("--data", multiple=True, metavar="[NAME=]DATA", help="Measure again what was measured on it; may be repeated.")
@option(
    "--tolerance", type=_options.AboveZero(), metavar="POINTS", stated_default="0.1", help="Largest difference allowed."
)
@_options.accelerator
@_offline
@_options.as_json
@click.pass_context
def verify(ctx: click.Context, names: tuple[str, ...], offline: bool, as_json: bool, **request: Any) -> None:
    """Compare models with their cards: hashes, outputs, input, and with --data the metrics.

    Without NAME, all models that need no download. In --data, NAME is the data set as the card calls it; without it
    the folder's name. The exit code is 1 where something differs.
    """
    from visionkd import workflows

    given = {name: value for name, value in request.items() if value is not None}
    with console.working(stdout_is_data=as_json) as listener:
        checks = workflows.verify_zoo(names=names, offline=offline or None, listener=listener, **given)
    failed = sum(check.state == "failed" for check in checks)
    if as_json:
        console.write_json({"checks": checks, "failed": failed})
    else:
        console.show_table(check for check in checks if names or check.state != "skipped")
        skipped = sum(check.state == "skipped" for check in checks)
        if skipped and not names:
            console.note(f"skipped, because they are not on this machine: {skipped} (name them to fetch them)")
    if failed:
        ctx.exit(1)


@command.command("add")
@argument("run", metavar="RUN")
@option("--name", metavar="NAME", help="Name of the model; the default is <architecture>.<method>_<teacher>_<data>.")
@option("--title", metavar="TEXT", help="One line on what it is.")
@option("--zoo", metavar="DIR", help="Folder of cards to write into; the default is the checkout's zoo/.")
@option("--licence", metavar="ID", help="Licence that you give the weights, such as apache-2.0.")
@option("--licence-note", metavar="TEXT", help="What a user has to know of it.")
@option("--good-for", multiple=True, metavar="TEXT", help="What the model is good for; may be repeated.")
@option("--bad-for", multiple=True, metavar="TEXT", help="What it is bad for; may be repeated.")
@option("--note", "notes", multiple=True, metavar="TEXT", help="What else a user has to know; may be repeated.")
@option(
    "--form",
    "forms",
    multiple=True,
    metavar="NAME[,...]",
    help="Forms to take: weights, onnx, int8, int8-tensorrt; by default all that the run has.",
)
@_options.data
@option("--measure/--no-measure", default=True, help="Measure every form on the validation split. Default: measure.")
@option("--time", is_flag=True, help="Time every form on this machine: one image, one thread.")
@_options.overwrite
@_options.as_json
def add(run: str, forms: tuple[str, ...], as_json: bool, **request: Any) -> None:
    """Make a card of a finished RUN and copy its files beside the cards, ready to be looked at and proposed."""
    from visionkd import workflows

    given = {name: value for name, value in request.items() if value not in (None, ())}
    with console.working(stdout_is_data=as_json) as listener:
        added = workflows.add_zoo(run=run, forms=comma_list(forms) or (), listener=listener, **given)
    if as_json:
        console.write_json(added)
        return
    console.show_fields({"card": added.card, "model": f"zoo:{added.name}", "size_mb": added.size_mb})
    for text in added.to_do:
        console.note(f"to do: {text}")
    console.note(f"Check it with: visionkd zoo verify {added.name}")


@command.command("push")
@argument("name", metavar="NAME")
@argument("target", metavar="TARGET")
@option("--private", is_flag=True, help="Make a new hub repository a private one.")
@_options.overwrite
@_options.as_json
def push(name: str, target: str, private: bool, overwrite: bool, as_json: bool) -> None:
    """Publish a model of your own with its card: TARGET is a folder, or hub:OWNER/NAME.

    A folder becomes one that VISIONKD_ZOO may name. A hub repository needs a login ('hf auth login'); the model's card
    then names the files at the new revision as a further source.
    """
    from visionkd import workflows

    with console.working(stdout_is_data=as_json) as listener:
        pushed = workflows.push_zoo(name=name, target=target, private=private, overwrite=overwrite, listener=listener)
    if as_json:
        console.write_json(pushed)
    else:
        console.show_fields(pushed)


@command.command("prune")
@option("--max-mb", type=_options.AboveZero(), metavar="X", help="What may stay, in 10^6 bytes.")
@option("--all", "every", is_flag=True, help="Empty the cache, also of what was asked for a moment ago.")
@_options.as_json
def prune(max_mb: float | None, every: bool, as_json: bool) -> None:
    """Remove pulled models from the cache, the longest unused first, until it is within its limit.

    The limit is 20 GB, or VISIONKD_ZOO_CACHE_GB. What was asked for within the last hour is let be, but with --all.
    """
    from visionkd import workflows

    removed = [
        {"model": entry.model or "part of a file", "form": entry.artifact, "size_mb": entry.size_bytes / 1e6}
        for entry in workflows.prune_zoo(max_mb=max_mb, every=every)
    ]
    if as_json:
        console.write_json({"removed": removed})
    elif removed:
        console.show_table(removed)
    else:
        console.note("nothing was removed")
