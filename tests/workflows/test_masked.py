"""Masked pre-training, fine-tuning, probing and both masked distillations, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.workflows.conftest import TINY, Recorder
from tests.workflows.masked_runs import ARGS, DECODER, TEACHER_ARGS, VIT, pretrain, tune
from visionkd import workflows
from visionkd.errors import RequestError
from visionkd.models.masked_decoder import decoder_of
from visionkd.workflows._networks import load_network

STUDENT = ("student.img_size=32", f"student.args={ARGS}", "report.enabled=false", *TINY)


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory) -> Path:
    """Pre-trained on images without labels."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"{number}.png")
    out = tmp_path_factory.mktemp("masked") / "mae"
    options = (*DECODER, "model.img_size=32", f"model.args={TEACHER_ARGS}", "data.workers=0")
    return pretrain(out, data=str(folder), options=options)


@pytest.fixture(scope="module")
def tuned_run(mae_run, tmp_path_factory) -> Path:
    return tune(mae_run, tmp_path_factory.mktemp("masked") / "tuned")


def distilled(out: Path, *, teacher: str, method: str, options=(), **more):
    listener = Recorder()
    result = workflows.distill(
        teacher=teacher, student=VIT, method=method, pretrained=False, epochs=1, batch_size=32, out=str(out),
        options=(*STUDENT, *DECODER, *options), listener=listener, **more,
    )  # fmt: skip
    return result, listener


def test_a_masked_run_keeps_encoder_decoder_and_picture(mae_run):
    card = json.loads((mae_run / "model" / "model.json").read_text())
    assert card["num_classes"] == 0 and card["classes"] is None and card["metrics"].keys() == {"loss"}
    assert set(card["sha256"]) == {"model.safetensors", "decoder.safetensors"} and card["decoder"]["width"] == 16
    network = load_network(str(mae_run))
    decoder = decoder_of(network)
    assert len(decoder.blocks) == 2 and decoder.pred.out_features == 48
    args = {key: value for key, value in network.model_args.items() if key != "num_classes"}
    plain = timm.create_model(VIT, num_classes=0, **args)  # the weights need nothing of this project
    plain.load_state_dict(load_file(mae_run / "model" / "model.safetensors"))
    with Image.open(mae_run / "reconstructions.png") as picture:
        assert picture.size == (4 * 32, 3 * 32)  # a tenth of 40 images
        assert json.loads(picture.text["reconstructions"])["kept"] == 16
    page = (mae_run / "report.html").read_text()
    assert "Reconstruction" in page and "16 of 64 patches are kept" in page and "has no classifier yet" in page


def test_fine_tuning_and_probing_begin_with_the_encoder(mae_run, tuned_run, tmp_path):
    encoder, tuned = load_network(str(mae_run)), load_network(str(tuned_run))
    assert tuned.num_classes == 8 and tuned.masked_decoder is None and tuned.net.global_pool == "avg"
    changed = (tuned.net.blocks[0].mlp.fc1.weight - encoder.net.blocks[0].mlp.fc1.weight).abs().max()
    assert 0 < changed < 0.1
    options = (*TINY, "report.enabled=false")
    result = workflows.train(init=str(mae_run), linear_probe=True, options=options, out=str(tmp_path / "probe"))
    probed = load_network(str(result.run))
    assert torch.equal(probed.net.blocks[0].mlp.fc1.weight, encoder.net.blocks[0].mlp.fc1.weight)
    assert result.metrics["val/top1"] > 0 and probed.num_classes == 8


def test_dmae_leaves_an_encoder_and_says_what_it_took(mae_run, tmp_path):
    result, listener = distilled(tmp_path / "dmae", teacher=str(mae_run), method="dmae")
    assert "fit_teacher" in listener.stages and load_network(str(result.run)).num_classes == 0
    assert any("16 of 64 patches" in text for text in listener.messages)
    assert any("1 of the student's 2, 2 of the teacher's 3" in text for text in listener.messages)
    assert "val/loss" in result.metrics and not any("top" in name for name in result.metrics)
    assert result.table[0].values["role"] == "encoder"


def test_g2sd_trains_both_stages_in_one_run(mae_run, tuned_run, tmp_path):
    teachers = f"{mae_run},{tuned_run}"
    result, listener = distilled(
        tmp_path / "g2sd", teacher=teachers, method="g2sd", options=("options.generic_epochs=2",)
    )
    assert listener.stages == ["fit_teacher", "generic", "distill", "package", "compare"]
    network = load_network(str(result.run))
    assert network.architecture == "deit_base_distilled_patch16_224" and network.num_classes == 8
    assert [row.values["role"] for row in result.table] == ["student", "teacher"]
    rows = (result.run / "metrics.generic.csv").read_text().splitlines()
    assert rows[0].startswith("epoch") and len({row.split(",")[0] for row in rows[1:]}) == 2


def test_a_teacher_without_its_decoder_is_refused(mae_run, tmp_path):
    from visionkd.models.names import resolve_name

    assert resolve_name(str(mae_run)).source == "package"
    file = tmp_path / "encoder.safetensors"
    save_file(load_file(mae_run / "model" / "model.safetensors"), file)
    with pytest.raises(RequestError, match="without the decoder"):
        distilled(
            tmp_path / "x", teacher=f"{VIT}@{file}", method="g2sd",
            options=("options.stages=generic", "teachers.0.img_size=32", f"teachers.0.args={TEACHER_ARGS}"),
        )  # fmt: skip


def test_a_file_with_the_authors_names_brings_its_decoder(mae_run, tmp_path):
    tensors = load_file(mae_run / "model" / "model.safetensors") | load_file(mae_run / "model" / "decoder.safetensors")
    file = tmp_path / "whole.pth"
    torch.save({"model": tensors}, file)
    from visionkd.config.schema import NetworkConfig
    from visionkd.models.factory import create_network

    args = {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
    found = create_network(NetworkConfig(name=f"{VIT}@{file}", img_size=32, args=args), in_training=False)
    assert found.num_classes == 0 and found.masked_decoder.spec.width == 16
    assert torch.equal(decoder_of(found).mask_token, tensors["mask_token"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"model": "cifar_resnet8"}, "is no plain vision transformer"),
        ({"options": ("options.mask_ratio=0.999",)}, "keeps no patch"),
        ({"options": ("options.ratio=0.5",)}, "unknown option"),
        ({"export": "onnx"}, "is not exported"),
    ],
)
def test_bad_requests_are_told(given, text, tmp_path):
    request = {"model": VIT, "objective": "mae", "pretrained": False, "out": str(tmp_path / "x"), **given}
    with pytest.raises(RequestError) as error:
        workflows.train(**request)
    assert text in str(error.value) + " ".join(problem.message for problem in error.value.problems)


def test_an_encoder_answers_no_question(mae_run, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    for ask in (
        lambda: workflows.evaluate(model=str(mae_run), data="shapes"),
        lambda: workflows.predict(model=str(mae_run), images=[str(picture)]),
    ):
        with pytest.raises(RequestError, match="without a classifier") as error:
            ask()
        assert "--init" in error.value.hint


def test_weights_of_another_network_are_refused(mae_run, tmp_path):
    options = (*TINY, "model.img_size=32", f"model.args={ARGS}")
    with pytest.raises(RequestError) as error:
        workflows.train(model=VIT, init=str(mae_run), pretrained=False, options=options, out=str(tmp_path / "x"))
    assert "are not those of" in error.value.problems[0].message
