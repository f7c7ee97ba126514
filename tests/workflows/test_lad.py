"""LAD from the request to the run: the teacher is trained first, and kept out of all that looks like a result."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.workflows.conftest import Recorder
from tests.workflows.test_resume import position, start, status, wait_until, weights
from visionkd import workflows
from visionkd.config.schema import DistillConfig
from visionkd.errors import RequestError
from visionkd.workflows._request import build_config

NET = "fpn_cifar_resnet8"
SETTINGS = (
    "student.img_size=[32,48]", "student.args={channels: 8}", "data.workers=0", "report.enabled=false",
    "optimizer.lr=0.002",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two colours of rectangles on noise; the top row has no label."""
    folder, generator = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    colours = np.array([[60, 60, 60], [200, 60, 60], [60, 200, 60]])
    for split, count in (("train", 12), ("val", 4)):
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((32, 48), np.uint8)
            for value in (1, 2):
                top, left = generator.integers(0, 20), generator.integers(0, 30)
                labels[top : top + 12, left : left + 16] = value
            image = np.clip(colours[labels] + generator.normal(0, 30, (32, 48, 3)), 0, 255).astype(np.uint8)
            labels[0] = 255
            Image.fromarray(image).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(labels).save(folder / split / "labels" / f"{number}.png")
    return folder


def distil(data: Path, out: Path, *options: str, **more):
    given = {"student": NET, "pretrained": False, "epochs": 1, "batch_size": 4, "task": "segmentation"}
    return workflows.distill(data=str(data), out=str(out), options=(*SETTINGS, *options), **{**given, **more})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lad"
    distil(data, out)
    return out


def test_a_run_without_a_teacher_trains_one_of_the_students_architecture(run):
    config, found = (run / "config.yaml").read_text(), json.loads((run / "status.json").read_text())
    assert "method: lad" in config and config.count(f"name: {NET}") == 2
    assert list(found["stages"])[:3] == ["fit_teacher", "teacher", "distill"]
    assert json.loads((run / "stages" / "teacher" / "model.json").read_text())["origin"]["role"] == "teacher"
    assert json.loads((run / "model" / "model.json").read_text())["model_args"]["in_chans"] == 3


def test_what_the_teacher_reached_is_told_apart_from_what_the_student_reached(run):
    found = json.loads((run / "status.json").read_text())
    privileged = {name for name in found["teacher_metrics"] if name.startswith("val/")}
    assert privileged == {"val/miou", "val/pixel_acc", "val/loss", "val/miou_other_label", "val/miou_no_label"}
    assert not {name for name in found["metrics"] if "label" in name or "consistency" in name}
    assert "consistency_loss" in (run / "metrics.teacher.csv").read_text()
    assert "consistency_loss" not in (run / "metrics.csv").read_text()
    rows = json.loads((run / "comparison.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["model"]


def test_the_teacher_is_refused_as_a_model(run, data, tmp_path):
    teacher = str(run / "stages" / "teacher")
    for request in (
        lambda: workflows.evaluate(model=teacher, data=str(data)),
        lambda: workflows.export(model=teacher, format="onnx", out=str(tmp_path / "a.onnx")),
        lambda: workflows.train(model=teacher, data=str(data), out=str(tmp_path / "a")),
        lambda: distil(data, tmp_path / "b", teacher=teacher, method="kd"),
    ):
        with pytest.raises(RequestError, match="must be shown the labels"):
            request()
    assert not list(tmp_path.iterdir())


def test_a_trained_teacher_is_taken_as_it_is(run, data, tmp_path):
    told = Recorder()
    teacher = str(run / "stages" / "teacher")
    distil(data, tmp_path / "again", "options.teacher_epochs=0", teacher=teacher, method="lad", listener=told)
    expected, found = (
        load_file(path / "stages" / "teacher" / "model.safetensors") for path in (run, tmp_path / "again")
    )
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any("is taken as it was trained" in text for text in told.messages)
    with pytest.raises(RequestError, match="never shown labels"):
        distil(data, tmp_path / "no", "options.teacher_epochs=0")


def test_only_a_method_that_trains_its_teacher_goes_without_one():
    def build(**given):
        overrides = {"student.name": NET, **given}
        return build_config(DistillConfig, config=None, options=(), overrides=overrides, out=None, resume=False)

    assert build(method="lad").teachers[0].name == build(task="segmentation").teachers[0].name == NET
    for given in ({"method": "kd"}, {"method": "cwd", "task": "segmentation"}, {}):
        with pytest.raises(RequestError, match="--teacher NAME"):
            build(**given)


@pytest.mark.slow
def test_killed_in_both_stages_and_between_them(data, tmp_path):
    settings = [word for option in SETTINGS for word in ("-o", option)]
    settings += f"--student {NET} --task segmentation --no-pretrained --data {data} --epochs 3 --batch-size 2".split()
    settings += ["-o", "training.checkpoint_every_s=0"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    first = start(whole, *settings)
    assert first.wait() == 0, first.stderr.read()

    def teacher_position() -> tuple[int, int]:
        file = out / "checkpoints" / "teacher" / "last.ckpt"
        return tuple(torch.load(file, weights_only=True)["position"]) if file.is_file() else (0, 0)

    moments = [
        lambda: teacher_position() >= (0, 3),
        lambda: status(out).get("stage") == "distill",
        lambda: position(out) >= (0, 3),
    ]
    process, killed = start(out, *settings), 0
    for moment in moments:
        if not wait_until(process, moment):
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        process = start(out, "--resume")
    assert process.wait() == 0, process.stderr.read()
    assert killed == 3
    expected, found = weights(whole), weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
