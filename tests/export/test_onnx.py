from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError, WorkError
from visionkd.export import onnx as export_module
from visionkd.export.accuracy import Labels
from visionkd.export.onnx import export_onnx
from visionkd.export.verify import verify_onnx
from visionkd.models.factory import Network, create_network
from visionkd.runtime.session import open_session

CLASSES = ("a", "b", "c", "d", "é")


def make(name: str, img_size: int | None = 32) -> Network:
    torch.manual_seed(0)
    network = create_network(
        NetworkConfig(name=name, pretrained=False, img_size=img_size), classes=CLASSES, in_training=True
    )
    for module in network.modules():  # statistics of a trained network, so that folding them is put to the test
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return network


def images(network: Network, count: int = 19) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *network.input.img_size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path]:
    network = make("cifar_resnet8")
    path = tmp_path_factory.mktemp("export") / "deep" / "model.onnx"
    export_onnx(network, path, task="classification", classes=CLASSES, metrics={"top1": 12.5})
    return network, path


@pytest.fixture
def copied(exported: tuple[Network, Path], tmp_path: Path) -> tuple[Network, Path]:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported[1].read_bytes())
    return exported[0], path


@pytest.mark.parametrize(
    ("name", "img_size"),
    [
        ("test_vit", 32),
        ("test_convnext", 32),
        pytest.param("test_efficientnet", 32, marks=pytest.mark.slow),
        pytest.param("test_maxvit", 64, marks=pytest.mark.slow),  # exports with written-out attention only
        pytest.param("torchvision/mobilenet_v3_small", 64, marks=pytest.mark.slow),
        pytest.param("torchvision/resnet18", 64, marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_100", 64, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 64, marks=pytest.mark.slow),
    ],
)
def test_networks_export_silently_and_equal_pytorch(
    name: str, img_size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    network = make(name, img_size)
    export_onnx(network, tmp_path / "m.onnx", task="classification", classes=CLASSES, metrics={})
    assert capfd.readouterr() == ("", "") and not recwarn.list
    found = verify_onnx(network, tmp_path / "m.onnx", images(network))
    assert found.relative_diff < 1e-4 and found.agreement == 100.0 and found.batch_sizes == (1, 3, 16)


def test_the_file_describes_itself_and_nothing_of_this_machine(exported: tuple[Network, Path]) -> None:
    network, path = exported
    session = open_session(path)
    assert (session.classes, session.input, session.task) == (CLASSES, network.input, "classification")
    assert session.metadata["metrics"] == {"top1": 12.5} and session.metadata["architecture"] == "cifar_resnet8"
    assert len(session.metadata["weights_sha256"]) == 64
    assert session.metadata["complexity"]["macs_g"] == pytest.approx(0.0121, abs=0.001)
    content = path.read_bytes()
    assert str(Path(export_module.__file__).parents[1]).encode() not in content, (
        "no paths of the machine that exported it"
    )
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"], "one file"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["image"] and [v.name for v in model.graph.output] == [
        "logits"
    ]


def test_the_network_is_left_as_it_is(exported: tuple[Network, Path]) -> None:
    assert exported[0].training and next(exported[0].parameters()).requires_grad


def test_accuracy_and_difference_are_reported(copied: tuple[Network, Path]) -> None:
    network, path = copied
    batch = images(network)
    with torch.no_grad():
        targets = network.eval()(batch.float() / 255).logits.argmax(1).numpy()
    targets[0] = (targets[0] + 1) % 5
    found = verify_onnx(network, path, batch, Labels(targets))
    assert (
        found.num_images == 19
        and found.metric == "top1"
        and found.torch == found.exported == pytest.approx(100 * 18 / 19)
    )
    assert 0 <= found.max_abs_diff < 1e-4
    one = verify_onnx(network, path, batch[:1].float() / 255, Labels(targets[:1]))
    assert one.batch_sizes == (1, 2) and one.num_images == 1


def altered(path: Path, change) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def scale_first_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(tensor) * 1.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))


def other_input(model: onnx.ModelProto) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == "input")
    entry.value = json.dumps({**json.loads(entry.value), "crop_pct": 0.5})


@pytest.mark.parametrize(
    ("change", "words"), [(scale_first_weight, "differs from PyTorch by"), (other_input, "another input")]
)
def test_a_file_that_differs_is_removed(copied: tuple[Network, Path], change, words: str) -> None:
    network, path = copied
    altered(path, change)
    with pytest.raises(WorkError, match=words):
        verify_onnx(network, path, images(network))
    assert not path.exists()


def test_nan_is_a_difference(copied: tuple[Network, Path]) -> None:
    network, path = copied

    def poison(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        values = np.full(tensor.dims, np.nan, dtype=np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    altered(path, poison)
    with pytest.raises(WorkError, match="differs"):
        verify_onnx(network, path, images(network))


def test_nothing_is_left_when_the_check_or_the_export_fails(tmp_path: Path) -> None:
    network = make("cifar_resnet8")

    def check(path: Path) -> None:
        assert path.stat().st_size > 0
        raise WorkError("over tolerance")

    with pytest.raises(WorkError, match="over tolerance"):
        export_onnx(network, tmp_path / "m.onnx", task="classification", classes=None, metrics={}, check=check)
    network.net.forward = lambda image: image if image.sum() > 0 else -image  # a branch on values has no graph
    with pytest.raises(WorkError, match="cannot be exported"):
        export_onnx(network, tmp_path / "m.onnx", task="classification", classes=None, metrics={})
    assert list(tmp_path.iterdir()) == []


def test_a_network_beyond_one_file_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_SINGLE_FILE_BYTES", 1000)
    with pytest.raises(WorkError, match="2 GB"):
        export_onnx(make("cifar_resnet8"), tmp_path / "m.onnx", task="classification", classes=None, metrics={})


def test_another_operator_set_is_never_taken_silently(tmp_path: Path) -> None:
    network = make("cifar_resnet8")
    written = export_onnx(network, tmp_path / "m.onnx", task="classification", classes=None, metrics={}, opset=21)
    assert written.opset == 21 == onnx.load(tmp_path / "m.onnx").opset_import[0].version
    with pytest.raises(RequestError, match="--opset: .*opset 99"):
        export_onnx(network, tmp_path / "n.onnx", task="classification", classes=None, metrics={}, opset=99)
    assert not (tmp_path / "n.onnx").exists()
