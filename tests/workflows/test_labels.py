"""The label store in whole runs: the same student as without it, however the run goes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionkd import workflows
from visionkd.config.load import load_config
from visionkd.config.schema import DistillConfig
from visionkd.data.open import open_data
from visionkd.errors import RequestError
from visionkd.methods.kd import KD, KDOptions
from visionkd.teachers.store import LabelStore
from visionkd.types import Listener
from visionkd.workflows._labels import _other_teachers_or_data, resolve_label_store

#: 40 images do not fill the last of the batches of 16, so each pass leaves some out.
SMALL = (
    "data.shapes.num_train=40", "data.shapes.num_val=16", "data.workers=0", "report.enabled=false",
    "fit_teacher.max_images=16", "optimizer.name=sgd", "options.temperature=2.0",
)  # fmt: skip


class Hears(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text, *, level="info"):
        self.said.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(out: Path, *options: str, teacher: str = "cifar_resnet8", epochs: int = 4, **given) -> tuple[dict, list[str]]:
    listener = Hears()
    workflows.distill(
        **{
            "teacher": teacher, "student": "cifar_resnet8", "method": "kd", "epochs": epochs, "batch_size": 16,
            "pretrained": False, "out": str(out), "options": [*SMALL, *options], "listener": listener, **given,
        }
    )  # fmt: skip
    return load_file(out / "model" / "model.safetensors"), listener.said


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def saving(said: list[str]) -> str:
    return next(text for text in said if text.startswith("Teacher labels"))


def test_a_stored_teacher_trains_the_same_student_as_the_one_that_runs(tmp_path):
    online, said = run(tmp_path / "online", "label_store.views=2", cache_teacher=False)
    assert not any("Teacher labels" in text for text in said)
    stored, said = run(tmp_path / "stored", "label_store.views=2", cache_teacher=True)
    assert "the teachers run in 2 of the 4 epochs" in saving(said)
    for name in online:  # labels that the first pass left out come from batches of another size
        torch.testing.assert_close(stored[name], online[name], rtol=1e-4, atol=1e-5)
    again, said = run(tmp_path / "again", "label_store.views=2", cache_teacher=True)
    assert "do not run at all" in saving(said) and same(again, stored)
    ahead, said = run(
        tmp_path / "ahead", "label_store.views=2", "label_store.ahead=true", "label_store.path=" + str(tmp_path / "s")
    )
    for name in online:
        torch.testing.assert_close(ahead[name], online[name], rtol=1e-4, atol=1e-5)


def test_other_students_and_seeds_share_a_store(tmp_path, cache):
    run(tmp_path / "a", "label_store.views=2", cache_teacher=True)
    _, said = run(tmp_path / "b", "label_store.views=2", cache_teacher=True, student="cifar_resnet14", seed=0)
    assert "do not run at all" in saving(said)
    assert len(list((cache / "labels").iterdir())) == 1


def test_a_complete_store_needs_no_teacher(tmp_path, monkeypatch):
    run(tmp_path / "a", "label_store.views=1", cache_teacher=True, epochs=2)
    calls = []
    from visionkd.methods._base import DistillationModule

    forward = DistillationModule.teacher_outputs
    monkeypatch.setattr(
        DistillationModule, "teacher_outputs", lambda self, image: calls.append(len(image)) or forward(self, image)
    )
    run(tmp_path / "b", "label_store.views=1", cache_teacher=True, epochs=2)
    assert not calls


def test_several_teachers_are_stored_as_one(tmp_path, cache):
    options = ("label_store.views=1",)
    two = "cifar_resnet8,cifar_resnet14"
    online, _ = run(tmp_path / "a", *options, teacher=two, cache_teacher=False, epochs=2)
    stored, _ = run(tmp_path / "b", *options, teacher=two, cache_teacher=True, epochs=2)
    for name in online:
        torch.testing.assert_close(stored[name], online[name], rtol=1e-4, atol=1e-5)
    (store,) = (cache / "labels").iterdir()
    assert len(json.loads((store / "manifest.json").read_text())["key"]["teachers"]) == 2


def test_several_views_of_each_image(tmp_path):
    options = ("label_store.views=4", "label_store.views_per_image=2", "augment.mixup_alpha=0.2")
    online, _ = run(tmp_path / "a", *options, "augment.mixup_alpha=0", cache_teacher=False)
    stored, _ = run(tmp_path / "b", *options, "augment.mixup_alpha=0", cache_teacher=True)
    assert same(online, stored)  # no view comes twice here, so all labels come from the batches they are used in
    mixed, _ = run(tmp_path / "c", *options, cache_teacher=True)
    assert not same(mixed, stored)


def test_a_store_of_something_else_is_refused_with_what_differs(tmp_path):
    place = f"label_store.path={tmp_path / 'store'}"
    run(tmp_path / "a", "label_store.views=1", place, cache_teacher=True, epochs=1)
    for key, changed in (
        ("augment.hflip", {"options": ["augment.hflip=0.25"]}),
        ("data.fingerprint", {"options": ["data.shapes.seed=3"]}),
        ("temperature", {"options": ["options.temperature=3.0"]}),
        ("teachers.0.weights", {"options": ["fit_teacher.max_images=24"]}),
        ("teachers.0.architecture", {"teacher": "cifar_resnet14"}),
    ):
        extra = changed.pop("options", [])
        with pytest.raises(RequestError) as caught:
            run(
                tmp_path / "b",
                "label_store.views=1",
                place,
                *extra,
                cache_teacher=True,
                epochs=1,
                overwrite=True,
                **changed,
            )
        assert key in str(caught.value)


def test_a_store_is_called_near_only_where_teachers_and_images_are_the_same():
    others = ("data.name", "data.fingerprint", "classes", "teachers.0.weights", "teachers.1.input.mean", "teachers")
    same = ("temperature", "augment.crop", "teachers.0.precision", "versions.torch")
    assert all(map(_other_teachers_or_data, others)) and not any(map(_other_teachers_or_data, same))


def test_a_damaged_shard_is_rebuilt(tmp_path, cache):
    first, _ = run(tmp_path / "a", "label_store.views=1", cache_teacher=True, epochs=2)
    (store,) = (cache / "labels").iterdir()
    (shard,) = store.rglob("*.shard")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))
    again, said = run(tmp_path / "b", "label_store.views=1", cache_teacher=True, epochs=2)
    assert any("damaged" in text for text in said)
    for name in first:
        torch.testing.assert_close(again[name], first[name], rtol=1e-4, atol=1e-5)
    _, said = run(tmp_path / "c", "label_store.views=1", cache_teacher=True, epochs=2)
    assert "do not run at all" in saving(said)


SCRIPT = """
import sys
from visionkd import workflows
from visionkd.types import Listener
options = sys.argv[2].split(",")
workflows.distill(teacher="cifar_resnet8", student="cifar_resnet8", method="kd", epochs=4, batch_size=16,
    pretrained=False, out=sys.argv[1], options=options, cache_teacher=True, resume=sys.argv[3] == "resume")
"""


def test_a_run_killed_while_it_fills_the_store_resumes_to_the_same_bits(tmp_path, cache):
    options = ",".join(
        (*SMALL, "label_store.views=2", "data.shapes.num_train=4000", "data.cache=none", "training.log_every=1")
    )
    options = options.replace("data.shapes.num_train=40,", "")

    def start(out: str, resume: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / out), options.replace("=4000", "=240"), resume]
        )

    assert start("whole", "new").wait(timeout=300) == 0
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    shutil.rmtree(cache)
    process = start("killed", "new")
    deadline = time.monotonic() + 200
    while not list(cache.glob("labels/*/*journal*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = (tmp_path / "killed" / "model").exists()
    assert not done, "the run was over before it was killed"
    assert start("killed", "resume").wait(timeout=300) == 0
    assert same(whole, load_file(tmp_path / "killed" / "model" / "model.safetensors"))


def resolved(*options: str, method=KD, method_options=None):
    base = ["student.name=a", 'teachers=[{"name": "b"}]', "data.shapes.num_train=100"]
    config = load_config(DistillConfig, options=[*base, *options])
    data = open_data("shapes", config=config.data)
    said = resolve_label_store(config, method, method_options or KDOptions(), data)
    return config.label_store, said


def test_auto_keeps_labels_where_views_repeat():
    assert resolved("training.epochs=20")[0].mode == "on"
    store, _ = resolved("training.epochs=300")
    assert (store.mode, store.views, store.storage) == ("on", 75, "full")
    assert resolved("training.epochs=10")[0].mode == "off"
    assert resolved("training.epochs=300", "augment.mixup_alpha=0.2")[0].mode == "off"
    assert resolved("training.epochs=300", "label_store.mode=off")[0].mode == "off"
    assert resolved("training.epochs=3", "label_store.mode=on")[0].views == 3


def test_auto_leaves_the_disk_alone_where_it_is_nearly_full(monkeypatch):
    monkeypatch.setattr("visionkd.workflows._labels._free_bytes", lambda path: 1000)
    store, said = resolved("training.epochs=300")
    assert store.mode == "off" and "--cache-teacher" in said[0]


def test_a_method_that_needs_more_than_probabilities_is_refused():
    class Needy(KD):
        needs = frozenset({"features"})

    assert resolved("training.epochs=300", method=Needy)[0].mode == "off"
    with pytest.raises(RequestError, match="--cache-teacher"):
        resolved("label_store.mode=on", method=Needy)


def test_the_store_is_closed_whatever_happens(tmp_path, monkeypatch):
    closed = []
    close = LabelStore.close
    monkeypatch.setattr(LabelStore, "close", lambda self: closed.append(1) or close(self))
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(KD, "distill_loss", lambda self, **_: 1 / 0)
        run(tmp_path / "a", "label_store.views=1", cache_teacher=True)
    assert closed
