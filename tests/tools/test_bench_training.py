"""tools/bench_training on the smallest networks: the shape of what it tells. No time is tested."""

from __future__ import annotations

import importlib
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
PAIR = "cifar_resnet14:cifar_resnet8:32:4"
TINY = ("--rounds", "1", "--steps", "1", "--warmup", "1", "--threads", "1")
Run = Callable[..., int]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The tool as a module: this process has imported torch already."""
    threads, paths = torch.get_num_threads(), list(sys.path)
    loader = SourceFileLoader("bench_training", str(TOOLS / "bench_training"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("bench_training", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside a tool without a suffix
    loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    sys.path[:] = paths


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the tool and returns its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_training", *arguments])
        return tool.main()

    return call


def test_a_pair_of_tiny_networks(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert run("--pair", PAIR, *TINY, "--json", str(file)) == 0
    said = capsys.readouterr().out
    assert "naive PyTorch loop" in said
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["threads"] == 1 and found["precision"] == "32" and found["memory_format"] == "channels_last"
    assert {"torch", "timm", "lightning", "visionkd"} <= found["versions"].keys()
    (pair,) = found["pairs"]
    shape = (pair["teacher"], pair["student"], pair["img_size"], pair["batch_size"])
    assert ":".join(str(value) for value in shape) == PAIR
    rows = {row["name"]: row for row in pair["contenders"]}
    assert {"bare", "outputs_at_hand", "naive", "visionkd", "visionkd_loop", "timm"} <= rows.keys()
    assert len(rows) + len(pair["not_installed"]) == 8
    for package in pair["not_installed"]:
        assert f"not installed (pip install {package})" in said
    for row in rows.values():
        assert row["step_ms"] > 0 and row["to_bare"]["median"] > 0 and len(row["rounds_step_ms"]) == 1
    assert rows["bare"]["to_bare"]["median"] == rows["naive"]["to_naive"]["median"] == 1.0
    assert pair["online_to_naive"] == pytest.approx(rows["visionkd"]["step_ms"] / rows["naive"]["step_ms"])
    # the same work: all that distil start from the same loss, the bare student from another
    losses = [row["first_loss"] for name, row in rows.items() if name != "bare" and row["first_loss"] is not None]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)
    assert rows["bare"]["first_loss"] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(("limit", "code"), [(1e9, 0), (0.0, 1)])
def test_check_decides_the_exit_code(
    tool: ModuleType,
    run: Run,
    limit: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tool, "LIMIT", limit)
    assert run("--pair", PAIR, *TINY, "--only", "visionkd", "--precision", "bf16", "--check", "--json", "-") == code
    told = capsys.readouterr()
    assert [row["name"] for row in json.loads(told.out)["pairs"][0]["contenders"]] == ["bare", "naive", "visionkd"]
    assert ("times the naive loop's" in told.err) == bool(code)


def test_unequal_work_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # the weight in the naive loop, not the one that visionkd is given
    monkeypatch.setattr(importlib.import_module("_bench.contenders"), "TASK_WEIGHT", 0.5)
    assert run("--pair", PAIR, *TINY, "--only", "visionkd_loop") == 1
    assert "'visionkd_loop' computes another loss" in capsys.readouterr().err


def test_the_data_pipeline(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = importlib.import_module("_bench.pipeline")
    case = pipeline.Case(32, (40, 36), "none", "cifar_resnet8", batch_size=8, batches=2)
    monkeypatch.setattr(pipeline, "CASES", (case,))
    assert run("--data-pipeline", "--rounds", "1", "--workers", "0", "--threads", "1", "--json", "-") == 0
    (row,) = json.loads(capsys.readouterr().out)["data_pipeline"]
    assert row["workers"] == 0 and row["cached"] is False and row["case"]["img_size"] == 32
    assert min(row["pipeline"], row["training"], row["together"]) > 0
    assert row["limit"] == ("data pipeline" if row["pipeline"] < row["training"] else "training")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--pair", "cifer"), "cifar"), (("--pair", PAIR, "--only", "nobody"), "torchdistill")],
)
def test_a_wrong_request_is_answered(
    run: Run, arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert named in capsys.readouterr().err
