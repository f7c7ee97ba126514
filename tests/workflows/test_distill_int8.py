"""From a teacher to INT8 files in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workflows.conftest import TINY, Recorder
from visionkd import workflows
from visionkd.errors import InterruptedRunError, RequestError, WorkError
from visionkd.export.gate import Refused
from visionkd.workflows import _distill_int8
from visionkd.workflows._networks import load_network

OPTIONS = (*TINY, "data.shapes.size=32", "int8.images=32", "int8.max_drop=100", "export.verify_images=16")
STAGES = ["fit_teacher", "distill", "calibrate", "qat", "package", "compare", "int8_cpu", "int8_tensorrt", "report"]


def distill(teacher: Path, out: Path, *options: str, **more):
    return workflows.distill(
        teacher=str(teacher), student=str(teacher), epochs=1, batch_size=32, int8=True,
        options=(*OPTIONS, "int8.min_speedup=0", *options), out=str(out), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(teacher_run, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("int8") / "r", Recorder()
    return distill(teacher_run, out, listener=said), said


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_a_run_ends_in_int8_files_beside_the_float_student(finished):
    result, said = finished
    assert said.stages == STAGES
    assert [row.model for row in result.table][0] == "cifar_resnet8 INT8"
    assert "cifar_resnet8 float" in [row.model for row in result.table]
    assert {"model", "int8", "int8_tensorrt", "report"} <= result.files.keys()
    assert load_network(str(result.run)).quantization["kind"] == "int8"
    assert load_network(str(result.run / "float")).quantization is None
    rows = {row["file"]: row for row in json.loads((result.run / "export" / "export.json").read_text())}
    assert rows["model.int8.onnx"]["speedup"] > 0
    assert all(row["top1_float"] is not None for row in rows.values())
    page = (result.run / "report.html").read_text()
    assert "times as fast as the float network" in page and "in float" in page
    assert "never saw the teacher" not in page


def test_a_run_stopped_between_its_stages_goes_on(finished, teacher_run, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_distill_int8, "fit_int8", stop)
        with pytest.raises((KeyboardInterrupt, InterruptedRunError)):
            distill(teacher_run, tmp_path / "r")
    said = Recorder()
    workflows.distill(out=str(tmp_path / "r"), resume=True, listener=said)
    assert said.stages == STAGES[3:]
    expected = weights(finished[0].run)
    found = weights(tmp_path / "r")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_does_not_pass_the_gate_fails_the_run_and_leaves_no_file(teacher_run, tmp_path):
    out = tmp_path / "r"
    with pytest.raises(Refused, match="times"):
        distill(teacher_run, out, "int8.min_speedup=1000", "int8.epochs=0")
    assert not (out / "export" / "model.int8.onnx").exists()
    assert (out / "export" / "model.int8.tensorrt.onnx").is_file() and (out / "report.html").is_file()
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", WorkError.exit_code)
    assert "int8_cpu" not in [name for name, state in status["stages"].items() if state == "done"]
    assert "qat" not in status["stages"]


def test_other_quantisation_is_refused_before_anything_is_trained(finished, teacher_run, tmp_path):
    with pytest.raises(RequestError, match="--method quantized"):
        distill(teacher_run, tmp_path / "r", method="quantized")
    with pytest.raises(RequestError, match="quantised already"):
        workflows.distill(
            teacher=str(teacher_run), student=str(finished[0].run), int8=True, options=OPTIONS, out=str(tmp_path / "r")
        )
    assert not (tmp_path / "r").exists()


def test_a_float_model_is_quantised_into_a_bundle_for_both_targets(teacher_run, tmp_path):
    given = {"max_drop": 100.0, "min_speedup": 0.0, "verify_images": 16}
    result = workflows.export(model=str(teacher_run), int8=True, bundle=str(tmp_path / "bundle"), **given)
    assert {"model.int8.onnx", "model.int8.tensorrt.onnx", "manifest.json"} <= set(result.files)
    assert "model.onnx" not in result.files
    with pytest.raises(RequestError, match="holds both"):
        workflows.export(model=str(teacher_run), int8=True, target="cpu", bundle=str(tmp_path / "other"))
