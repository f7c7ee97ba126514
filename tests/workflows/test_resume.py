"""Kill a run at several moments: resumed, it ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--student cifar_resnet8 --no-pretrained --epochs 3 --batch-size 16"
    " -o student.img_size=32 -o data.shapes.num_train=256 -o data.shapes.num_val=32 -o data.workers=1"
    " -o training.ema_decay=0.9 -o augment.mixup_alpha=0.2 -o training.checkpoint_every_s=0 -o report.enabled=false"
).split()


def start(out: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "visionkd", "distill", "--out", str(out), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(process: subprocess.Popen, condition) -> bool:
    """Wait until the condition holds; False if the process ended before."""
    end = time.monotonic() + 120
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "the moment to kill at never came"
        time.sleep(0.01)
    return False


def status(out: Path) -> dict:
    try:
        return json.loads((out / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def position(out: Path) -> tuple[int, int]:
    file = out / "checkpoints" / "last.ckpt"
    return tuple(torch.load(file, weights_only=True)["position"]) if file.is_file() else (0, 0)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(teacher_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("resume") / "whole"
    process = start(out, "--teacher", str(teacher_run), *SETTINGS)
    assert process.wait() == 0, process.stderr.read()
    return out


def test_killed_again_and_again(uninterrupted, teacher_run, tmp_path):
    out = tmp_path / "killed"
    moments = [
        lambda: position(out) >= (0, 3),  # in the middle of an epoch
        lambda: position(out) >= (0, 9),  # once more in the same epoch
        lambda: status(out).get("epoch") == 2,  # at the beginning of the last one
        lambda: status(out).get("stage") in ("package", "compare"),  # after the training
    ]
    process = start(out, "--teacher", str(teacher_run), *SETTINGS)
    killed_at = []
    for moment in moments:
        if not wait_until(process, moment):
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(position(out))
        process = start(out, "--resume")
    assert process.wait() == 0, process.stderr.read()
    assert len(killed_at) >= 3 and killed_at[0][0] == 0 and killed_at[0][1] > 0
    expected, found = weights(uninterrupted), weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [line.split(",")[:3] for line in (out / "metrics.csv").read_text().splitlines()]
    assert rows == [line.split(",")[:3] for line in (uninterrupted / "metrics.csv").read_text().splitlines()]


def test_interrupt_writes_a_checkpoint_and_exits_130(uninterrupted, teacher_run, tmp_path):
    out = tmp_path / "interrupted"
    process = start(out, "--teacher", str(teacher_run), *SETTINGS)
    assert wait_until(process, lambda: position(out) >= (0, 2))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors and "Traceback" not in errors
    assert status(out)["state"] == "interrupted" and status(out)["exit_code"] == 130
    process = start(out, "--resume")
    assert process.wait() == 0, process.stderr.read()
    expected, found = weights(uninterrupted), weights(out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_runs_in_one_folder(teacher_run, tmp_path):
    out = tmp_path / "shared"
    first = start(out, "--teacher", str(teacher_run), *SETTINGS, "--epochs", "1000")
    try:
        assert wait_until(first, lambda: status(out).get("state") == "running")
        second = start(out, "--resume")
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 2 and "Another process" in errors, errors
    finally:
        first.kill()
        first.wait()


def test_damaged_checkpoint_is_refused_in_one_line(teacher_run, tmp_path):
    out = tmp_path / "damaged"
    process = start(out, "--teacher", str(teacher_run), *SETTINGS)
    assert wait_until(process, lambda: position(out) >= (0, 2))
    process.kill()
    process.wait()
    file = out / "checkpoints" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    process = start(out, "--resume")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot be read" in errors and "Traceback" not in errors


def test_killed_between_package_and_comparison(teacher_run, tmp_path):
    import shutil

    out = tmp_path / "packaged"
    shutil.copytree(teacher_run, out)
    (out / "comparison.json").unlink()
    state = status(out)
    state["stages"] = {name: done for name, done in state["stages"].items() if name in ("train", "package")}
    (out / "status.json").write_text(json.dumps(state | {"state": "running"}))
    from visionkd import workflows

    result = workflows.train(out=str(out), resume=True)
    assert [row.values["role"] for row in result.table] == ["model"] and (out / "comparison.json").is_file()
