"""Write a run's report: one self-contained HTML file.

\b
Example:
  visionkd report runs/student --baseline runs/alone
"""

from __future__ import annotations

from typing import Any

from visionkd.cli import _options, console
from visionkd.cli._base import argument, new_command, option


@new_command(__doc__)
@argument("run", metavar="RUN")
@option("--baseline", metavar="RUN", help="Run of the same student trained alone, to compare with.")
@option("--out", metavar="FILE", help="File to write; the default is the run's report.html.")
@_options.overwrite
def command(**request: Any) -> None:
    from visionkd import workflows

    with console.working() as listener:
        result = workflows.report(**request, listener=listener)
    console.show_fields(result)
