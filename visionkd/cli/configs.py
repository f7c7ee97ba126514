"""List, show and copy complete recipes.

\b
Examples:
  visionkd configs list
  visionkd configs copy NAME my_recipe.yaml
  visionkd distill --config my_recipe.yaml
"""

from __future__ import annotations

import re

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_group


@new_group(__doc__)
def command() -> None:
    pass


@command.command("list", help="List the recipes with a line on each.")
def list_() -> None:
    from visionkd import workflows

    console.show_table(workflows.list_configs())


@command.command("show", help="Print the recipe NAME.")
@argument("name", metavar="NAME")
def show(name: str) -> None:
    from visionkd import workflows

    console.write(workflows.show_config(name).rstrip("\n"))


@command.command("copy", help="Copy the recipe NAME to FILE, to be edited.")
@argument("name", metavar="NAME")
@argument("file", metavar="FILE")
@_options.overwrite
def copy(name: str, file: str, overwrite: bool) -> None:
    from visionkd import workflows

    written = workflows.copy_config(name, file, overwrite=overwrite)
    console.write(f"Wrote {written}")
    name = (
        "distill" if re.search(r"^(teachers|student):", written.read_text(encoding="utf-8"), re.MULTILINE) else "train"
    )
    console.note(f"Run it with: visionkd {name} --config {written}")
