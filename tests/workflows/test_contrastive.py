"""Training on images and captions, as a user runs it, and the encoder that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.workflows.conftest import TINY, Recorder
from visionkd import workflows
from visionkd.data.shapes import ShapesSource
from visionkd.errors import DataError, RequestError
from visionkd.methods import _contrastive
from visionkd.teachers.encoders import open_encoder
from visionkd.workflows._networks import load_network

VIT = "vit_tiny_patch16_224"
OPTIONS = (
    *TINY,
    "model.img_size=32",
    "model.args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "options.dim=16",
    "options.text_width=16",
    "options.text_heads=2",
    "options.text_depth=1",
    "augment.crop=none",
    "report.enabled=false",
)


def train(out: Path, *options: str, **more):
    given = {"model": VIT, "pretrained": False, "epochs": 1, "batch_size": 32, "objective": "contrastive", **more}
    return workflows.train(out=str(out), options=(*OPTIONS, *options), **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("contrastive") / "run"
    listener = Recorder()
    result = train(out, "report.enabled=true", epochs=2, listener=listener)
    return out, result, listener


def test_a_run_says_and_keeps_what_it_learned(run) -> None:
    out, result, listener = run
    assert any("different words, 3 captions an image" in text for text in listener.messages)
    card = json.loads((out / "model" / "model.json").read_text())
    assert card["num_classes"] == 0 and card["metrics"].keys() == {"loss", "zero_shot_top1"}
    assert set(card["sha256"]) == {"model.safetensors", "text.safetensors"}
    assert "crescent" in card["text"]["words"] and card["text"]["dim"] == 16
    assert 0 <= result.metrics["val/zero_shot_top1"] <= 100 and np.isfinite(result.metrics["val/loss"])
    rows = (out / "metrics.csv").read_text()
    assert "contrastive_loss" in rows and "zero_shot_top1" in rows
    assert "has no classifier yet" in (out / "report.html").read_text()


def test_what_it_leaves_is_an_image_text_encoder(run) -> None:
    out, _, _ = run
    encoder = open_encoder(str(out))
    images = torch.stack([torch.from_numpy(np.array(ShapesSource(0, 2, 32).load(n))) for n in range(2)])
    images = images.permute(0, 3, 1, 2) / 255
    assert encoder.grid == (8, 8) and encoder.dim == 16
    hidden = torch.ones(2, 8, 8, dtype=torch.bool)
    hidden[:, 2:6, 2:6] = False
    assert encoder.encode_crops(images, hidden).shape == encoder.encode_image(images).shape == (2, 16)
    assert encoder.encode_text(["red circle", "teal star"], ["a {}"]).shape == (2, 16)
    with pytest.raises(RequestError, match="no caption had: 'dog'"):
        encoder.encode_text(["dog"])


def test_the_image_encoder_is_a_plain_one_to_go_on_from(run, tmp_path) -> None:
    out, _, _ = run
    network = load_network(str(out))
    assert network.net.state_dict().keys() == load_file(out / "model" / "model.safetensors").keys()
    result = workflows.train(
        init=str(out), epochs=1, batch_size=32, out=str(tmp_path / "tuned"), options=(*TINY, "report.enabled=false")
    )
    tuned = load_network(str(result.run))
    assert tuned.num_classes == 8 and tuned.image_text is None
    assert not (result.run / "model" / "text.safetensors").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch) -> None:
    whole = train(tmp_path / "whole", epochs=2)
    original, count = _contrastive.Contrastive.training_step, [0]

    def stops(self, *args):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(_contrastive.Contrastive, "training_step", stops)
    with pytest.raises(BaseException):  # noqa: B017, PT011  (however the interruption is told)
        train(tmp_path / "part", epochs=2)
    monkeypatch.setattr(_contrastive.Contrastive, "training_step", original)
    part = workflows.train(out=str(tmp_path / "part"), resume=True)
    for file in ("model.safetensors", "text.safetensors"):
        ours, theirs = (load_file(r.run / "model" / file) for r in (whole, part))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), file


def test_images_with_captions_of_a_folder_serve_too(tmp_path) -> None:
    folder, source = tmp_path / "images", ShapesSource(0, 40, 32)
    folder.mkdir()
    lines = []
    for number in range(40):
        source.load(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": source.scene(number).caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    result = train(tmp_path / "run", data=str(folder))
    assert "val/zero_shot_top1" not in result.metrics  # no classes, no names
    assert open_encoder(str(result.run)).encode_text(["red"]).shape == (1, 16)
    Image.new("RGB", (32, 32)).save(folder / "more.png")
    with pytest.raises(DataError, match="have no caption, such as 'more.png'"):
        train(tmp_path / "other", data=str(folder))


def test_what_does_not_go_together_is_refused_at_once(tmp_path) -> None:
    wrong = ("augment.mixup_alpha=0.2", "training.keep=best", "training.ema_decay=0.9", "options.text_heads=3")
    with pytest.raises(RequestError) as caught:
        train(tmp_path / "run", *wrong)
    said = str(caught.value)
    assert all(key in said for key in ("mixup_alpha", "training.keep", "training.ema_decay", "options.text_width"))
    with pytest.raises(RequestError, match="options.width"):
        train(tmp_path / "run", "options.width=3")
    assert not (tmp_path / "run").exists()


def test_a_network_without_tokens_learns_to_tell_scenes_by_their_captions(tmp_path) -> None:
    few = ("model.args={}", "data.shapes.num_train=16", "schedule.name=constant", "schedule.warmup_epochs=0")
    given = {"model": "cifar_resnet8", "epochs": 30, "batch_size": 16, "lr": 0.005}
    result = train(tmp_path / "run", *few, "augment.hflip=0", **given)
    encoder, source = open_encoder(str(result.run)), ShapesSource(0, 16, 32)
    assert encoder.grid is None  # it has no blocks to step
    images = torch.stack([torch.from_numpy(np.array(source.load(n))) for n in range(16)]).permute(0, 3, 1, 2) / 255
    texts = encoder.encode_text([source.scene(n).caption for n in range(16)])
    right = (encoder.encode_image(images) @ texts.T).argmax(1) == torch.arange(16)
    assert right.float().mean() > 0.5  # by chance one of 16 is right
    assert torch.allclose(encoder.encode_crops(images), encoder.encode_image(images), atol=1e-5)
    with pytest.raises(ValueError, match="grid of None"):
        encoder.encode_crops(images, torch.zeros(16, 8, 8))
