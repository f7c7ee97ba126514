"""Runs with images that have no labels: beside a labelled data set, and instead of one. Through the command line."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.workflows.conftest import TINY
from visionkd.cli.main import main
from visionkd.config.schema import DataConfig
from visionkd.data.open import open_data
from visionkd.data.shapes import ShapesSource
from visionkd.data.subset import SubsetSource
from visionkd.data.unlabeled import open_unlabeled
from visionkd.methods._teachers import FrozenTeachers
from visionkd.models.package_file import read_card
from visionkd.types import Listener
from visionkd.workflows import _unlabeled_work
from visionkd.workflows._export_onnx import verification_images
from visionkd.workflows._networks import image_batches, load_network

NUM_NEW, NUM_VAL, NUM_TRAIN = 24, 8, 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """New scenes, re-encoded scenes of the validation split, copied scenes of the training split, and a broken file."""
    root = tmp_path_factory.mktemp("pool")
    shapes = {"num_train": 128, "num_val": 32, "size": 32}
    splits = open_data("shapes", config=DataConfig(shapes=shapes)).splits
    (root / "new" / "deep").mkdir(parents=True)
    for number in range(NUM_NEW):
        ShapesSource(7, NUM_NEW, 32).load(number).save(root / "new" / "deep" / f"{number}.png")
    for number in range(NUM_VAL):
        splits["val"].load(number).save(root / f"leak{number}.jpg", quality=90)
    for number in range(NUM_TRAIN):
        splits["train"].load(number).save(root / "new" / f"known{number}.png")
    (root / "broken.png").write_bytes(b"nothing")
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A folder of pictures and nothing else."""
    root = tmp_path_factory.mktemp("plain")
    for number in range(48):
        ShapesSource(9, 48, 32).load(number).save(root / f"{number:02d}.png")
    return root


def visionkd(teacher: Path, out: Path, *words: str, method: str = "ssld", data: str = "shapes") -> int:
    options = [word for option in (*TINY, "student.img_size=32", "data.cache=none") for word in ("-o", option)]
    given = ["--teacher", str(teacher), "--student", "cifar_resnet8", "--no-pretrained", "--data", data]
    budget = ["--epochs", "1", "--batch-size", "32"]
    return main(["distill", *given, "--method", method, *budget, "--out", str(out), *options, *words])


def left_out(run: Path) -> dict[str, dict[str, str]]:
    with (run / "unlabeled" / "left_out.csv").open(encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def messages(run: Path) -> str:
    return "\n".join(text for _, text in json.loads((run / "status.json").read_text())["messages"])


@pytest.fixture(scope="module")
def with_pool(teacher_run, pool, tmp_path_factory):
    out = tmp_path_factory.mktemp("ssld") / "run"
    assert visionkd(teacher_run, out, "--unlabeled", str(pool), "-o", "options.finetune_epochs=1") == 0
    return out


def test_copies_of_held_out_and_training_images_are_left_out_and_named(with_pool):
    rows = left_out(with_pool)
    for number in range(NUM_VAL):
        assert rows[f"leak{number}.jpg"]["reason"] == "shows what a held-out image shows"
        assert rows[f"leak{number}.jpg"]["like_split"] == "val"
    for number in range(NUM_TRAIN):
        assert rows[f"new/known{number}.png"]["reason"] == "shows what a training image shows"
    assert rows["broken.png"]["reason"] == "cannot be read"
    assert len(rows) <= NUM_VAL + NUM_TRAIN + 3  # of so simple scenes one may resemble another by chance


def test_counts_are_said(with_pool):
    kept = NUM_NEW + NUM_VAL + NUM_TRAIN + 1 - len(left_out(with_pool))
    assert f"Training on 128 labelled + {kept} unlabelled images" in messages(with_pool)
    assert f"1 epoch of {128 + kept} images" in messages(with_pool)


def test_stage_two_goes_on_from_stage_one(with_pool):
    done = json.loads((with_pool / "status.json").read_text())["stages"]
    assert list(done)[:4] == ["fit_teacher", "unlabeled", "distill", "finetune"]
    first, second = load_file(with_pool / "stages" / "distill" / "model.safetensors"), weights(with_pool)
    name = next(name for name, value in first.items() if value.ndim == 4)
    change = (first[name] - second[name]).abs().max()
    assert 0 < change < 1e-3  # one epoch at a hundredth of the rate
    rows = list(csv.DictReader((with_pool / "metrics.finetune.csv").open()))
    assert "ssld_loss" in rows[0] and "task_loss" not in rows[0]


def test_both_stages_share_a_label_store(teacher_run, pool, tmp_path, monkeypatch):
    asked = []
    original = FrozenTeachers.run
    monkeypatch.setattr(FrozenTeachers, "run", lambda self, image: asked.append(len(image)) or original(self, image))
    words = ["-o", "options.finetune_epochs=1", "-o", "label_store.ahead=true", "--cache-teacher"]
    assert visionkd(teacher_run, tmp_path / "run", "--unlabeled", str(pool), *words) == 0
    (store,) = (tmp_path / "cache" / "labels").iterdir()
    assert sum(asked) == json.loads((store / "manifest.json").read_text())["num_samples"] > 128  # each image once


def test_a_killed_comparison_goes_on_where_it_was_and_ends_the_same(
    teacher_run, pool, with_pool, tmp_path, monkeypatch
):
    monkeypatch.setattr(_unlabeled_work, "_PART", 16)
    original, seen = _unlabeled_work.signatures, []

    def watched(source, start, stop):
        if len(seen) == 12:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append((len(source), start))
        return original(source, start, stop)

    monkeypatch.setattr(_unlabeled_work, "signatures", watched)
    out = tmp_path / "killed"
    words = ("--unlabeled", str(pool), "-o", "options.finetune_epochs=1")
    assert visionkd(teacher_run, out, *words) == 130
    assert main(["distill", "--resume", "--out", str(out)]) == 0
    done = [part for part in seen if part != "stopped"]
    assert len(done) == len(set(done)) > 12  # nothing twice
    assert left_out(out) == left_out(with_pool)
    assert all(torch.equal(value, weights(with_pool)[name]) for name, value in weights(out).items())
    assert not (out / "unlabeled" / "parts").exists()


def test_another_pool_is_refused_on_resume(with_pool, pool, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(with_pool, moved)
    extra = pool / "zz.png"
    shutil.copy(pool / "new" / "deep" / "0.png", extra)
    try:
        assert main(["distill", "--resume", "--out", str(moved)]) == 2
    finally:
        extra.unlink()
    assert "has changed since the run was started" in capsys.readouterr().err


def test_the_teacher_chooses_the_surest_of_each_class(teacher_run, pool, tmp_path):
    out = tmp_path / "chosen"
    words = ("--unlabeled", str(pool), "-o", "data.unlabeled_per_class=2", "-o", "data.near_duplicates=keep")
    assert visionkd(teacher_run, out, *words, "-o", "report.enabled=false") == 0
    assert set(Counter(row["reason"] for row in left_out(out).values())) == {"not among the surest of its class"}
    source = open_unlabeled(pool).sources["all"]
    kept = [index for index in range(len(source)) if source.name(index) not in left_out(out)]
    teacher = load_network(str(teacher_run)).eval()
    chosen = SubsetSource(source, np.array(kept))
    with torch.no_grad():
        batches = image_batches(chosen, teacher, batch_size=64, workers=0)
        classes = torch.cat([teacher(image).logits.argmax(1) for image, _ in batches])
    assert len(classes) == len(kept) and max(Counter(classes.tolist()).values()) <= 2


@pytest.fixture(scope="module")
def without_labels(teacher_run, plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain_run") / "run"
    assert visionkd(teacher_run, out, "-o", "data.val_fraction=0.25", data=str(plain), method="auto") == 0
    return out


def test_a_folder_without_labels_is_enough_and_agreement_is_not_called_accuracy(without_labels, teacher_run):
    card = read_card(without_labels / "model")
    assert card["classes"] == read_card(teacher_run / "model")["classes"]
    assert "agreement with the teacher, not accuracy" in card["metrics_note"]
    comparison = json.loads((without_labels / "comparison.json").read_text())
    assert comparison["note"] == card["metrics_note"] and comparison["num_images"] == 12
    assert [row["top1"] for row in comparison["rows"] if row["role"] == "teacher"] == [100.0]
    page = (without_labels / "report.html").read_text()
    assert "agreement with the teacher, not accuracy" in page and "of the teacher's accuracy" not in page
    assert "<img" in page or "data:image" in page
    assert "top-1 is agreement" in messages(without_labels)
    assert card["origin"]["method"] == "ssld"  # what auto takes without labels


def test_targets_without_labels_are_the_teachers_answers(without_labels):
    with np.load(without_labels / "evaluation.npz") as arrays:
        assert np.array_equal(arrays["targets"], arrays["teacher_probs"].argmax(1))


def test_export_measures_no_accuracy_without_labels(plain, teacher_run):
    source = open_unlabeled(plain).sources["all"]
    images, targets = verification_images(load_network(str(teacher_run)), source, 8, Listener())
    assert len(images) == 8 and targets is None


def test_evaluation_needs_labels(without_labels, capsys):
    assert main(["eval", str(without_labels)]) == 1
    assert "no class folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, method, code, said",
    [
        (["--unlabeled", "EMPTY"], "ssld", 1, "no images in"),
        (["--unlabeled", "nowhere"], "ssld", 2, "'nowhere' does not exist"),
        (["--unlabeled", "POOL"], "kd", 2, "kd learns from labels"),
        (["--data", "PLAIN"], "kd", 1, "48 images but no class folders, and kd learns from labels"),
        (["--data", "PLAIN", "--fit-teacher", "probe"], "ssld", 2, "probe needs labels"),
        (["--data", "EMPTY"], "ssld", 1, "no images in"),
        (["-o", "data.unlabeled_per_class=3"], "ssld", 2, "Give --unlabeled DIR"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    teacher_run, pool, plain, tmp_path, capsys, words, method, code, said
):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "POOL": str(pool), "PLAIN": str(plain)}
    assert visionkd(teacher_run, tmp_path / "run", *[places.get(word, word) for word in words], method=method) == code
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_pool_of_nothing_but_copies_is_refused(teacher_run, pool, tmp_path, capsys):
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(NUM_VAL):
        shutil.copy(pool / f"leak{number}.jpg", copies)
    assert visionkd(teacher_run, tmp_path / "run", "--unlabeled", str(copies)) == 1
    assert "None of the 8 unlabelled images" in capsys.readouterr().err


def test_supervised_training_refuses_a_pool(pool, tmp_path, capsys):
    words = ["--model", "cifar_resnet8", "--no-pretrained", "--out", str(tmp_path / "run")]
    assert main(["train", *words, "-o", f"data.unlabeled={pool}"]) == 2
    assert "data.unlabeled: supervised training learns from labels" in capsys.readouterr().err
