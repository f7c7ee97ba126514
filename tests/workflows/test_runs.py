"""Whole runs through the Python twins, on a teacher and a student that train in a second."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.workflows.conftest import TINY, Recorder
from visionkd import workflows
from visionkd.errors import DataError, RequestError, WorkError


def distill(teacher, out, *options, **more):
    arguments = {"student": "cifar_resnet8", "pretrained": False, "epochs": 1, "batch_size": 32, **more}
    options = (*TINY, "student.img_size=32", *options)
    return workflows.distill(teacher=str(teacher), options=options, out=str(out), **arguments)


@pytest.fixture(scope="module")
def finished(teacher_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "student"
    listener = Recorder()
    options = (
        "training.ema_decay=0.5",
        "augment.mixup_alpha=0.2",
        "augment.cutmix_alpha=1.0",
        "training.label_smoothing=0.1",
    )
    result = distill(teacher_run, out, *options, export="onnx", baseline=str(teacher_run), epochs=2, listener=listener)
    return result, listener


def test_run_directory_holds_what_the_design_promises(finished):
    result, _ = finished
    for name in (
        "config.yaml", "environment.json", "status.json", "metrics.csv", "log.txt", "report.html", "evaluation.npz",
        "checkpoints/last.ckpt", "checkpoints/best.ckpt", "model/model.safetensors", "model/model.json",
        "export/model.onnx", "export/export.json",
    ):  # fmt: skip
        assert (result.run / name).is_file(), name
    status = json.loads((result.run / "status.json").read_text())
    assert status["state"] == "done" and status["exit_code"] == 0 and status["epoch"] == 2
    assert set(result.files) == {"model", "onnx", "report"}


def test_table_puts_student_teacher_and_baseline_side_by_side(finished):
    result, _ = finished
    assert [row.values["role"] for row in result.table] == ["student", "teacher", "baseline"]
    for row in result.table:
        assert 0 <= row.values["top1"] <= 100 and row.values["params_m"] > 0 and row.values["latency_ms"] > 0


def test_metrics_have_a_row_per_epoch_and_split(finished):
    result, _ = finished
    rows = list(csv.DictReader((result.run / "metrics.csv").open()))
    assert [(row["epoch"], row["split"]) for row in rows] == [
        ("1", "train"),
        ("1", "val"),
        ("2", "train"),
        ("2", "val"),
    ]
    train = rows[0]
    parts = 0.1 * float(train["task_loss"]) + 0.9 * float(train["kd_loss"])
    assert float(train["loss"]) == pytest.approx(parts, rel=1e-3)


def test_checkpoint_holds_no_teacher_and_no_pickle(finished, teacher_run):
    result, _ = finished
    checkpoint = torch.load(result.run / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student", "ema"}


def test_averaged_weights_are_packaged(finished):
    result, _ = finished
    packaged = load_file(result.run / "model" / "model.safetensors")
    state = torch.load(result.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[f"ema.module.net.{name}"]) for name, value in packaged.items())
    assert not all(torch.equal(value, state[f"student.net.{name}"]) for name, value in packaged.items())


def test_packaged_student_loads_in_plain_timm(finished):
    import timm

    result, _ = finished
    card = json.loads((result.run / "model" / "model.json").read_text())
    net = timm.create_model(card["architecture"], **card["model_args"])
    net.load_state_dict(load_file(result.run / "model" / "model.safetensors"))
    assert card["classes"] and card["input"]["img_size"] == [32, 32]


def test_evaluation_is_the_same_in_torch_and_onnxruntime(finished):
    result, _ = finished
    torch_result = workflows.evaluate(model=str(result.run))
    onnx_result = workflows.evaluate(model=str(result.files["onnx"]))
    assert torch_result.num_images == onnx_result.num_images == 32
    assert torch_result.metrics["top1"] == pytest.approx(onnx_result.metrics["top1"])
    assert torch_result.metrics["nll"] == pytest.approx(onnx_result.metrics["nll"], rel=1e-4)
    assert torch_result.metrics["top1"] == pytest.approx(result.metrics["val/top1"])
    with np.load(result.run / "evaluation.npz") as arrays:
        assert set(arrays.files) == {"targets", "indices", "names", "student_probs", "teacher_probs", "baseline_probs"}


def test_config_repeats_the_run(finished, tmp_path):
    result, _ = finished
    again = workflows.distill(config=str(result.run / "config.yaml"), out=str(tmp_path / "again"))
    one, other = (load_file(run / "model" / "model.safetensors") for run in (result.run, again.run))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_choices_are_said_aloud_and_kept(finished):
    result, listener = finished
    assert any("Method kd" in text for text in listener.messages)
    assert any("chance" in text for text in listener.messages)
    assert listener.stages == ["fit_teacher", "distill", "package", "compare", "onnx", "report"]
    assert "Method kd" in (result.run / "report.html").read_text() or "kd" in (result.run / "report.html").read_text()


def test_training_alone_refuses_an_augmentor_that_needs_a_teacher(tmp_path):
    with pytest.raises(RequestError, match="there is no teacher") as error:
        workflows.train(model="cifar_resnet8", options=("augment.learned=hard",), out=str(tmp_path / "run"))
    assert [problem.key for problem in error.value.problems] == ["augment.learned"]
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_over_unasked(teacher_run):
    before = (teacher_run / "status.json").read_bytes()
    with pytest.raises(RequestError, match="--overwrite"):
        distill(teacher_run, teacher_run)
    assert (teacher_run / "status.json").read_bytes() == before


def test_foreign_directory_is_never_cleared(teacher_run, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="other files"):
        distill(teacher_run, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").is_file()


def test_resume_with_other_settings_is_refused(teacher_run):
    with pytest.raises(RequestError, match="training.epochs"):
        workflows.train(epochs=9, out=str(teacher_run), resume=True)


def test_resume_of_a_finished_run_trains_nothing(teacher_run, monkeypatch):
    kept = (teacher_run / "checkpoints" / "last.ckpt", teacher_run / "config.yaml")  # with the command that began it
    before = [file.read_bytes() for file in kept]
    listener = Recorder()
    monkeypatch.setattr("sys.argv", ["visionkd", "train", "--resume"])
    workflows.train(out=str(teacher_run), resume=True, listener=listener)
    assert [file.read_bytes() for file in kept] == before
    assert "train" not in listener.stages


def test_several_teachers_and_the_order_of_classes(teacher_run, tmp_path):
    result = workflows.distill(
        teacher=[str(teacher_run), str(teacher_run)],
        student="cifar_resnet8",
        pretrained=False,
        epochs=1,
        batch_size=32,
        options=(*TINY, "student.img_size=32", "report.enabled=false"),
        out=str(tmp_path / "two"),
    )
    assert [row.values["role"] for row in result.table] == ["student", "teacher", "teacher"]


def test_teacher_without_the_datas_classes_is_probed(tmp_path):
    listener = Recorder()
    options = ("teachers.0.img_size=32", "fit_teacher.max_images=64", "report.enabled=false")
    result = distill("test_resnet", tmp_path / "probed", *options, listener=listener)
    assert any("linear probe" in text for text in listener.messages)
    assert (result.run / "teachers" / "0.probe.safetensors").is_file()


def test_teacher_without_the_datas_classes_is_refused_on_request(tmp_path):
    with pytest.raises(RequestError, match="--fit-teacher"):
        distill("test_resnet", tmp_path / "refused", "teachers.0.img_size=32", fit_teacher="none")
    assert not (tmp_path / "refused").exists()


def test_teacher_can_be_finetuned_first(tmp_path):
    options = ("teachers.0.img_size=32", "fit_teacher.epochs=1", "report.enabled=false")
    result = distill("test_resnet", tmp_path / "tuned", *options, fit_teacher="finetune")
    assert (result.run / "teachers" / "0" / "model.json").is_file()
    assert (result.run / "metrics.finetune_teacher0.csv").is_file()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(teacher_run, tmp_path):
    out = tmp_path / "nan"
    options = (
        "model.img_size=32",
        "schedule.warmup_epochs=0",
        "schedule.name=constant",
        "optimizer.name=sgd",
        "training.log_every=1",
    )
    more = {"model": "cifar_resnet8", "pretrained": False, "batch_size": 32, "out": str(out), "epochs": 3}
    with pytest.raises(WorkError, match="NaN or infinite"):
        workflows.train(options=(*TINY, *options), lr=1e30, **more)
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed" and "--lr" in status["error"]
    for checkpoint in out.glob("checkpoints/*.ckpt"):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())


def test_unreadable_images_are_counted_and_refused_past_a_limit(tmp_path):
    from PIL import Image

    for split, count in (("train", 12), ("val", 4)):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (number * 9, 80, 160 if label == "a" else 10)).save(folder / f"{number}.png")
    for number in range(4):
        (tmp_path / "data" / "train" / "a" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    arguments = {
        "model": "cifar_resnet8",
        "pretrained": False,
        "data": str(tmp_path / "data"),
        "epochs": 1,
        "batch_size": 8,
    }
    options = ("model.img_size=32", "data.workers=0", "report.enabled=false")
    with pytest.raises(DataError, match="max_unreadable"):
        workflows.train(options=options, out=str(tmp_path / "refused"), **arguments)
    workflows.train(options=(*options, "data.max_unreadable=0.5"), out=str(tmp_path / "counted"), **arguments)
    assert json.loads((tmp_path / "counted" / "status.json").read_text())["unreadable_images"] == 4


def test_every_value_is_resolved_in_the_config(teacher_run):
    config = yaml.safe_load((teacher_run / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == pytest.approx(1e-3 * math.sqrt(32 / 256))
    assert config["augment"]["crop"] == "padded" and config["data"]["workers"] == 0


def test_wholly_unreadable_validation_split_is_named(tmp_path):
    from PIL import Image

    for label in ("a", "b"):
        for split in ("train", "val"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), (number * 9, 80, 160)).save(
                tmp_path / "data" / "train" / label / f"{number}.png"
            )
        (tmp_path / "data" / "val" / label / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    options = ("model.img_size=32", "data.workers=0")
    with pytest.raises(DataError, match="No validation image"):
        workflows.train(
            model="cifar_resnet8",
            pretrained=False,
            data=str(tmp_path / "data"),
            epochs=1,
            batch_size=4,
            options=options,
            out=str(tmp_path / "run"),
        )


def test_compared_part_of_a_held_out_split_keeps_its_pictures(teacher_run, tmp_path, monkeypatch):
    """Positions are those in the validation split, also where that is a part of the data itself."""
    from visionkd.data.open import open_data
    from visionkd.workflows import _finish
    from visionkd.workflows.evaluate import data_config

    monkeypatch.setattr(_finish, "_CPU_TEACHER_GMACS", 1e-9)  # the tiny teacher counts as huge
    options = ("data.limit_val=120", "data.shapes.num_val=200", "report.enabled=false")
    run = distill(teacher_run, tmp_path / "part", *options).run
    monkeypatch.undo()
    config = data_config(None, run=run)
    val = open_data(config.data.path, config=config.data, seed=config.data.split_seed).splits["val"]
    with np.load(run / "evaluation.npz") as arrays:
        names = json.loads(arrays["names"].tobytes().decode())
        assert len(names) == 80 < len(val) == 120
        assert [val.name(int(index)) for index in arrays["indices"]] == names


def test_best_checkpoint_survives_a_kill_before_it_was_linked(tmp_path):
    from visionkd.workflows._callbacks import Checkpoints
    from visionkd.workflows._rundir import RunDirectory

    checkpoints = Checkpoints(RunDirectory(tmp_path, writes=True), tmp_path, every_s=0, check_every=1)
    checkpoints.last_path.write_bytes(b"new best")
    checkpoints.best_path.write_bytes(b"old best")
    checkpoints.load_state_dict({"best": 50.0, "is_best": False})
    assert checkpoints.best_path.read_bytes() == b"old best"
    checkpoints.load_state_dict({"best": 50.0, "is_best": True})
    assert checkpoints.best_path.read_bytes() == b"new best"
