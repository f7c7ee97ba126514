"""One builder for TensorRT 10 and 11, against stand-ins with the names and numbers of each."""

from __future__ import annotations

import errno
import hashlib
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto
from onnx_graphs import METADATA, cnn, vit

from visionkd.errors import DataError, RequestError, WorkError
from visionkd.export import _engine_checks as module
from visionkd.export._engine_layers import count_layers
from visionkd.export.tensorrt import EngineOptions, build_engine, default_timing_cache
from visionkd.runtime import engine_file
from visionkd.runtime.cuda_driver import CudaDevice
from visionkd.runtime.engine_file import read_engine


def build(onnx_file: Path, **options: object):
    return build_engine(
        onnx_file, onnx_file.with_suffix(".engine"), library="tensorrt", options=EngineOptions(**options)
    )


def attempts(trt) -> list[tuple]:
    return [call for call in trt.calls if call[0] in ("strong", "weak")]


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.4.0"])
def test_the_same_code_builds_strongly_typed_on_every_version(machine, tmp_path: Path, version: str) -> None:
    trt = machine(version)
    file = cnn(tmp_path / "m.onnx", "int8")
    info = build(file, batch=(1, 4, 32), workspace_mb=64)
    ((typing, network, config),) = attempts(trt)
    assert typing == "strong" and network.flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert network.flags == (2 if version.startswith("10.") else 1), "the number changed from 10 to 11"
    assert not config.flags and config.pools == {trt.MemoryPoolType.WORKSPACE: 64 * 2**20}
    assert config.profiles[0].shapes == {"image": ((1, 3, 32, 32), (4, 3, 32, 32), (32, 3, 32, 32))}
    stored, engine = read_engine(file.with_suffix(".engine"))
    assert stored == info and engine == f"engine of {version}".encode()
    assert (info.library, info.library_version, info.device) == ("tensorrt", version, "Orin")
    assert info.compute_capabilities == ("8.7",) and info.quantized and info.metadata == METADATA
    assert info.onnx_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert info.layers == {"total": 3, "int8": 1, "reformat": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.onnx"]


def test_version_10_that_refuses_strong_typing_is_given_flags(machine, tmp_path: Path) -> None:
    trt = machine("10.3.0", refuses=("strong",))
    info = build(cnn(tmp_path / "m.onnx", "int8"), precision="fp16")
    assert [call[0] for call in attempts(trt)] == ["strong", "weak"] and info.typing == "weak"
    assert {flag.name for flag in attempts(trt)[1][2].flags} == {"INT8", "FP16"}
    parsed = [call[1] for call in trt.calls if call[0] == "parse"]
    types = [{value.data_type for value in onnx.load_from_string(graph).graph.initializer} for graph in parsed]
    assert TensorProto.FLOAT16 in types[0] and TensorProto.FLOAT16 not in types[1], "flags take the float graph"


def test_version_11_has_no_flags_to_fall_back_on(machine, tmp_path: Path) -> None:
    trt = machine("11.4.0", refuses=("strong",))
    with pytest.raises(WorkError, match="11.4.0 does not build.*strong networks are not built"):
        build(cnn(tmp_path / "m.onnx", "int8"))
    assert len(attempts(trt)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_what_the_parser_says_is_told(machine, tmp_path: Path) -> None:
    machine("11.0.0", refuses=("parse",))
    with pytest.raises(WorkError, match="node_of_b: input has type Int32"):
        build(vit(tmp_path / "m.onnx", "int8"))


def test_a_float_graph_gets_no_int8_flag(machine, tmp_path: Path) -> None:
    trt = machine("10.3.0", refuses=("strong",))
    with pytest.raises(WorkError):
        build(cnn(tmp_path / "m.onnx"))
    assert [call[0] for call in attempts(trt)] == ["strong"], "there is nothing that a flag would change"


def test_half_without_onnx_ir_takes_flags_or_says_what_to_install(machine, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    machine("10.3.0")
    assert build(cnn(tmp_path / "m.onnx", "int8"), precision="fp16").typing == "weak"
    machine("11.4.0")
    with pytest.raises(RequestError, match="pip install onnx-ir"):
        build(cnn(tmp_path / "m.onnx", "int8"), precision="fp16")


def test_an_engine_that_does_not_load_leaves_no_file(machine, tmp_path: Path) -> None:
    machine("10.3.0", refuses=("load",))
    with pytest.raises(WorkError, match="magic tag does not match"):
        build(cnn(tmp_path / "m.onnx"))
    assert not (tmp_path / "m.engine").exists()


def test_a_check_that_fails_keeps_the_old_engine(machine, tmp_path: Path) -> None:
    machine()
    file = cnn(tmp_path / "m.onnx")
    (tmp_path / "m.engine").write_bytes(b"old")

    def refuse(path: Path) -> None:
        assert read_engine(path)[0].batch == (1, 1, 16)
        raise WorkError("differs")

    with pytest.raises(WorkError, match="differs"):
        build_engine(file, tmp_path / "m.engine", library="tensorrt", check=refuse)
    assert (tmp_path / "m.engine").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_timing_caches_belong_to_one_version_and_device(machine, tmp_path: Path) -> None:
    trt = machine("10.3.0")
    cache = default_timing_cache("tensorrt")
    assert cache.name == "10.3.0_Orin_8.7.timing" and cache.is_relative_to(tmp_path / "cache")
    build(cnn(tmp_path / "m.onnx"), timing_cache=cache)
    assert cache.read_bytes() == b"10.3.0 measured"
    build(cnn(tmp_path / "m.onnx"), timing_cache=cache)
    assert attempts(trt)[1][2].cache.content == b"10.3.0 measured"
    trt, said = machine("10.16.0"), []
    options = EngineOptions(timing_cache=cache)
    build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", library="tensorrt", options=options, report=said.append)
    assert attempts(trt)[0][2].cache.content == b"" and "another TensorRT" in said[0]


def test_dla_where_it_is(machine, tmp_path: Path) -> None:
    trt = machine("10.3.0", dla_cores=2)
    info = build(cnn(tmp_path / "m.onnx", "int8"), dla_core=1, batch=(1, 1, 1), precision="fp16")
    typing, _, config = attempts(trt)[0]
    assert typing == "weak" and (config.default_device_type, config.DLA_core) == (trt.DeviceType.DLA, 1)
    assert {flag.name for flag in config.flags} == {"INT8", "FP16", "GPU_FALLBACK"} and info.dla_core == 1


@pytest.mark.parametrize(
    ("cores", "options", "reason"),
    [
        (0, dict(dla_core=0), "11.2.0 reports no deep learning accelerator"),
        (2, dict(dla_core=2), "core 2 does not exist"),
        (2, dict(dla_core=0), "static shapes only"),
        (2, dict(dla_core=0, batch=(1, 1, 1)), "FP32 does not run on it"),
    ],
)
def test_dla_is_refused_with_the_reason(machine, tmp_path: Path, cores: int, options: dict, reason: str) -> None:
    machine("11.2.0", dla_cores=cores)
    with pytest.raises(RequestError, match=f"--dla: .*{reason}"):
        build(cnn(tmp_path / "m.onnx", "int8"), **options)


def test_a_disk_that_fills_during_the_build(machine, tmp_path: Path, monkeypatch) -> None:
    machine()
    file = cnn(tmp_path / "m.onnx")

    class Full:
        def __init__(self, path: Path) -> None:
            self.file = open(path, "wb")

        def write(self, data: bytes) -> None:
            if len(data) > 10 and bytes(data[:6]) == b"engine":  # the header still found room
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    monkeypatch.setattr(engine_file, "open", lambda path, mode: Full(path), raising=False)
    with pytest.raises(OSError, match="No space left"):
        build(file)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_full_disk_is_seen_before_the_build(machine, tmp_path: Path, monkeypatch) -> None:
    trt = machine()
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(WorkError, match="0 MB free"):
        build(cnn(tmp_path / "m.onnx"))
    assert not trt.calls


@pytest.mark.parametrize(
    ("saving", "form", "reason"),
    [
        (
            dict(metadata={"producer": "x"}),
            "float",
            "was not exported by visionkd: its metadata lacks visionkd_version",
        ),
        (dict(opset=11), "float", "operator set 11"),
        (dict(shape=("batch", 3, "h", "w")), "float", "batch x 3 x h x w"),
        (dict(shape=(4, 3, 32, 32)), "float", "fixed batch of 4"),
        (dict(), "cpu", "uint8 activations"),
    ],
)
def test_files_that_cannot_be_built(machine, tmp_path: Path, saving: dict, form: str, reason: str) -> None:
    trt = machine()
    with pytest.raises(RequestError, match=reason):
        build(cnn(tmp_path / "m.onnx", form, **saving))
    assert not trt.calls


def test_damaged_and_missing_files(machine, tmp_path: Path) -> None:
    machine()
    with pytest.raises(RequestError, match="there is no file"):
        build(tmp_path / "m.onnx")
    file = cnn(tmp_path / "m.onnx")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a whole ONNX file"):
        build(file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="not an ONNX file"):
        build(file)


def test_tensorrt_builds_for_the_gpu_that_is_here(machine, tmp_path: Path) -> None:
    file = cnn(tmp_path / "m.onnx")
    machine(device=None)
    with pytest.raises(RequestError, match="no NVIDIA GPU with a driver"):
        build(file)
    machine(device=CudaDevice("Thor", "11.0", 1))
    with pytest.raises(RequestError, match=r"builds for the GPU that is here \(11.0\)"):
        build(file, compute_capability="8.7")
    with pytest.raises(RequestError, match="is not smallest:best:largest"):
        build(file, batch=(2, 1, 4))


def test_the_inspector_of_an_engine_without_detail() -> None:
    assert count_layers('{"Layers": ["conv1 + relu", "pool"]}') == {"total": 2}
    assert count_layers("no json") == {} and count_layers('{"Layers": 3}') == {}
