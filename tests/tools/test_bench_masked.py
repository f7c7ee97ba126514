"""The masked part of tools/bench_training on the smallest networks. No time is tested."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def masked(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import _bench.masked as module

    yield module
    for name in [name for name in sys.modules if name.startswith("_bench")]:
        del sys.modules[name]


def test_steps_see_the_tokens_they_should_and_keep_less(masked):
    from _bench.setting import Pair, Setting

    pair = Pair("tiny", "vit_tiny_patch16_224", "vit_tiny_patch16_224", 112, 1, 0, 1)
    results = masked.measure_masked(pair, Setting(), rounds=1, steps=1, warmup=0, progress=lambda done, total: None)
    assert [(row.name, row.tokens) for row in results] == [("whole", 50), ("0.75", 13), ("0.95", 3)]
    assert results[0].ratio == 1.0 and all(row.step_ms > 0 for row in results)
    assert results[0].kept_mb > results[1].kept_mb > results[2].kept_mb > 0


def test_a_step_above_its_share_is_told(masked):
    rows = [{"name": "0.75", "ratio": 0.36}, {"name": "0.95", "ratio": 0.19}]
    assert len(masked.problems(rows)) == 1 and "75 %" in masked.problems(rows)[0]
