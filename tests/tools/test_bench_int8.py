"""tools/bench_int8 on a network small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_int8"


@pytest.mark.slow
def test_the_contenders_stand_side_by_side(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--model", "cifar_resnet8", "--random", "--rounds", "1", "--json"]
    done = subprocess.run([*command, "--work", str(tmp_path)], capture_output=True, text=True, check=True)
    rows = {row["variant"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ["float", "int8 cpu", "int8 tensorrt", "onnxruntime static"]
    assert rows["float"]["speedup"] == 1.0 and all(row["latency_ms"] > 0 for row in rows.values())
    assert rows["int8 cpu"]["size_mb"] < 0.5 * rows["float"]["size_mb"]
    assert len(list(tmp_path.glob("*.onnx"))) == 4


def test_it_asks_for_photographs() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2 and "--data is needed, or --random" in done.stderr
