"""OADP from the request to the run: base boxes, embeddings, distillation, and classes that nobody drew a box of."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.teachers.oadp_help import write_encoder
from tests.workflows.conftest import Recorder
from tests.workflows.test_resume import position, start, status, wait_until, weights
from visionkd import workflows
from visionkd.config.load import build_options
from visionkd.config.schema import DistillConfig, NetworkConfig
from visionkd.data.open import open_data
from visionkd.data.shapes import CLASSES as SHAPES
from visionkd.data.shapes import draw
from visionkd.errors import RequestError
from visionkd.hub.package import save_package
from visionkd.losses.oadp import WEIGHTS
from visionkd.methods.oadp import OADPOptions
from visionkd.models.detection.open_network import OpenVocabularyDetector
from visionkd.models.factory import create_network, load_packaged
from visionkd.types import Listener
from visionkd.workflows._embeddings import EncoderWork
from visionkd.workflows._networks import seeded_network
from visionkd.workflows._open_classes import take_classes

NET = "fasterrcnn_test_resnet"
CLASSES = [f"{colour} {shape}" for colour in ("red", "blue", "green", "white") for shape in SHAPES]
NOVEL = ["red star", "blue circle"]
#: Everything about the data; scenes of 48 pixels, some of which show none of these classes.
DATA = (
    "data.shapes.num_train=24", "data.shapes.num_val=8", "data.shapes.size=48", "data.workers=0",
    "data.shapes.vocabulary=combinations", f"data.classes={json.dumps(CLASSES)}", f"data.novel={json.dumps(NOVEL)}",
    "report.enabled=false",
)  # fmt: skip
FEW = (
    "student.img_size=48", "student.args={channels: 8, anchor_scale: 4.0}", "options.head_convs=1",
    "options.head_dim=16", "options.boxes=[24,12]", "options.rois=16", "options.proposals_per_image=4",
    "optimizer.lr=0.001",
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model")


def distil(encoder: Path, out: Path, *options: str, **more):
    given = {
        "teacher": str(encoder), "student": NET, "pretrained": False, "data": "shapes", "task": "detection",
        "epochs": 1, "batch_size": 4,
    }  # fmt: skip
    return workflows.distill(out=str(out), options=(*DATA, *FEW, *options), **{**given, **more})


@pytest.fixture(scope="module")
def told() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def run(encoder, tmp_path_factory, told) -> Path:
    out = tmp_path_factory.mktemp("runs") / "oadp"
    distil(encoder, out, listener=told)
    return out


def test_an_encoder_as_the_teacher_of_a_detector_makes_it_oadp(run, told) -> None:
    found = json.loads((run / "status.json").read_text())
    assert "method: oadp" in (run / "config.yaml").read_text()
    assert list(found["stages"]) == ["fit_teacher", "base", "embed", "distill", "package", "compare"]
    assert "object_loss" in (run / "metrics.csv").read_text()
    assert "object_loss" not in (run / "metrics.base.csv").read_text()
    assert any("training images without boxes of base classes are left out" in text for text in told.messages)
    assert {"val/ap50_base", "val/ap50_novel"} <= set(found["metrics"])


def test_the_package_is_the_detector_alone_with_its_texts(run) -> None:
    network, card = load_packaged(run / "model")
    assert isinstance(network, OpenVocabularyDetector)
    assert network.classes == tuple(CLASSES) and network.base == tuple(name not in NOVEL for name in CLASSES)
    assert network.spec.templates == ("a {}",) and card["origin"]["method"] == "oadp"
    names = set(load_file(run / "model" / "model.safetensors"))
    assert not [name for name in names if "block" in name and "roi_heads" in name]
    result = workflows.evaluate(model=str(run))
    assert 0 <= result.metrics["ap50_novel"] <= 100


def test_other_classes_are_looked_for_by_their_names(run, encoder, tmp_path) -> None:
    picture = tmp_path / "a.png"
    draw(0, 3, 48).image.save(picture)
    given = {"model": str(run), "images": [str(picture)], "min_score": 0.0}
    (found,) = workflows.predict(**given, classes=["teal crescent", "red circle"]).predictions
    assert found.labels and set(found.labels) <= {"teal crescent", "red circle"}
    (as_trained,) = workflows.predict(**given).predictions
    assert set(as_trained.labels) <= set(CLASSES)
    moved = write_encoder(tmp_path / "moved")  # the same weights in another place
    (again,) = workflows.predict(**given, classes=["teal crescent", "red circle"], encoder=str(moved)).predictions
    assert again.probs == found.probs and again.boxes == found.boxes
    for request, said in (
        ({"classes": ["red dog"]}, "no caption had: 'dog'"),
        ({"classes": ["red circle", " red circle"]}, "each of them once"),
        ({"classes": ["red circle"], "encoder": str(write_encoder(tmp_path / "other", seed=1))}, "other weights"),
        ({"encoder": str(encoder)}, "reads the names of --classes"),
    ):
        with pytest.raises(RequestError, match=said):
            workflows.predict(**given, **request)
    fixed = create_network(NetworkConfig(name=NET, pretrained=False), num_classes=2, in_training=True)
    with pytest.raises(RequestError, match="the classes that it was trained on"):
        take_classes(fixed, ["x"], model=NET)


def test_a_package_whose_encoder_has_gone_asks_where_it_lies(tmp_path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    distil(encoder, tmp_path / "run", *(f"options.{name}_weight=0" for name in WEIGHTS))
    network, _ = load_packaged(tmp_path / "run" / "model")
    network.model_args["open_vocabulary"]["encoder"] = str(tmp_path / "gone")
    save_package(network, tmp_path / "m", task="detection", classes=None, metrics={}, origin={})
    draw(0, 3, 48).image.save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="--encoder MODEL"):
        workflows.predict(model=str(tmp_path / "m"), images=[str(tmp_path / "a.png")], classes=["red circle"])


def test_heads_and_encoder_name_true_boxes(run, encoder) -> None:
    loader = SourceFileLoader("name_boxes", str(Path(__file__).parents[2] / "tools" / "name_boxes"))
    tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("name_boxes", loader))
    loader.exec_module(tool)
    rows = list(tool.rows_of(argparse.Namespace(runs=[run], encoder=str(encoder), area_ratio=8.0, limit=None)))
    assert [row["named_by"] for row in rows] == ["encoder", "box head", "object head"]
    assert all(tuple(row) == tool.COLUMNS and row["base_boxes"] > 0 for row in rows)
    assert all(0 <= float(row["base_right"]) <= 100 for row in rows)
    # what it says of the box head is what the head says of the box
    (image, *_), network = list(tool.validation(run, 1)), load_packaged(run / "model")[0].eval()
    (answer,) = {tuple(each.tolist()) for each in tool.by_heads(network, [image], both=False).values()}
    pixels = torch.from_numpy(np.asarray(image.picture)).permute(2, 0, 1)[None] / 255.0
    with torch.inference_mode():
        maps, heads = network.net.backbone(network.prepare(pixels)), network.second_stage
        pooled = heads.box_roi_pool(maps, [image.boxes])
        scores = heads.box_predictor(heads.box_head(pooled))[0].softmax(1)[:, heads.place]
    assert answer == tuple(scores.argmax(1).tolist())


def test_proposals_of_another_run_share_one_cache_and_give_pseudo_labels(run, encoder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    told, base = Recorder(), f"options.proposals={run}"
    distil(encoder, tmp_path / "one", base, listener=told)
    assert list(json.loads((tmp_path / "one" / "status.json").read_text())["stages"])[1:3] == ["embed", "distill"]
    assert any(text.startswith("Embeddings: 24 images in") for text in told.messages)
    again = Recorder()
    pseudo = (base, "options.pseudo_labels=true", "options.pseudo_min_score=0.001", "training.seed=1")
    distil(encoder, tmp_path / "two", *pseudo, listener=again)
    assert any("are taken" in text for text in again.messages)  # another seed, the same embeddings
    assert any(text.startswith("Pseudo labels:") and "of the 2 novel classes" in text for text in again.messages)
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 1
    with pytest.raises(RequestError, match="regions.area_ratio: the store has 8.0, this run 4.0"):
        (directory,) = (tmp_path / "cache" / "embeddings").iterdir()
        distil(encoder, tmp_path / "three", base, "options.area_ratio=4", f"options.embeddings={directory}")


def test_requests_that_cannot_work_are_refused_in_words(run, encoder, tmp_path) -> None:
    classifier = tmp_path / "classifier"
    workflows.train(
        model="cifar_resnet8", pretrained=False, data="shapes", epochs=1, batch_size=8, out=str(classifier),
        options=("data.shapes.num_train=8", "data.shapes.num_val=8", "data.workers=0", "report.enabled=false"),
    )  # fmt: skip
    for options, more, said in (
        ((), {"teacher": f"{encoder},{encoder}"}, "takes one image-text encoder, and 2 are named"),
        ((), {"teacher": str(classifier), "method": "oadp"}, "encodes images and no texts"),
        ((), {"student": "fcos_test_resnet"}, "no fasterrcnn on a backbone"),
        ((f"options.proposals={classifier}",), {}, "no first stage"),
        ((f"options.proposals={run}", 'data.novel=["red circle"]'), {}, "boxes of novel classes: red circle"),
        (("detection.scale=[0.5,2.0]",), {}, "embeddings are of whole images"),
        (("options.object_weight=1",), {}, "object_loss_weight"),
    ):
        with pytest.raises(RequestError, match=said):
            distil(encoder, tmp_path / "no", *options, **more)
    with pytest.raises(RequestError, match="no caption had: 'shapes'|no caption had"):
        distil(encoder, tmp_path / "no", "data.classes=null", "data.shapes.vocabulary=shapes", 'data.novel=["star"]',
               teacher=str(without_word(tmp_path)))  # fmt: skip
    assert not (tmp_path / "no").exists()


def without_word(tmp_path: Path) -> Path:
    """Return an encoder that has never read the word 'star'."""
    from tests.teachers import oadp_help

    words, kept = oadp_help.WORDS, tuple(word for word in oadp_help.WORDS if word != "star")
    oadp_help.WORDS = kept
    try:
        return oadp_help.write_encoder(tmp_path / "starless")
    finally:
        oadp_help.WORDS = words


def test_the_student_begins_with_weights_that_follow_from_the_seed(encoder) -> None:
    config = DistillConfig(
        student={"name": NET, "pretrained": False, "img_size": 48, "args": {"channels": 8}}, method="oadp",
        teachers=[{"name": str(encoder)}], training={"seed": 3},
        data={"classes": CLASSES, "novel": NOVEL, "shapes": {"vocabulary": "combinations", "size": 48}},
    )  # fmt: skip
    data = open_data("shapes", config=config.data, task="detection")
    found = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        plain = seeded_network(config.student, data=data, seed=3, role="student")
        work = EncoderWork(config, build_options(OADPOptions, {"head_convs": 1, "head_dim": 8}), data, Listener())
        found.append(work.student(plain).state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_an_encoder_of_open_clip_teaches_as_well(tmp_path) -> None:
    module = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 12, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    (tmp_path / "ViT-tiny-oadp.json").write_text(json.dumps(config))
    module.add_model_config(tmp_path / "ViT-tiny-oadp.json")
    torch.manual_seed(0)
    model = module.create_model("ViT-tiny-oadp", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    name = f"open_clip:ViT-tiny-oadp@{tmp_path}/weights.pt"
    distil(Path(name), tmp_path / "run", "data.shapes.num_train=8")
    network, _ = load_packaged(tmp_path / "run" / "model")
    assert network.spec.encoder == name and network.spec.dim == 12 and len(network.spec.templates) > 1
    with pytest.raises(RequestError, match="is an image-text encoder, not a network"):
        distil(Path(name), tmp_path / "no", method="fgd")
    with pytest.raises(RequestError, match="goes with no other method"):
        distil(Path(name), tmp_path / "no", "losses={oadp: {}, fgd: {}}", method=None, teacher=NET)


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_weights(encoder, tmp_path) -> None:
    settings = [word for option in (*DATA, *FEW) for word in ("-o", option)]
    settings += f"--teacher {encoder} --student {NET} --task detection --no-pretrained --data shapes".split()
    settings += "--epochs 3 --batch-size 4 -o training.checkpoint_every_s=0 -o options.objects_per_image=2".split()
    whole, out = tmp_path / "whole", tmp_path / "killed"
    first = start(whole, *settings)
    assert first.wait() == 0, first.stderr.read()

    def base_position() -> tuple[int, int]:
        file = out / "checkpoints" / "base" / "last.ckpt"
        return tuple(torch.load(file, weights_only=True)["position"]) if file.is_file() else (0, 0)

    moments = [
        lambda: base_position() >= (0, 2),
        lambda: (out / "embeddings" / "manifest.json").is_file(),
        lambda: status(out).get("stage") == "distill",
        lambda: position(out) >= (1, 2),
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
    assert killed == len(moments)
    expected, found = weights(whole), weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_share_the_embeddings(encoder, tmp_path) -> None:
    settings = [word for option in (*DATA, *FEW) for word in ("-o", option)]
    settings += f"--teacher {encoder} --student {NET} --task detection --no-pretrained --data shapes".split()
    process = start(
        tmp_path / "run", *settings, *"--epochs 1 --batch-size 4 --accelerator cpu --devices 2 --strategy ddp".split()
    )
    assert process.wait() == 0, process.stderr.read()
    network, _ = load_packaged(tmp_path / "run" / "model")
    assert all(value.isfinite().all() for value in network.state_dict().values() if value.is_floating_point())
