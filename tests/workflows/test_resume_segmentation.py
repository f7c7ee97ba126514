"""Kill a distillation on maps, with its labels cached: resumed, it ends with the same weights, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch

from tests.workflows.dense import TINY, write_scenes
from tests.workflows.test_resume import ROOT, position, wait_until, weights
from visionkd import workflows
from visionkd.cli.main import main

OPTIONS = (
    *TINY,
    "student.img_size=64",
    "training.ema_decay=0.9",
    "training.checkpoint_every_s=0",
    "augment.color_jitter=0.3",
    "label_store.views=2",
    "report.enabled=false",
)


def start(out, *arguments: str, cache) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VISIONKD_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "visionkd", "distill", "--out", str(out), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_again_and_again(tmp_path, monkeypatch):
    scenes, whole, killed = write_scenes(tmp_path / "scenes"), tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    options = ("data.workers=0", "report.enabled=false", "model.img_size=64")
    workflows.train(
        model="fpn_cifar_resnet8", pretrained=False, data=str(scenes), options=options, epochs=1, batch_size=4,
        out=str(tmp_path / "teacher"),
    )  # fmt: skip
    request = ("--teacher", str(tmp_path / "teacher"), "--student", "fpn_cifar_resnet8", "--no-pretrained")
    request += ("--method", "kd", "--data", str(scenes), "--epochs", "3", "--cache-teacher")
    request += tuple(text for option in OPTIONS for text in ("-o", option))
    process = start(killed, *request, cache=tmp_path / "cache")
    moments = [
        lambda: position(killed) >= (0, 2),  # in the middle of the epoch that fills the store
        lambda: position(killed) >= (2, 1),  # in the one that reads it
    ]
    killed_at = []
    for moment in moments:
        if not wait_until(process, moment):
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(position(killed))
        process = start(killed, "--resume", cache=tmp_path / "cache")
    assert process.wait() == 0, process.stderr.read()
    assert len(killed_at) == 2 and killed_at[0][0] == 0 and killed_at[1][0] >= 1
    # in this process, and with a store of its own: nothing of what the killed run had stored is used
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "other"))
    assert main(["distill", "--out", str(whole), *request]) == 0
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [line.split(",")[:3] for line in (killed / "metrics.csv").read_text().splitlines()]
    assert rows == [line.split(",")[:3] for line in (whole / "metrics.csv").read_text().splitlines()]
    assert not list(killed.glob("*.tmp")) and (killed / "evaluation.npz").is_file()
