"""Progress on a terminal and elsewhere, tables, and standard output that holds nothing but JSON."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from visionkd.cli import console
from visionkd.cli._format import aligned, duration, jsonable, metric_text, table_cells, value_text
from visionkd.cli._progress import LiveListener, Pace, PlainListener, share
from visionkd.types import MetricRow, Progress


class Clock:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_few() -> None:
    clock, stream = Clock(), io.StringIO()
    listener = PlainListener(stream, clock)
    listener.stage("distill", "Distil b from a", 2, 4)
    for step in range(1, 101):
        clock.now += 0.5
        listener.progress(Progress("distill", step, 100, 1, 3, images_per_s=1234.5, metrics={"train/loss": 1.25}))
    listener.epoch_end(Progress("distill", 100, 100, 1, 3, metrics={"val/top1": 55.1}))
    listener.message("one image is unreadable", level="warning")
    lines = [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]
    assert lines[0] == "[2/4] Distil b from a"
    assert lines[-1] == "warning: one image is unreadable"
    assert lines[-2].startswith("[2/4] distill: epoch 1/3") and "val/top1 55.10" in lines[-2]
    within = lines[1:-2]
    assert len(within) == 5, "fifty seconds, one line every ten"
    assert within[0].startswith("[2/4] distill: epoch 1/3, step 20/100, 1,234 img/s")
    assert "train/loss 1.25" in within[0] and "left" in within[0]


def test_a_stage_without_epochs() -> None:
    clock, stream = Clock(), io.StringIO()
    listener = PlainListener(stream, clock)
    clock.now += 11.0
    listener.progress(Progress("evaluate", 5, 0))
    assert "evaluate: step 5" in stream.getvalue() and "epoch" not in stream.getvalue()


def test_time_left_is_guessed_from_what_is_done_since_the_start() -> None:
    clock = Clock()
    pace = Pace(clock)
    resumed = Progress("train", 0, 10, epoch=6, epochs=10)
    assert share(resumed) == 0.5
    assert pace.eta_s(resumed) is None
    clock.now += 10.0
    assert pace.eta_s(Progress("train", 0, 10, epoch=7, epochs=10)) == pytest.approx(40.0)
    assert pace.eta_s(Progress("train", 0, 10, epoch=7, epochs=10, eta_s=7.0)) == 7.0


def test_live_progress_is_drawn_and_cleared() -> None:
    clock, stream = Clock(), io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with LiveListener(terminal, clock) as listener:
        listener.stage("distill", "Distil [b] from a", 2, 4)
        listener.progress(
            Progress("distill", 5, 10, 2, 4, images_per_s=812.0, eta_s=3725.0, metrics={"train/loss": 0.5})
        )
        drawn = stream.getvalue()
        listener.progress(Progress("distill", 6, 10, 2, 4))
        assert stream.getvalue() == drawn, "redrawn at most ten times a second"
        listener.message("[bold]no markup[/bold]")
        listener.epoch_end(Progress("distill", 10, 10, 2, 4, metrics={"val/top1": 55.1}))
    expected = (
        "[2/4] Distil [b] from a",
        "stage 2/4, epoch 2/4",
        "38 %",
        "812 img/s",
        "1:02:05 left",
        "train/loss 0.5",
    )
    for text in expected:
        assert text in drawn
    assert "[bold]no markup[/bold]" in stream.getvalue()
    assert stream.getvalue().count("val/top1 55.10") == 1
    assert "\x1b[?25h" in stream.getvalue(), "the cursor is back"


def test_the_terminal_is_restored_when_the_work_fails() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), LiveListener(Console(file=stream, force_terminal=True)) as listener:
        listener.progress(Progress("train", 1, 2))
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith(("\x1b[?25h", "\x1b[2K", "\x1b[1A\x1b[2K"))


def test_the_listener_goes_by_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with console.working() as listener:
        assert isinstance(listener, PlainListener)
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    with console.working() as listener:
        assert isinstance(listener, LiveListener)


def test_a_dumb_terminal_is_not_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert console.is_terminal(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not console.is_terminal(Terminal())


def test_warnings_are_single_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.working():
        warnings.warn("something\n   odd", UserWarning, stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.rstrip().endswith("warning: something odd")


def test_standard_output_is_clean_even_of_child_processes() -> None:
    code = """
import os, subprocess, sys
from visionkd import workflows
from visionkd.cli.main import main
from visionkd.workflows.results import BenchResult
def bench(**_):
    print("python"); os.write(1, b"descriptor\\n"); subprocess.run(["echo", "child"])
    return BenchResult(())
workflows.bench = bench
sys.exit(main(["bench", "m", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"rows": []}
    for noise in ("python", "descriptor", "child"):
        assert noise in done.stderr


def test_numbers() -> None:
    assert duration(3725.4) == "1:02:05" and duration(65) == "1:05" and duration(float("inf")) == "0:00"
    assert metric_text("val/top1", 55.104) == "val/top1 55.10"
    assert metric_text("train/loss", 1.23456) == "train/loss 1.235"
    assert value_text("throughput_img_s", 1234.5) == "1,234"
    assert value_text("latency_ms", 1.0) == "1.00"
    assert value_text("x", None) == "-" and value_text("x", True) == "yes" and value_text("x", float("nan")) == "nan"
    assert value_text("x", 1e-7) == "1e-07"


def test_tables_align_numbers_right_and_drop_what_nobody_has() -> None:
    rows = [MetricRow("a", {"top1": 5.0, "note": None}), MetricRow("longer", {"top1": 55.0, "extra": "x"})]
    assert aligned(*table_cells(rows)).splitlines() == [
        "model    top1  extra",
        "a        5.00  -",
        "longer  55.00  x",
    ]


def test_json_of_anything() -> None:
    import numpy as np

    values = {"path": Path("a/b"), "array": np.arange(3), "number": np.float32(0.5), 3: {1, 2}, "inf": float("inf")}
    assert jsonable(values) == {"path": "a/b", "array": [0, 1, 2], "number": 0.5, "3": [1, 2], "inf": None}
