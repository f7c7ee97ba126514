"""``zoo:`` names where a MODEL is taken: measured, timed, used, exported and taught from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.hub.zoo_server import card_values, entry, write_card
from visionkd import workflows
from visionkd.errors import RequestError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from tests.engines.onnx_graphs import CLASSES, SPEC, cnn  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(CLASSES):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for seed in range(2):
            values = np.random.default_rng(10 * number + seed).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(values).save(folder / f"{seed}.png")
    return tmp_path / "photos"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo with one model in three forms: a package, and ONNX files in float and INT8."""
    from visionkd.config.schema import NetworkConfig
    from visionkd.hub.package import save_package
    from visionkd.models.factory import create_network

    zoo = tmp_path / "zoo"
    network = create_network(
        NetworkConfig(name="cifar_resnet8", pretrained=False), classes=tuple(CLASSES), in_training=True
    ).eval()
    network.input = SPEC
    save_package(network, zoo / "w" / "tiny", task="classification", classes=None, metrics={}, origin={})
    cnn(zoo / "w" / "tiny" / "model.onnx")
    cnn(zoo / "w" / "tiny" / "model.int8.onnx", "cpu")

    def files(*names: str) -> list[dict[str, Any]]:
        return [
            entry(name, (zoo / "w" / "tiny" / name).read_bytes(), {"kind": "repository", "path": f"w/tiny/{name}"})
            for name in names
        ]

    artifacts = {
        "weights": {"format": "package", "files": files("model.safetensors", "model.json")},
        "onnx": {"format": "onnx", "files": files("model.onnx")},
        "int8": {"format": "onnx", "precision": "int8", "target": "cpu", "files": files("model.int8.onnx")},
    }
    write_card(zoo, card_values(artifacts=artifacts, num_classes=len(CLASSES)))
    monkeypatch.setenv("VISIONKD_ZOO", str(zoo))
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    return zoo


def test_every_form_is_measured(tiny: Path, photos: Path) -> None:
    package = tiny / "w" / "tiny"
    for name, backend, file in (
        ("zoo:tiny", None, package),
        ("zoo:tiny", "torch", package),
        ("zoo:tiny", "onnxruntime", package / "model.onnx"),
        ("zoo:tiny@int8", None, package / "model.int8.onnx"),
    ):
        found = workflows.evaluate(model=name, data=str(photos), backend=backend)
        assert found.model == name and found.num_images == 8
        assert found.metrics == workflows.evaluate(model=str(file), data=str(photos)).metrics
    with pytest.raises(RequestError, match="is not an ONNX file"):
        workflows.evaluate(model="zoo:tiny@weights", data=str(photos), backend="onnxruntime")


def test_images_are_labelled(tiny: Path, photos: Path) -> None:
    image = str(photos / CLASSES[0] / "0.png")
    for name, file in (("zoo:tiny", "."), ("zoo:tiny@onnx", "model.onnx")):
        found = workflows.predict(model=name, images=[image])
        known = workflows.predict(model=str(tiny / "w" / "tiny" / file), images=[image])
        assert found.predictions[0].probs == pytest.approx(known.predictions[0].probs)


def test_models_are_timed_under_their_names(tiny: Path) -> None:
    found = workflows.bench(models=["zoo:tiny", "zoo:tiny@int8"], backend=["onnxruntime"], rounds=1)
    assert [(row.model, row.values["precision"]) for row in found.rows] == [
        ("zoo:tiny", "fp32"),
        ("zoo:tiny@int8", "int8"),
    ]
    both = workflows.bench(models=["zoo:tiny"], backend=["torch", "onnxruntime"], rounds=1)
    assert [row.values["backend"] for row in both.rows] == ["torch", "onnxruntime"]
    with pytest.raises(RequestError, match="no engine of zoo:tiny"):
        workflows.bench(models=["zoo:tiny"], backend=["tensorrt"], rounds=1)


def test_a_teacher_from_the_zoo(tiny: Path, tmp_path: Path) -> None:
    from visionkd.config.schema import TeacherConfig
    from visionkd.models.factory import create_network

    teacher = create_network(TeacherConfig(name="zoo:tiny"), in_training=False)
    assert teacher.classes == tuple(CLASSES) and not teacher.training
    with pytest.raises(RequestError) as caught:
        workflows.distill(teacher=["zoo:tiny@int8", "zoo:tony"], student="cifar_resnet8", data="shapes")
    messages = [problem.message for problem in caught.value.problems]
    assert len(messages) == 2 and "is an ONNX file" in messages[0] and "has no model 'tony'" in messages[1]
    assert not list((tmp_path / "cache").rglob("*.onnx")), "nothing is fetched for a request that is wrong"


def test_a_device_without_torch(tiny: Path, photos: Path) -> None:
    """The card's first form needs torch: there the first ONNX file stands for the name."""
    code = """
import sys
for name in ("torch", "torchvision", "timm", "safetensors", "lightning", "onnx", "huggingface_hub"):
    sys.modules[name] = None
from visionkd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", "zoo:tiny", "--data", str(photos), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    known = workflows.evaluate(model=str(tiny / "w" / "tiny" / "model.onnx"), data=str(photos))
    assert found["model"] == "zoo:tiny" and found["metrics"]["top1"] == pytest.approx(known.metrics["top1"])


def test_importing_the_zoo_loads_nothing_heavy() -> None:
    code = (
        "import sys, visionkd; visionkd.zoo; print(sorted(name for name in sys.modules if name.startswith('visionkd')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert loaded.strip() == "['visionkd', 'visionkd.zoo']"
