"""Quantisation from a trained run to a packaged INT8 model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workflows.conftest import TINY, Recorder
from visionkd import workflows
from visionkd.errors import InterruptedRunError, RequestError
from visionkd.workflows import _int8
from visionkd.workflows._networks import load_network

OPTIONS = (*TINY, "report.enabled=false", "data.shapes.size=32")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(teacher_run, tmp_path_factory) -> Path:
    """Two epochs of a training with the float model as teacher."""
    out = tmp_path_factory.mktemp("quantize") / "qat"
    quantize_with_teacher(teacher_run, out)
    return out


def quantize_with_teacher(teacher_run: Path, out: Path, **more):
    options = (*OPTIONS, "int8.frozen_share=0.5", "training.ema_decay=0.5", "training.checkpoint_every_s=0")
    given = {"epochs": 2, "batch_size": 32, "images": 32, "options": options} if not more.get("resume") else {}
    if not more.get("resume"):
        given |= {"model": str(teacher_run), "teacher": str(teacher_run)}
    return workflows.quantize(out=str(out), **given, **more)


def test_post_training_quantisation_packages_an_int8_model(teacher_run, tmp_path):
    said = Recorder()
    result = workflows.quantize(
        model=str(teacher_run), images=32, calibration="max", options=OPTIONS, out=str(tmp_path / "r"), listener=said
    )
    names = [row.model for row in result.table]
    assert names == ["cifar_resnet8 INT8", "cifar_resnet8 float"]
    assert said.stages == ["calibrate", "package", "compare"]
    assert any(text.startswith("INT8: 10 layers and 10 activations, ranges by 'max' from 32") for text in said.messages)
    card = json.loads((result.run / "model" / "model.json").read_text())
    assert card["quantization"]["scheme"]["calibration"] == "max" and card["origin"]["method"] == "post-training"
    network, plain = load_network(str(result.run)), load_network(str(teacher_run))
    assert network.quantization["kind"] == "int8" and network.classes == plain.classes
    own = dict(plain.net.named_parameters())
    found = dict(network.net.named_parameters())
    assert found.keys() == own.keys()
    for name in own:  # the one bias is corrected
        assert (found[name] - own[name]).abs().max() < (1e-6 if name != "fc.bias" else 0.1), "nothing is trained"
    # a quantised package is a MODEL like others
    found = workflows.evaluate(model=str(result.run))
    assert found.metrics["top1"] == pytest.approx(result.metrics["val/top1"])
    with pytest.raises(RequestError, match="is quantised to INT8 already"):
        workflows.quantize(model=str(result.run), options=OPTIONS, out=str(tmp_path / "again"))


def test_images_without_labels_are_enough(teacher_run, tmp_path):
    from PIL import Image

    from visionkd.data.shapes import ShapesSource

    source = ShapesSource(0, 40, 32)
    (tmp_path / "images").mkdir()
    for index in range(40):
        image: Image.Image = source.load(index)
        image.save(tmp_path / "images" / f"{index}.png")
    options = ("data.workers=0", "report.enabled=false")
    result = workflows.quantize(
        model=str(teacher_run), data=str(tmp_path / "images"), options=options, out=str(tmp_path / "r")
    )
    card = json.loads((result.run / "model" / "model.json").read_text())
    assert "agreement with the float model" in card["metrics_note"]
    assert {row.model: row.values["top1"] for row in result.table}["cifar_resnet8 float"] == 100.0
    with pytest.raises(RequestError, match="no labels of the network's classes to train on"):
        workflows.quantize(
            model=str(teacher_run), data=str(tmp_path / "images"), epochs=1, options=options, out=str(tmp_path / "s")
        )


def test_training_keeps_activation_ranges_and_freezes_the_rest(trained, teacher_run):
    before, after = load_file(trained / "stages" / "calibrated" / "model.safetensors"), weights(trained)
    assert before.keys() == after.keys()
    scales = [name for name in before if name.startswith("quantizers.")]
    assert scales and all(torch.equal(before[name], after[name]) for name in scales)
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    for name in [name for name in after if name.endswith("weight_quantizer.scale")]:
        weight = after[name.replace("weight_quantizer.scale", "weight")]
        integers = (weight.flatten(1) / after[name][:, None]).round()
        assert integers.abs().max() <= 127
    config = (trained / "config.yaml").read_text()
    assert "train: true" in config
    card = json.loads((trained / "model" / "model.json").read_text())
    assert card["origin"]["method"] == "kd" and card["origin"]["float_model"] == str(teacher_run)


@pytest.mark.parametrize("moment", [(0, 2), (1, 1)])
def test_a_stopped_training_ends_with_the_same_weights(trained, teacher_run, tmp_path, monkeypatch, moment):
    """Stopped while ranges of weights move, and while they do not; what calibration found is not found anew."""
    out = tmp_path / "r"

    class Stops(_int8.FreezeInt8):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == moment:
                raise InterruptedRunError("stopped")
            super().on_train_batch_start(trainer, module, batch, batch_idx)

    Stops.__qualname__ = "FreezeInt8"  # under which its state lies in the checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(_int8, "FreezeInt8", Stops)
        with pytest.raises(InterruptedRunError):
            quantize_with_teacher(teacher_run, out)
    monkeypatch.setattr("visionkd.workflows._int8.quantize_student", None)
    quantize_with_teacher(teacher_run, out, resume=True)
    expected, found = weights(trained), weights(out)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
    shutil.rmtree(out)


def test_the_learning_rate_is_a_hundredth_of_the_models_own(trained, teacher_run):
    import yaml

    lr = [yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] for run in (teacher_run, trained)]
    assert lr[1] == pytest.approx(0.01 * lr[0])


def test_wrong_requests(teacher_run):
    with pytest.raises(RequestError) as found:
        workflows.quantize(model=str(teacher_run), bits=4, data="cifar10")
    assert "visionkd distill" in found.value.hint and "-o options.bits=4" in found.value.hint
    with pytest.raises(RequestError, match="from 2 to 8"):
        workflows.quantize(model=str(teacher_run), bits=12)
    with pytest.raises(RequestError, match="teaches in a training only"):
        workflows.quantize(model=str(teacher_run), teacher=str(teacher_run))
    with pytest.raises(RequestError, match="unknown name 'int9'"):
        workflows.quantize(model=str(teacher_run), scheme="int9")
    with pytest.raises(RequestError, match="more than the logits"):
        workflows.quantize(
            model=str(teacher_run), teacher=str(teacher_run), epochs=1, options=(*OPTIONS, "method=ofa_kd")
        )
    with pytest.raises(RequestError) as found:
        workflows.quantize(data="nowhere")
    assert {problem.key for problem in found.value.problems} >= {"--data"}
