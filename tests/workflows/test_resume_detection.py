"""Kill a training on boxes: resumed, it ends with the same weights, bit for bit; two processes measure as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.workflows.boxes import NETWORK, TINY, network, write_boxes
from tests.workflows.test_resume import ROOT, position, wait_until, weights
from visionkd.cli.main import main

OPTIONS = (
    *TINY,
    *network(),
    "training.ema_decay=0.9",
    "training.checkpoint_every_s=0",
    "augment.color_jitter=0.3",
    "detection.iou_crop=0.5",
    "detection.scale=[0.7,1.4]",
    "report.enabled=false",
)


def arguments(scenes, architecture: str) -> tuple[str, ...]:
    request = ("--model", architecture, "--no-pretrained", "--data", str(scenes), "--epochs", "3")
    return request + tuple(text for option in OPTIONS for text in ("-o", option))


def start(out, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "visionkd", "train", "--out", str(out), *more],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path):
    scenes, whole, killed = write_boxes(tmp_path / "scenes"), tmp_path / "whole", tmp_path / "killed"
    request = arguments(scenes, NETWORK)
    process = start(killed, *request)
    assert wait_until(process, lambda: position(killed) >= (1, 1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert position(killed) < (3, 0), "it was killed before its end"
    process = start(killed, "--resume")
    assert process.wait() == 0, process.stderr.read()
    assert main(["train", "--out", str(whole), *request]) == 0
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [line.split(",")[:3] for line in (killed / "metrics.csv").read_text().splitlines()]
    assert rows == [line.split(",")[:3] for line in (whole / "metrics.csv").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_validate_all_images(tmp_path):
    scenes, out = write_boxes(tmp_path / "scenes", val=5), tmp_path / "two"
    process = start(out, *arguments(scenes, NETWORK), "--devices", "2", "--accelerator", "cpu")
    assert process.wait() == 0, process.stderr.read()
    header, *rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    last = dict(zip(header, rows[-1], strict=True))
    card = json.loads((out / "model" / "model.json").read_text())
    # one process measured the package afterwards, on all images
    assert float(last["ap"]) == pytest.approx(card["metrics"]["ap"], abs=1e-3)
