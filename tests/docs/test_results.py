"""docs/results.md is what tools/render_results makes of zoo/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "render_results"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
