"""tools/bench_detection on the smallest detectors: the shape of what it tells. No time is tested."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"
TINY = ("--size", "48", "64", "--batch", "2", "--arg", "channels=8", "--rounds", "1", "--steps", "1", "--warmup", "1",
        "--threads", "1")  # fmt: skip
Run = Callable[..., int]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The tool as a module: this process has imported torch already."""
    threads, paths = torch.get_num_threads(), list(sys.path)
    loader = SourceFileLoader("bench_detection", str(TOOLS / "bench_detection"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("bench_detection", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside a tool without a suffix
    loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    sys.path[:] = paths


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the tool and returns its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_detection", *arguments])
        return tool.main()

    return call


def test_all_contenders_compute_the_same_loss(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert run("--model", "fcos_test_resnet", "--arg", "head_convs=1", *TINY, "--json", str(file)) == 0
    assert "torchvision's loop" in capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["model"] == "fcos_test_resnet" and found["img_size"] == [48, 64] and found["threads"] == 1
    rows = {row["name"]: row for row in found["contenders"]}
    assert set(rows) == {"naive", "reference_channels_last", "visionkd"}
    losses = [rows[name]["first_loss"] for name in ("naive", "reference_channels_last")]
    assert losses[0] > 0 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert found["ratio"] == rows["visionkd"]["to_reference"]["median"] and rows["naive"]["to_reference"]["median"] == 1


def test_unequal_work_is_not_compared(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from _bench.detection import DetectorMaterial, Shape, check_loss
    from _bench.setting import Setting

    from visionkd.errors import WorkError

    material = DetectorMaterial(Shape("fcos_test_resnet", (48, 64), 2, {"channels": 8, "head_convs": 1}), Setting())
    check_loss(material)
    other = material.reference
    monkeypatch.setattr(material, "reference", lambda memory_format: lambda: 1.01 * other(memory_format)())
    with pytest.raises(WorkError, match="another loss than torchvision's loop"):
        check_loss(material)


def test_a_slow_step_fails_where_it_is_checked(
    run: Run, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "LIMIT", 0.0)
    assert run("--model", "fasterrcnn_test_resnet", "--arg", "head_dim=16", *TINY, "--check") == 1
    assert "times torchvision's loop" in capsys.readouterr().err


def test_oadp_is_timed_beside_the_same_detector_on_boxes_alone(
    run: Run, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, few = tmp_path / "bench.json", []
    for option in ("head_convs=0", "head_dim=16", "rois=8", "proposals_per_image=3"):
        few += ["--option", option]
    given = ("--oadp", "--model", "fasterrcnn_test_resnet", "--arg", "head_dim=16", *few, *TINY)
    assert run(*given, "--json", str(file)) == 0
    assert "boxes alone" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["contenders"]}
    assert set(rows) == {"naive", "visionkd"} and rows["visionkd"]["step_ms"] > 0
    monkeypatch.setattr(tool, "OADP_LIMIT", 0.0)
    assert run(*given, "--check") == 1
    assert "visionkd distill, oadp takes" in capsys.readouterr().err
    assert run("--oadp", "--option", "rois") == 2 and "--option: 'rois' is no KEY=NUMBER" in capsys.readouterr().err


def test_what_is_no_detector_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "cifar_resnet8", "--size", "32", "32", "--rounds", "1") == 2
    assert "'cifar_resnet8' is no detector" in capsys.readouterr().err
    assert run("--arg", "channels") == 2 and "is no KEY=NUMBER" in capsys.readouterr().err
