"""The ``visionkd`` command. Its commands are the other files of this folder, each imported only when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from visionkd import __version__
from visionkd.cli._base import LazyGroup, debug_option


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="visionkd", message="%(prog)s %(version)s")
def cli() -> None:
    """Compress vision models by distillation, and prove that it worked.

    \b
    Start here:
      visionkd distill --teacher vit_l --student resnet50 --data path/to/images
      visionkd doctor

    The exit code is 0 when the work is done, 1 when it failed, 2 when the request was wrong, and 130 when it was
    interrupted.
    """


cli.params.append(debug_option())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no exception but ``SystemExit`` leaves it.

    Args:
        argv: Arguments after the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    state: dict[str, Any] = {"debug": False}
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a class name must not break an ASCII terminal
    try:
        code = cli.main(args=arguments, prog_name="visionkd", standalone_mode=False, obj=state)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _quiet_pipe()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        from visionkd.cli._failures import report

        return report(error, debug=state["debug"], argv=arguments)


def _quiet_pipe() -> int:
    """The reader of our output has gone, as with ``| head``: nothing more can be said, and nothing is wrong."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())  # or the interpreter complains when it flushes at exit
    os.close(null)
    return 1
