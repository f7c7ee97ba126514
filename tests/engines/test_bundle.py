"""What travels to a device: complete, whole, and enough to work without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import CLASSES, METADATA, SPEC, cnn, vit
from PIL import Image

from visionkd import workflows
from visionkd.cli.main import main
from visionkd.errors import DataError, RequestError
from visionkd.export.bundle import write_bundle
from visionkd.files import sha256
from visionkd.runtime.bundle_file import file_to_run, is_bundle, read_bundle

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "README.md", "labels.txt", "manifest.json", "preprocessing.json", "model.int8.onnx", "model.int8.tensorrt.onnx",
}  # fmt: skip


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Looks like a run whose student was exported for both targets."""
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    cnn(folder / "model.onnx")
    cnn(folder / "model.int8.onnx", "cpu")
    cnn(folder / "model.int8.tensorrt.onnx", "int8")
    return folder.parent


@pytest.fixture
def bundle(run_directory: Path, tmp_path: Path) -> Path:
    workflows.export(model=str(run_directory), bundle=str(tmp_path / "bundle"))
    return tmp_path / "bundle"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures of each class, in its colour, which is what a mean of the channels can tell."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(2):
            pixels = random.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def test_a_bundle_holds_both_targets_and_says_what_they_are(bundle: Path, run_directory: Path) -> None:
    assert {path.name for path in bundle.iterdir()} == FILES
    for name in ("model.int8.onnx", "model.int8.tensorrt.onnx"):
        assert (bundle / name).read_bytes() == (run_directory / "export" / name).read_bytes()
    assert (bundle / "labels.txt").read_text(encoding="utf-8").splitlines() == CLASSES
    written = json.loads((bundle / "preprocessing.json").read_text(encoding="utf-8"))
    assert written["input"] == SPEC.to_dict() | {"img_size": [32, 32], "mean": list(SPEC.mean), "std": list(SPEC.std)}
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["origin"], manifest["task"], manifest["architecture"]) == ("run", "classification", "tiny")
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256(bundle / name) and entry["bytes"] == (bundle / name).stat().st_size
    kinds = {name: entry["kind"] for name, entry in manifest["files"].items()}
    assert (kinds["model.int8.onnx"], kinds["model.int8.tensorrt.onnx"]) == ("int8-cpu", "int8-tensorrt")
    text = (bundle / "README.md").read_text(encoding="utf-8")
    for command in ("pip install visionkd", "visionkd export . --format tensorrt", "visionkd bench model.int8.engine"):
        assert command in text
    assert not [path for path in bundle.parent.iterdir() if path.name.endswith(".tmp")]


def test_a_float_model_is_bundled_and_the_lack_of_int8_said(tmp_path: Path, capsys) -> None:
    file = cnn(tmp_path / "m.onnx")
    assert main(["export", str(file), "--bundle", str(tmp_path / "b")]) == 0
    assert "holds a float model only" in capsys.readouterr().err
    assert (tmp_path / "b" / "model.onnx").is_file()
    assert "visionkd bench model.engine" in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")


def test_each_backend_finds_its_file(bundle: Path, machine, run_directory: Path) -> None:
    assert file_to_run(str(bundle)).endswith("model.int8.onnx")
    assert read_bundle(bundle).onnx("tensorrt").name == "model.int8.tensorrt.onnx"
    assert file_to_run("resnet18") == "resnet18" and is_bundle(bundle) and not is_bundle(run_directory)
    with pytest.raises(RequestError, match="no engine was built in the bundle"):
        file_to_run(str(bundle), "tensorrt")
    (bundle / "model.int8.engine").write_bytes(b"")
    assert file_to_run(str(bundle)).endswith("model.int8.onnx"), "there is no GPU"
    machine()
    assert file_to_run(str(bundle)).endswith("model.int8.engine")
    assert file_to_run(str(bundle), "onnxruntime").endswith("model.int8.onnx")


def test_what_changed_or_is_missing_is_named(bundle: Path, capsys) -> None:
    with open(bundle / "labels.txt", "a", encoding="utf-8") as file:
        file.write("black\n")
    (bundle / "model.int8.tensorrt.onnx").unlink()
    with pytest.raises(DataError, match=r"labels.txt has SHA-256 .*") as caught:
        read_bundle(bundle)
    assert "model.int8.tensorrt.onnx is missing" in caught.value.message
    assert main(["bench", str(bundle)]) == 1 and "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error", "reason"),
    [
        ("{", DataError, "cannot be read"),
        ("[]", DataError, "cannot be read"),
        ('{"format": 2, "files": {}}', RequestError, "format 2"),
        ('{"format": 1, "files": {"../x": {"kind": "float", "sha256": "0"}}}', DataError, "outside of the bundle"),
        ('{"format": 1, "files": {}}', RequestError, "no ONNX file for onnxruntime"),
    ],
)
def test_manifests_that_are_no_use(tmp_path: Path, text: str, error: type[Exception], reason: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=reason):
        file_to_run(str(tmp_path))


def test_a_bundle_is_replaced_only_where_asked_and_nothing_else_ever(bundle: Path, tmp_path: Path) -> None:
    file = cnn(tmp_path / "m.onnx")
    with pytest.raises(RequestError, match="nothing is written over unasked"):
        workflows.export(model=str(file), bundle=str(bundle))
    workflows.export(model=str(file), bundle=str(bundle), overwrite=True)
    assert (bundle / "model.onnx").is_file() and not (bundle / "model.int8.onnx").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RequestError, match="exists and is no bundle"):
        workflows.export(model=str(file), bundle=str(other), overwrite=True)
    assert (other / "thesis.txt").is_file()


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = cnn(tmp_path / "a.onnx"), vit(tmp_path / "b.onnx", metadata=METADATA | {"architecture": "other"})
    with pytest.raises(RequestError, match="of several models: their architecture differs"):
        write_bundle([first, second], tmp_path / "b", origin="x")
    with pytest.raises(RequestError, match="one file of each kind"):
        write_bundle([first, cnn(tmp_path / "c.onnx")], tmp_path / "b", origin="x")
    with pytest.raises(RequestError, match="was not exported by visionkd"):
        write_bundle([cnn(tmp_path / "d.onnx", metadata={})], tmp_path / "b", origin="x")
    with pytest.raises(RequestError, match="is an engine"):
        workflows.export(model="x.engine", bundle=str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_options_that_do_not_go_together(tmp_path: Path, capsys) -> None:
    file = str(cnn(tmp_path / "m.onnx"))
    assert main(["export", file, "--bundle", str(tmp_path / "b"), "--dla", "0", "--batch", "4"]) == 2
    err = capsys.readouterr().err
    assert "--dla: is for engines only" in err and "--batch: is for engines only" in err
    assert main(["export", file, "--format", "tensorrt", "--bundle", str(tmp_path / "b")]) == 2
    assert "--bundle: does not go with --format tensorrt" in capsys.readouterr().err


#: Stands in front of the command line: what a device lacks cannot be imported.
LEAN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "timm", "lightning", "torchmetrics", "safetensors", "onnx",
                                  "onnxscript", "onnx_ir"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None
from visionkd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def work_on_the_device(command: list[str], bundle: Path, photos: Path, environment: dict[str, str]) -> None:
    """Predict, evaluate and time the bundle, and ask for an engine."""

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *argv], capture_output=True, text=True, timeout=120, cwd=bundle.parent, env=environment
        )

    predicted = call("predict", str(bundle), str(photos / "red" / "0.png"), "--json")
    assert predicted.returncode == 0, predicted.stderr
    (prediction,) = json.loads(predicted.stdout)["predictions"]
    assert set(prediction["labels"]) == set(CLASSES) and abs(sum(prediction["probs"]) - 1.0) < 1e-5
    evaluated = call("eval", str(bundle), "--data", str(photos), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert found["num_images"] == 8 and 0.0 <= found["metrics"]["top1"] <= 100.0
    timed = call("bench", str(bundle), str(bundle / "model.int8.tensorrt.onnx"), "--rounds", "1", "--json")
    assert timed.returncode == 0, timed.stderr
    rows = json.loads(timed.stdout)["rows"]
    assert [Path(row["model"]).name for row in rows] == ["model.int8.onnx", "model.int8.tensorrt.onnx"]
    assert all(row["values"]["latency_ms"] > 0 and row["values"]["precision"] == "int8" for row in rows)
    assert all(row["values"]["backend"] == "onnxruntime" for row in rows)
    built = call("export", str(bundle), "--format", "tensorrt")
    assert built.returncode == 2 and "needs TensorRT, which is not installed" in built.stderr, built.stderr
    assert "JetPack" in built.stderr


def test_the_bundle_works_without_torch(bundle: Path, photos: Path) -> None:
    pytest.importorskip("onnxruntime")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VISIONKD_CACHE": str(bundle.parent / "cache")}
    work_on_the_device([sys.executable, "-c", LEAN], bundle, photos, environment)


@pytest.mark.slow
def test_the_bundle_works_where_only_the_base_is_installed(bundle: Path, photos: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", str(ROOT), "onnxruntime"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=280)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install here: {done.stderr.strip()[-200:]}")
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, timeout=60).stdout.lower()
    assert "visionkd" in listed and "torch" not in listed and "\nonnx " not in listed
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VISIONKD_CACHE": str(tmp_path / "cache")}
    work_on_the_device([str(home / "bin" / "visionkd")], bundle, photos, environment)
