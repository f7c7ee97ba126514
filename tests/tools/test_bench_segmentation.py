"""The segmentation part of tools/bench_training on small images. No time is tested."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def segmentation(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import _bench.segmentation as module

    monkeypatch.setattr(module, "IMG_SIZE", (32, 64))
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    monkeypatch.setattr(module, "_peak_mb", lambda which, setting: 1.0)  # a process of its own, with the real sizes
    yield module
    for name in [name for name in sys.modules if name.startswith("_bench")]:
        del sys.modules[name]


def test_the_loop_is_torchvisions_and_all_parts_are_timed(segmentation):
    from _bench.setting import Setting

    material = segmentation.Material(Setting(), lad=False)
    assert material.teacher.in_chans == 4 and material.student.in_chans == 3
    module = material.module(material.config(), steps=1).train()
    batch = module.on_after_batch_transfer(module.on_before_batch_transfer(material.batch(), 0), 0)
    ours = module.training_step(batch, 0)
    assert segmentation.plain(material)().item() == pytest.approx(ours.item(), rel=1e-4)
    result = segmentation.measure_segmentation(
        Setting(), rounds=1, steps=1, warmup=1, progress=lambda done, total: None
    )
    assert set(result.parts_ms) == {"bare", "teacher", "distance"}
    assert min(result.plain_ms, result.step_ms, result.lad_ms, *result.parts_ms.values()) > 0
    assert 0 < result.metrics_share < 1


def test_what_is_above_its_limit_is_told(segmentation):
    fine = segmentation.SegmentationResult(
        1.0, 1.02, (1.02, 1.0, 1.04), 1.0, {}, (1.0, 0.9, 1.1), 0.01, plain_mb=1.0, step_mb=1.0
    )
    assert fine.problems() == []
    slow = dataclasses.replace(fine, ratio=(1.04, 1.0, 1.1), lad_ratio=(1.05, 1.0, 1.1), metrics_share=0.03)
    found = slow.problems()
    assert len(found) == 3 and "1.040 times the plain loop's" in found[0] and "0.030 of an epoch" in found[2]
