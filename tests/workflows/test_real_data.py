"""The main job on real photographs. Run with ``-m data``; VISIONKD_DATA names the folder of the archives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from visionkd import workflows

DATA = Path(os.environ.get("VISIONKD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
pytestmark = pytest.mark.data


def archive(name: str) -> str:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is absent: set VISIONKD_DATA to the folder that holds {name}")
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_cifar10_from_its_archive(tmp_path):
    data = archive("cifar10.tar.xz")
    options = ("data.limit_train=2000", "data.limit_val=500", "data.workers=0", "report.enabled=false")
    more = {"data": data, "options": options, "epochs": 2, "batch_size": 64}
    teacher = workflows.train(model="cifar_resnet8", pretrained=False, lr=0.01, out=str(tmp_path / "teacher"), **more)
    assert teacher.metrics["val/top1"] > 15.0  # chance is 10
    more["out"] = str(tmp_path / "student")
    student = workflows.distill(teacher=str(teacher.run), student="cifar_resnet8", pretrained=False, lr=0.01, **more)
    assert student.metrics["val/top1"] > 15.0


def test_photographs_are_sound():
    report = workflows.check_data(data=archive("imagenet_samples_shared.tar"))
    assert not report.unreadable


def test_blood_cells_are_sound():
    report = workflows.check_data(data=archive("bccd.tar"))
    assert not report.problems and report.num_images == {"train": 205, "val": 87, "test": 72}
    assert report.boxes["RBC"] > 4000 and not report.boxes["images without boxes"]
