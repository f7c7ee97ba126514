"""Detectors teach detectors, from the command line; killed, and on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.workflows.boxes import TINY, write_boxes
from tests.workflows.test_resume import ROOT, position, wait_until, weights
from visionkd.cli.main import main

TEACHER, STUDENT = "fasterrcnn_test_resnet", "fasterrcnn_test_efficientnet"
ARGS = ("channels=16", "head_dim=32", "anchor_scale=4.0")
#: Both methods at once, so that a run shows what either of them does.
BOTH = "losses={task_loss: {}, fgd: {weight: 20.0}, rpn_roi: {options: {roi_box_weight: 0.5}}}"


def network(role: str) -> tuple[str, ...]:
    return (f"{role}.img_size=64", *(f"{role}.args.{each}" for each in ARGS))


def visionkd(*arguments: object, options: tuple[str, ...] = ()) -> int:
    return main([*map(str, arguments), *(text for option in options for text in ("-o", option))])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISIONKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture(scope="module")
def teacher(boxes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    options = (*TINY, *network("model"), "report.enabled=false")
    request = ("train", "--model", TEACHER, "--no-pretrained", "--data", boxes, "--epochs", 2, "--out", out)
    assert visionkd(*request, options=options) == 0
    return out


def distil(boxes, teacher, out, *arguments, student: str = STUDENT, options=(), args=ARGS) -> list[str]:
    """Return the words of a distillation of an epoch."""
    own = ("student.img_size=64", *(f"student.args.{each}" for each in args))
    request = ["distill", "--teacher", teacher, "--student", student, "--no-pretrained", "--data", boxes, "--epochs", 1]
    words = [*map(str, request), "--out", str(out), *arguments]
    return [*words, *(text for option in (*TINY, *own, "report.enabled=false", *options) for text in ("-o", option))]


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_pair_of_detectors_is_distilled_by_their_pyramids(boxes, teacher, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(distil(boxes, teacher, out, student="fcos_test_resnet", args=("channels=8", "head_convs=1"))) == 0
    said = capfd.readouterr().err
    assert "so the method is fgd" in said and "FGD compares the levels of stride 8, 16, 32 of both pyramids" in said
    card = read(out / "model" / "model.json")
    assert card["task"] == "detection" and set(card["metrics"]) == {"ap", "ap50", "ap75"}
    assert read(out / "status.json")["metrics"]["train/relation_loss"] > 0
    assert {row["role"] for row in read(out / "comparison.json")["rows"]} == {"student", "teacher"}
    assert not [name for name in weights(out) if "context" in name or "align" in name]


def test_what_cannot_be_distilled_is_told_before_any_training(boxes, teacher, tmp_path, capfd):
    requests = {
        "'kd' does not support detection": ("--method", "kd"),
        "For detection there is: fgd": ("--method", "kd"),
        "'fgd' needs more of its teachers than probabilities": ("--method", "fgd", "--cache-teacher"),
        "fgd takes one teacher, and 2 are named": ("--teacher", str(teacher)),
    }
    for words, arguments in requests.items():
        assert main(distil(boxes, teacher, tmp_path / "none", *arguments)) == 2
        assert words in capfd.readouterr().err
    single = distil(boxes, teacher, tmp_path / "none", "--method", "rpn_roi", student="fcos_test_resnet", args=())
    assert main(single) == 2 and "has one stage" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def start(out: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "visionkd", *arguments], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_in_both_epochs_it_ends_with_the_same_weights(boxes, teacher, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (BOTH, "training.epochs=2", "training.ema_decay=0.9", "training.checkpoint_every_s=0")
    options += ("augment.color_jitter=0.3", "detection.scale=[0.7,1.4]")
    process = start(killed, *distil(boxes, teacher, killed, "--epochs", "2", options=options))
    killed_at = []
    for moment in ((0, 1), (1, 1)):
        if not wait_until(process, lambda moment=moment: position(killed) >= moment):
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(position(killed))
        process = start(killed, "distill", "--resume", "--out", str(killed))
    assert process.wait() == 0, process.stderr.read()
    assert len(killed_at) == 2 and killed_at[0][0] == 0 and killed_at[1][0] >= 1
    assert main(distil(boxes, teacher, whole, "--epochs", "2", options=options)) == 0
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(boxes, teacher, tmp_path):
    out = tmp_path / "two"
    request = distil(boxes, teacher, out, "--epochs", "4", "--accelerator", "cpu", "--devices", "2", options=(BOTH,))
    process = start(out, *request)
    _, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    trained = read(out / "status.json")["metrics"]
    (alone,) = [row for row in read(out / "comparison.json")["rows"] if row["role"] == "student"]  # by one process
    assert alone["ap50"] > 1, "it finds nothing, which any wrong count would give too"
    for name in ("ap", "ap50"):
        assert trained[f"val/{name}"] == pytest.approx(alone[name], abs=1e-3)
    assert {"train/fgd.foreground_loss", "train/rpn_roi.roi_loss"} <= set(trained)
