"""Running the command line inside the test process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from visionkd import workflows
from visionkd.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that runs ``visionkd`` with the given arguments."""
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def call(*argv: str) -> Outcome:
        capsys.readouterr()
        code = main(list(argv))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Return a function that replaces a workflow; the true one is not even imported."""

    def replace(name: str, function: Any) -> None:
        monkeypatch.setitem(vars(workflows), name, function)

    return replace
