"""A run with the method ``quantized``: resumed to the bit, and a package that every command takes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workflows.conftest import TINY
from visionkd import workflows
from visionkd.errors import InterruptedRunError, RequestError
from visionkd.methods.quantized import Quantized


def distil(run: Path, out: Path, *options: str, **more):
    given = {"epochs": 3, "batch_size": 16, "lr": 0.01} if not more.get("resume") else {}
    shared = (*TINY, "report.enabled=false", "optimizer.name=sgd", "options.bits=2", "options.bucket_size=64")
    settings = {} if more.get("resume") else {"options": (*shared, *options), "method": "quantized"}
    networks = {} if more.get("resume") else {"teacher": str(run), "student": str(run)}
    return workflows.distill(**networks, **settings, out=str(out), **given, **more)


def test_a_run_stopped_while_it_learns_levels_resumes_to_the_same_bits(teacher_run, tmp_path, monkeypatch):
    options = ("options.mode=alternating", "options.points_lr_ratio=0.1", "training.ema_decay=0.8")
    distil(teacher_run, tmp_path / "whole", *options)
    calls, original = [], Quantized.training_step

    def stopping(self, batch, batch_idx):
        calls.append(self.current_epoch)
        if len(calls) == 11:  # the third step on the levels, whose gradients are still being measured
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Quantized, "training_step", stopping)
        with pytest.raises(InterruptedRunError):
            distil(teacher_run, tmp_path / "stopped", *options)
    assert calls[-1] == 1
    distil(teacher_run, tmp_path / "stopped", resume=True)
    whole, stopped = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[name], stopped[name]) for name in whole)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "stopped")]
    place = rows[0][0].split(",").index("levels_changed")
    changed = [[line.split(",")[place] for line in lines[1:] if line.split(",")[place]] for lines in rows]
    assert changed[0] == changed[1] and len(changed[0]) == 3


def test_every_command_takes_the_package(teacher_run, tmp_path):
    out = tmp_path / "run"
    result = distil(teacher_run, out, "options.post_training=true", export="onnx")
    assert not (out / "checkpoints" / "last.ckpt").exists()
    card = json.loads((out / "model" / "model.json").read_text())
    assert card["quantization"]["kind"] == "packed" and card["metrics"]["huffman_bits"] <= 2.0
    assert card["metrics"]["huffman_mb"] == card["quantization"]["huffman"]["size_mb"]
    student, teacher = result.table
    assert student.values["size_mb"] < teacher.values["size_mb"] / 6
    evaluated = workflows.evaluate(model=str(out), data="shapes", options=())
    assert evaluated.metrics["top1"] == pytest.approx(card["metrics"]["top1"], abs=1e-4)
    assert (out / "export" / "model.onnx").is_file()


def test_what_cannot_be_is_refused_before_anything_is_trained(teacher_run, tmp_path):
    with pytest.raises(RequestError, match="options.bits"):
        distil(teacher_run, tmp_path / "a", "options.bits=9")
    with pytest.raises(RequestError, match="training.compile"):
        distil(teacher_run, tmp_path / "b", "training.compile=true")
    assert not (tmp_path / "b").exists()
