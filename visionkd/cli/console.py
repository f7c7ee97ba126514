"""The terminal: results on standard output, everything else on standard error.

Nothing here is needed to print a help text, so rich is imported only where a terminal is to be drawn on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from visionkd.cli._format import aligned, as_mapping, counted, jsonable, table_cells, value_text
from visionkd.cli._progress import LiveListener, PlainListener
from visionkd.types import Listener

_MOST_CLASSES = 20
_MOST_NAMES = 5


def is_main_process() -> bool:
    """Return whether this process speaks for the run: with several devices all others keep silent."""
    names = ("RANK", "LOCAL_RANK") if "LOCAL_RANK" in os.environ else ("RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def is_terminal(stream: Any) -> bool:
    """Return whether ``stream`` is a terminal that can be drawn on."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "") != "dumb"
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False


def write(text: str = "") -> None:
    """Print a result."""
    if is_main_process():
        print(text, flush=True)


def note(text: str) -> None:
    """Print a remark that is no result."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning."""
    note(f"warning: {text}")


@contextlib.contextmanager
def working(*, stdout_is_data: bool = False) -> Iterator[Listener]:
    """Give the listener for a workflow and clean up the terminal after it.

    Args:
        stdout_is_data: Send all that anything prints meanwhile to standard error, so that standard output stays clean.
    """
    if not is_main_process():
        yield Listener()
        return
    with _stdout_to_stderr() if stdout_is_data else contextlib.nullcontext(), _listener() as listener:
        with _short_warnings(listener):
            yield listener


def _listener() -> LiveListener | PlainListener:
    if not is_terminal(sys.stderr):
        return PlainListener()
    from rich.console import Console

    return LiveListener(Console(stderr=True))


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect Python's standard output and the file descriptor, which C code and child processes write to."""
    sys.stdout.flush()
    try:
        descriptor, target = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # replaced by an object without a file, as tests do
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    kept = os.dup(descriptor)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            os.dup2(target, descriptor)
            yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


@contextlib.contextmanager
def _short_warnings(listener: Listener) -> Iterator[None]:
    """Show Python warnings as one line each; those meant for developers stay unseen unless asked for with -W."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        listener.message(" ".join(str(message).split()), level="warning")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        if not sys.warnoptions:
            for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
        yield


def write_json(result: Any) -> None:
    """Print a result for machines: strict JSON, where a value that is not finite is null."""
    write(json.dumps(jsonable(result), indent=2, ensure_ascii=False, allow_nan=False))


def show_table(rows: Iterable[Any]) -> None:
    """Print rows, dataclasses or mappings, side by side; nothing is cut where no terminal limits the width."""
    header, cells, numeric = table_cells(rows)
    if not cells:
        note("nothing to list")
    elif not is_terminal(sys.stdout):
        write(aligned(header, cells, numeric))
    elif is_main_process():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, right in zip(header, numeric, strict=True):
            table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
        for line in cells:
            table.add_row(*map(Text, line))
        Console().print(table)


def show_fields(result: Any) -> None:
    """Print the values of a result that is one thing, a line each."""
    values = {name: value for name, value in as_mapping(result).items() if value is not None}
    _show_pairs(values)


def _show_pairs(values: Mapping[str, Any]) -> None:
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        write(f"{name:<{width}}  {value_text(name, value)}")


def show_run(result: Any) -> None:
    """Print what a run came to: the table of models and the files."""
    if result.table:
        show_table(result.table)
        write()
    _show_pairs({"run": result.run, **result.files})


def show_search(result: Any) -> None:
    """Print what a search came to: the best candidates, the files, and the command for the best one."""
    show_table(result.table)
    write()
    _show_pairs({"run": result.run, **result.files})
    if result.distilled is not None:
        write()
        show_run(result.distilled)
    elif result.command:
        write(f"\nDistil the best one with:\n  {result.command}")


def show_evaluation(result: Any) -> None:
    """Print an evaluation: all metrics, and the classes where the model does worst."""
    write(f"{result.model} on {result.data}, split '{result.split}', {counted(result.num_images, 'image')}")
    _show_pairs(result.metrics)
    worst = sorted(result.per_class.items(), key=lambda item: item[1])
    shown = worst if len(worst) <= _MOST_CLASSES else worst[: _MOST_CLASSES // 2]
    if shown:
        write()
        show_table({"class": name, result.measure: float(value)} for name, value in shown)
    if len(shown) < len(worst):
        note(f"(the {len(shown)} worst of {len(worst)} classes; --json gives all)")
    if result.skipped:
        warn(f"{counted(len(result.skipped), 'image')} could not be read: {_some(result.skipped)}")


def show_predictions(result: Any) -> None:
    """Print each image with its labels, the most probable or the largest first."""
    for prediction in result.predictions:
        pairs = zip(prediction.labels, prediction.probs, strict=True)
        labels = ", ".join(f"{label} {100 * prob:.1f} %" for label, prob in pairs)
        if prediction.boxes is not None:
            labels = _boxes_text(prediction)
        saved = f" -> {prediction.saved}" if prediction.saved else ""
        saved += f", {prediction.saved_map}" if prediction.saved_map else ""
        write(f"{prediction.image}: {labels}{saved}")


def _boxes_text(prediction: Any) -> str:
    if not prediction.boxes:
        return "no boxes"
    rows = zip(prediction.labels, prediction.probs, prediction.boxes, strict=True)
    return "; ".join(f"{label} {score:.2f} at {', '.join(f'{side:.0f}' for side in box)}" for label, score, box in rows)


def show_check(report: Any) -> None:
    """Print what a check of data found: a count of everything it looks for, and the first names of each."""
    for name, value in as_mapping(report).items():
        title = name.replace("_", " ")
        if value is None:
            continue
        if isinstance(value, Mapping):
            write(f"{title}: {', '.join(f'{key} {item:,}' for key, item in value.items())}")
        elif isinstance(value, (list, tuple)):
            write(f"{title}: {len(value):,}")
            for item in value[:_MOST_NAMES]:
                write(f"  {_finding(name, item)}")
            if len(value) > _MOST_NAMES:
                write(f"  and {len(value) - _MOST_NAMES:,} more; --json gives all")
        else:
            write(f"{title}: {value}")
    write("problems found" if report.problems else "no problems found")


def _finding(name: str, item: Any) -> str:
    if isinstance(item, str):
        return item
    if name in ("unreadable", "wrong_maps", "wrong_boxes"):
        return ": ".join(map(str, item))
    if name == "tiny":
        return f"{item[0]}: {item[1]} x {item[2]}"
    return " = ".join(map(str, item))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return ", ".join(listed[:_MOST_NAMES]) + more
