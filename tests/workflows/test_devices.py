"""Two processes train the same model as one process with twice the batch, and fill one label store together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workflows.dense import TINY, write_scenes

ROOT = Path(__file__).resolve().parents[2]
# a transformer: batch norm would see half the batch in each process
SETTINGS = (
    "train --model test_vit --no-pretrained -o model.img_size=32 --epochs 2 --batch-size 16 --accelerator cpu"
    " -o data.shapes.num_train=64 -o data.shapes.num_val=32 -o data.workers=0 -o report.enabled=false"
    " -o training.log_every=2 -o training.clip_grad_norm=1.0"
).split()


def run(out: Path, *arguments: str) -> tuple[dict[str, torch.Tensor], str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "visionkd", *arguments, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return load_file(out / "model" / "model.safetensors"), done.stderr


def train(out: Path, *arguments: str) -> dict[str, torch.Tensor]:
    return run(out, *SETTINGS, *arguments)[0]


def test_two_processes_equal_one(tmp_path):
    one, two = train(tmp_path / "one"), train(tmp_path / "two", "--devices", "2")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)
    accumulated = train(tmp_path / "accumulated", "-o", "training.accumulate=2")
    for name, value in one.items():
        torch.testing.assert_close(value, accumulated[name], rtol=1e-3, atol=1e-4)
    start = train(tmp_path / "start", "--lr", "1e-30", "-o", "optimizer.weight_decay=0")
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one), "the training moved nothing"


def test_two_processes_fill_one_label_store(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    settings = (
        "distill --teacher cifar_resnet8 --student test_vit -o student.img_size=32 --method kd --no-pretrained"
        " --epochs 3 --batch-size 16 --accelerator cpu -o data.shapes.num_train=72 -o data.shapes.num_val=32"
        " -o data.workers=0 -o fit_teacher.max_images=32 -o report.enabled=false -o label_store.views=1 --cache-teacher"
    ).split()
    first, _ = run(tmp_path / "first", *settings, "--devices", "2")
    again, said = run(tmp_path / "again", *settings, "--devices", "2")
    assert "do not run at all" in said  # what the batches left out was filled too
    for name, value in first.items():
        torch.testing.assert_close(value, again[name], rtol=1e-3, atol=1e-4)
    one, _ = run(tmp_path / "one", *settings)
    for name, value in one.items():
        torch.testing.assert_close(value, again[name], rtol=1e-3, atol=1e-4)


def test_two_processes_on_maps(tmp_path, monkeypatch):
    """Their counts of pixels are those of the whole split, once each, and LAD's two trainings run on both."""
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    scenes = write_scenes(tmp_path / "scenes")
    options = [part for option in (*TINY, "report.enabled=false", "student.img_size=64") for part in ("-o", option)]
    shared = [
        "--student", "fpn_cifar_resnet8", "--no-pretrained", "--data", str(scenes), "--epochs", "8",
        "--accelerator", "cpu", "--devices", "2", *options,
    ]  # fmt: skip
    _, said = run(tmp_path / "lad", "distill", "--method", "lad", *shared)
    assert "7 validation images" in said
    trained = json.loads((tmp_path / "lad" / "status.json").read_text())["metrics"]
    (alone,) = json.loads((tmp_path / "lad" / "comparison.json").read_text())["rows"]  # measured by one process
    assert alone["miou"] > 35, "it answers with one class, which any wrong count would give too"
    for name in ("miou", "pixel_acc"):
        assert trained[f"val/{name}"] == pytest.approx(alone[name], abs=1e-3)
    teacher = (tmp_path / "lad" / "metrics.teacher.csv").read_text()
    assert "miou_other_label" in teacher
