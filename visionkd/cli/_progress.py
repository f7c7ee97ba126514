"""How a workflow's progress is shown, on standard error: live on a terminal, as timestamped lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal

from visionkd.cli._format import duration, metric_text
from visionkd.types import Listener, Progress

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

Level = Literal["info", "warning"]
PLAIN_INTERVAL_S = 10.0
LIVE_INTERVAL_S = 0.1


def numbers(progress: Progress, *, eta_s: float | None) -> list[str]:
    """Return the speed, the time left and the metrics of a report, as far as they are known."""
    parts = []
    if progress.images_per_s:
        speed = progress.images_per_s
        parts.append(f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.2g} img/s")
    if eta_s is not None:
        parts.append(f"{duration(eta_s)} left")
    return parts + [metric_text(name, value) for name, value in metrics(progress).items()]


def metrics(progress: Progress) -> dict[str, float]:
    """Return the metrics of a report; the speed, which has a place of its own, is not among them."""
    return {name: value for name, value in progress.metrics.items() if not name.endswith("images_per_s")}


class Pace:
    """The time left in a stage, where the workflow does not say it: from the share that is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._started = 0.0
        self._first = 0.0

    def eta_s(self, progress: Progress) -> float | None:
        if progress.eta_s is not None:
            return progress.eta_s
        done, now = share(progress), self._clock()
        if progress.stage != self._stage:
            self._stage, self._started, self._first = progress.stage, now, done
        gained = done - self._first
        return (1.0 - done) * (now - self._started) / gained if gained > 0.0 else None


def share(progress: Progress) -> float:
    """Return the share of the stage that is done, in [0, 1]."""
    within = progress.step / progress.steps if progress.steps else 0.0
    whole = (max(progress.epoch, 1) - 1 + within) / progress.epochs if progress.epochs else within
    return min(max(whole, 0.0), 1.0)


class PlainListener(Listener):
    """One line per message, stage and epoch, and within an epoch at most one every ten seconds."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._pace = Pace(clock)
        self._last = clock()
        self._place = ""

    def __enter__(self) -> PlainListener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    def _line(self, text: str) -> None:
        self._last = self._clock()
        # The stream is looked up for each line: a test or a library may replace sys.stderr in between.
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=self._stream or sys.stderr, flush=True)

    def message(self, text: str, *, level: Level = "info") -> None:
        self._line(f"warning: {text}" if level == "warning" else text)

    def stage(self, name: str, title: str, number: int, total: int) -> None:
        self._place = f"[{number}/{total}] "
        self._line(f"{self._place}{title}")

    def progress(self, progress: Progress) -> None:
        eta_s = self._pace.eta_s(progress)
        if self._clock() - self._last >= PLAIN_INTERVAL_S:
            where = f"epoch {progress.epoch}/{progress.epochs}, " if progress.epochs else ""
            step = f"{where}step {progress.step}/{progress.steps}" if progress.steps else f"{where}step {progress.step}"
            self._line(self._place + ", ".join([f"{progress.stage}: {step}", *numbers(progress, eta_s=eta_s)]))

    def epoch_end(self, progress: Progress) -> None:
        parts = numbers(progress, eta_s=self._pace.eta_s(progress))
        self._line(self._place + ", ".join([f"{progress.stage}: epoch {progress.epoch}/{progress.epochs}", *parts]))


class LiveListener(Listener):
    """A live block at the bottom of a terminal, with finished epochs and messages above it.

    It is drawn when a report comes in and never from a thread of its own: data loaders fork this process, and a thread
    that holds the terminal's lock at that moment would leave it locked in the child for ever.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._pace = Pace(clock)
        self._live: Live | None = None
        self._place = ""
        self._drawn = float("-inf")

    def __enter__(self) -> LiveListener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def message(self, text: str, *, level: Level = "info") -> None:
        self._print(f"warning: {text}" if level == "warning" else text, "yellow" if level == "warning" else None)

    def stage(self, name: str, title: str, number: int, total: int) -> None:
        self._clear()
        self._place = f"stage {number}/{total}, "
        self._print(f"[{number}/{total}] {title}", "bold")

    def progress(self, progress: Progress) -> None:
        eta_s = self._pace.eta_s(progress)
        finished = bool(progress.steps) and progress.step >= progress.steps
        if self._clock() - self._drawn < LIVE_INTERVAL_S and not finished:
            return
        self._drawn = self._clock()
        block = self._block(progress, eta_s)
        if self._live is None:
            from rich.live import Live

            self._live = Live(block, console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        else:
            self._live.update(block, refresh=True)

    def epoch_end(self, progress: Progress) -> None:
        parts = numbers(progress, eta_s=self._pace.eta_s(progress))
        width = len(str(progress.epochs))
        self._print("  ".join([f"epoch {progress.epoch:>{width}}/{progress.epochs}", *parts]))

    def _block(self, progress: Progress, eta_s: float | None) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done = share(progress)
        where = f"epoch {progress.epoch}/{progress.epochs}" if progress.epochs else progress.stage
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(self._place + where), ProgressBar(total=1.0, completed=done, width=30), Text(f"{100 * done:3.0f} %")
        )
        speed = numbers(Progress("", 0, 0, images_per_s=progress.images_per_s), eta_s=eta_s)
        lines = [row, Text("  ".join(speed), no_wrap=True, overflow="ellipsis")]
        values = metrics(progress)
        if values:
            text = "  ".join(metric_text(name, value) for name, value in values.items())
            lines.append(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)
