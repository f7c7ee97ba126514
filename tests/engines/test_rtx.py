"""Real engines, by the builder of TensorRT-RTX, which needs no GPU: NVIDIA's own parser reads what is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_graphs import cnn, vit

from visionkd import workflows
from visionkd.cli.main import main
from visionkd.errors import RequestError, WorkError
from visionkd.export.tensorrt import EngineOptions, build_engine
from visionkd.runtime.engine_file import EngineInfo, read_engine

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
ADA = "8.9"


def build(file: Path, **options: object) -> EngineInfo:
    chosen = EngineOptions(compute_capability=ADA, batch=(1, 4, 16), **options)  # type: ignore[arg-type]
    return build_engine(file, file.with_suffix(".engine"), library="tensorrt_rtx", options=chosen)


@pytest.mark.parametrize("make", [cnn, vit])
def test_int8_engines_are_smaller_than_float_ones(make, tmp_path: Path) -> None:
    """With weights of some megabytes, which weigh more than the kernels that come with them."""
    width = 512 if make is cnn else 256
    found = {form: build(make(tmp_path / f"{form}.onnx", form, width=width)) for form in ("float", "int8")}
    weights_mb = 4 * (512 * 512 * 9 if make is cnn else 12 * 256**2) / 1e6
    saved_mb = (found["float"].engine_bytes - found["int8"].engine_bytes) / 1e6
    assert saved_mb > 0.5 * weights_mb
    assert (found["int8"].quantized, found["float"].quantized) == (True, False)
    assert found["int8"].typing == "strong" and found["int8"].compute_capabilities == (ADA,)
    info, engine = read_engine(tmp_path / "int8.engine")
    assert len(engine) == info.engine_bytes and info.device is None and info.layers == {}


def test_half_makes_a_float_engine_smaller(tmp_path: Path) -> None:
    file = cnn(tmp_path / "m.onnx", width=256)
    sizes = [build(file, precision=precision).engine_bytes for precision in ("fp32", "fp16")]
    assert sizes[1] < 0.8 * sizes[0]


def test_half_around_int8_is_taken(tmp_path: Path) -> None:
    assert build(vit(tmp_path / "m.onnx", "int8"), precision="fp16").precision == "fp16"


def test_the_parser_refuses_integer_biases(tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    file = cnn(tmp_path / "m.onnx", "int8")
    model = onnx.load(file)
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    for name, value in {"b": np.ones(8, np.int32), "bs": np.full(8, 0.01, np.float32)}.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    conv.input[2] = "bd"
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0))
    onnx.save(model, file)
    with pytest.raises(WorkError, match="Int32"):
        build(file)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_what_rtx_does_not_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cnn(tmp_path / "m.onnx", "int8")
    argv = ["export", str(file), "--format", "tensorrt", "--builder", "tensorrt_rtx"]
    assert main([*argv, "--compute-capability", "8.7"]) == 2
    assert "does not build for 8.7. Known: 7.5, 8.0" in capsys.readouterr().err
    assert main([*argv, "--compute-capability", ADA, "--dla", "0"]) == 2
    assert "--dla: TensorRT-RTX builds for GPUs only" in capsys.readouterr().err
    assert main([*argv, "--compute-capability", ADA, "--batch", "many"]) == 2
    assert "--batch: 'many' is neither N nor SMALLEST:BEST:LARGEST" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_the_command_builds_beside_the_file_and_says_what_was_not_done(tmp_path: Path, capsys) -> None:
    file = cnn(tmp_path / "model.int8.tensorrt.onnx", "int8")
    argv = ["export", str(file), "--format", "tensorrt", "--compute-capability", ADA]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "int8 and fp32" in captured.out and "neither run nor compared here" in captured.err
    assert (tmp_path / "model.int8.engine").is_file()
    assert main(argv) == 2, "nothing is written over unasked"
    capsys.readouterr()
    assert main([*argv, "--overwrite", "--batch", "8"]) == 0
    assert read_engine(tmp_path / "model.int8.engine")[0].batch == (8, 8, 8)


def test_an_rtx_engine_without_a_gpu_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from visionkd.runtime import trt

    monkeypatch.setattr(trt, "find_device", lambda index=0: None)
    build(cnn(tmp_path / "m.onnx"))
    with pytest.raises(RequestError, match="no NVIDIA GPU with a driver"):
        workflows.bench(models=[str(tmp_path / "m.engine")])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "smaller"), [("torchvision/resnet18", 0.4), ("vit_tiny_patch16_224", 0.75)])
def test_engines_of_exported_networks(name: str, smaller: float, tmp_path: Path) -> None:
    import torch

    from visionkd.config.schema import NetworkConfig
    from visionkd.export.onnx import export_onnx
    from visionkd.export.qdq import to_target
    from visionkd.models.factory import create_network
    from visionkd.quantization.calibration import calibrate
    from visionkd.quantization.insert import Int8Scheme, quantize_network

    torch.manual_seed(0)
    network = create_network(NetworkConfig(name=name, pretrained=False, img_size=224), in_training=True)
    quantized = quantize_network(network, scheme=Int8Scheme())
    calibrate(quantized, [torch.rand(8, 3, 224, 224) for _ in range(2)])
    shared = dict(task="classification", classes=None, metrics={})
    export_onnx(network, tmp_path / "float.onnx", **shared)
    export_onnx(quantized, tmp_path / "int8.onnx", rewrite=lambda model: to_target(model, "tensorrt"), **shared)
    sizes = {form: build(tmp_path / f"{form}.onnx").engine_bytes for form in ("float", "int8")}
    assert sizes["int8"] < smaller * sizes["float"], sizes
    build(tmp_path / "int8.onnx", precision="fp16")
