"""From a segmentation teacher to INT8 files in one run of the command line; and killed while its quantisers train.

On a folder of scenes, not on ``shapes``: of these a network this small says "ground" everywhere after seconds, which no
rounding can make worse.
"""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest
import torch

from tests.workflows.dense import TINY, write_scenes
from tests.workflows.test_resume import start, status, wait_until, weights
from visionkd.cli.main import main

#: mIoU of an answer that is ground everywhere stays below this.
GROUND_ALONE = 35.0
#: Points of mIoU that INT8 may cost here, by the gate and by 'eval'.
MAX_DROP = 3.0
STAGES = ("fit_teacher", "distill", "calibrate", "qat", "package", "compare", "int8_cpu", "int8_tensorrt", "report")
NET = "fpn_cifar_resnet8"
#: Two epochs of 8 steps each with quantisers on; ranges stand still from step 12 on.
INT8 = (
    "training.checkpoint_every_s=0", "int8.images=32", "int8.epochs=2", "int8.lr_ratio=0.1",
    f"int8.max_drop={MAX_DROP}", "int8.min_speedup=0",
)  # fmt: skip

pytestmark = pytest.mark.slow


def words(*options: str) -> list[str]:
    return [text for option in options for text in ("-o", option)]


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISIONKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=32)


@pytest.fixture(scope="module")
def request_words(scenes, tmp_path_factory) -> list[str]:
    """Return the words of a distillation from a teacher that was trained to a narrower student."""
    teacher = tmp_path_factory.mktemp("runs") / "teacher"
    shared = ["--no-pretrained", "--data", str(scenes)]
    options = words(*TINY, "model.img_size=64", "report.enabled=false")
    assert main(["train", "--model", NET, *shared, "--epochs", "3", "--out", str(teacher), *options]) == 0
    options = words(*TINY, *INT8, "student.img_size=64", "student.args={channels: 16}")
    given = ["--teacher", str(teacher), "--student", NET, *shared, "--epochs", "3", "--method", "kd", "--int8"]
    return [*given, *options]


@pytest.fixture(scope="module")
def whole(request_words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["distill", "--out", str(out), *request_words]) == 0
    return out


def test_a_segmentation_pair_ends_in_int8_files_that_evaluate_as_the_report_says(whole, scenes, capsys):
    assert [name for name, state in read(whole / "status.json")["stages"].items() if state == "done"] == list(STAGES)
    rows = {row["file"]: row for row in read(whole / "export" / "export.json")}
    assert {"model.int8.onnx", "model.int8.tensorrt.onnx"} == set(rows)
    for row in rows.values():
        assert row["top1_float"] is None and row["agreement"] > 90
        assert row["miou_float"] > GROUND_ALONE, "the student has learned nothing, which INT8 cannot lose"
        assert row["miou_exported"] >= row["miou_float"] - MAX_DROP
    assert rows["model.int8.onnx"]["speedup"] > 0
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "mIoU" in page and "times as fast as the float network" in page and "top-1" not in page
    with (whole / "metrics.qat.csv").open(encoding="utf-8", newline="") as file:
        assert {int(row["epoch"]) for row in csv.DictReader(file)} == {1, 2}

    def miou(model: Path) -> float:
        capsys.readouterr()
        assert main(["eval", str(model), "--data", str(scenes), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["metrics"]["miou"]

    plain, network, exported = map(miou, (whole / "float", whole, whole / "export" / "model.int8.onnx"))
    assert plain > GROUND_ALONE and exported >= plain - MAX_DROP  # it trained on, and may be the better one
    assert exported == pytest.approx(network, abs=1.0)
    assert exported == pytest.approx(rows["model.int8.onnx"]["miou_exported"], abs=0.01)


def qat_position(out: Path) -> tuple[int, int]:
    file = out / "checkpoints" / "qat" / "last.ckpt"
    return tuple(torch.load(file, weights_only=True)["position"]) if file.is_file() else (0, 0)


def test_killed_while_its_quantisers_train_it_ends_with_the_same_int8_weights(whole, request_words, tmp_path):
    out = tmp_path / "killed"
    process = start(out, *request_words, *words("int8.targets=[]", "report.enabled=false"))  # weights are compared
    killed_at = []
    for moment in ((0, 3), (1, 5)):  # while ranges move, and when they stand still
        if not wait_until(process, lambda moment=moment: qat_position(out) >= moment):
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append((status(out)["stage"], *qat_position(out)))
        process = start(out, "--resume")
    assert process.wait() == 0, process.stderr.read()
    assert [stage for stage, *_ in killed_at] == ["qat", "qat"] and killed_at[1][1] == 1
    expected, found = weights(whole), weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any("quantizer" in name for name in found), "these are the weights of a float network"
