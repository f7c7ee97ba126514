from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from visionkd.benchmark import latency
from visionkd.benchmark.complexity import measure_complexity
from visionkd.benchmark.latency import Runner, measure, ort_runner
from visionkd.benchmark.record import to_json, to_markdown
from visionkd.benchmark.torch_runner import torch_runner
from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError
from visionkd.models.factory import Network, create_network


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_WARMUP_S", 0.01)
    monkeypatch.setattr(latency, "_ROUND_S", 0.01)


def make(name: str, **config) -> Network:
    return create_network(NetworkConfig(name=name, pretrained=False, **config), in_training=True)


def runner(name: str, call, **kwargs) -> Runner:
    return Runner(
        model=name, backend="torch", call=call, threads=1, device="cpu", batch_size=4, img_size=(8, 8), **kwargs
    )


@pytest.mark.parametrize(
    ("name", "params_m", "macs_g"),
    [("resnet18", 11.69, 1.81), ("deit_s", 22.05, 4.6), ("torchvision/mobilenet_v3_small", 2.54, 0.056)],
)
def test_complexity_is_the_published_one(name: str, params_m: float, macs_g: float) -> None:
    with torch.device("meta"):
        network = make(name)
    found = measure_complexity(network)
    assert found.params_m == pytest.approx(params_m, rel=0.005)
    assert found.macs_g == pytest.approx(macs_g, rel=0.02)
    assert found.size_mb == pytest.approx(4 * params_m, rel=0.02)


def test_complexity_of_parameters_that_enter_a_layer_as_inputs() -> None:
    with torch.device("meta"):
        network = create_network(NetworkConfig(name="pit_ti_224", pretrained=False), in_training=True)
    found = measure_complexity(network)  # its class token does
    assert found.params_m == pytest.approx(4.85, abs=0.01) and found.macs_g == pytest.approx(0.71, abs=0.02)


def test_complexity_by_hand() -> None:
    network = make("cifar_resnet8")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    quarter = measure_complexity(network, img_size=(16, 16)).macs_g
    convolutions = 32**2 * 16 * 3 * 9 + 2 * 32**2 * 16 * 16 * 9
    convolutions += 16**2 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) + 8**2 * (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64)
    assert measure_complexity(network).macs_g * 1e9 == convolutions + 64 * 10
    assert quarter * 1e9 == convolutions / 4 + 64 * 10
    assert network.training and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_rounds_are_interleaved_and_figures_are_medians() -> None:
    order: list[str] = []

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    done: list[tuple[int, int]] = []
    slow, fast = measure(
        [runner("slow", call("s", 0.02)), runner("fast", call("f", 0.01))], rounds=4, on_round=lambda *x: done.append(x)
    )
    assert order[-8:] == ["s", "f", "f", "s", "s", "f", "f", "s"] and done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (slow.model, fast.model) == ("slow", "fast") and slow.calls == 4 and slow.rounds == 4
    assert 20 <= slow.latency_ms < 40 and 10 <= fast.latency_ms < slow.latency_ms
    assert slow.latency_p90_ms >= slow.latency_ms
    assert slow.throughput_img_s == pytest.approx(4 / slow.latency_ms * 1e3)


def test_one_slow_call_does_not_move_the_median() -> None:
    record = latency._record(runner("m", lambda: None), [0.01] * 9 + [5.0], 1, "host", {})
    assert record.latency_ms == pytest.approx(10) and record.latency_p90_ms > 10


def test_pytorch_runs_with_the_threads_asked_for_and_gets_its_own_back() -> None:
    before = torch.get_num_threads()
    asked = before + 1
    network = make("cifar_resnet8")
    seen = set()

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].device.type != "meta":  # where its operations are counted
            seen.add(torch.get_num_threads())

    network.net.register_forward_pre_hook(note)
    record = measure([torch_runner(network, name="m", batch_size=2, threads=asked)], rounds=1)[0]
    assert seen == {asked} and torch.get_num_threads() == before
    assert record.threads == asked and record.batch_size == 2 and network.training, "a copy was timed"
    assert record.params_m == pytest.approx(0.078, abs=0.001) and record.macs_g > 0 and record.size_mb > 0


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="--accelerator cpu"):
        torch_runner(make("cifar_resnet8"), name="m", accelerator="gpu")


def onnx_file(path: Path, shape: list) -> Path:
    import onnx
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["logits"])], "g", [image], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def test_onnx_files_of_anybody(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", ["n", 3, 8, 8])
    record = measure([ort_runner(path, name="m", batch_size=3)], rounds=2)[0]
    assert record.backend == "onnxruntime" and record.img_size == (8, 8) and record.batch_size == 3
    assert record.params_m is None and record.size_mb == path.stat().st_size / 1e6
    with pytest.raises(RequestError, match="8 x 8"):
        ort_runner(path, name="m", img_size=(16, 16))
    free = onnx_file(tmp_path / "free.onnx", ["n", 3, "h", "w"])
    with pytest.raises(RequestError, match="--img-size"):
        ort_runner(free, name="m")
    assert ort_runner(free, name="m", img_size=(16, 8)).img_size == (16, 8)
    with pytest.raises(RequestError, match="--batch-size 1"):
        ort_runner(onnx_file(tmp_path / "one.onnx", [1, 3, 8, 8]), name="m", batch_size=2)
    with pytest.raises(RequestError, match="batch of images"):
        ort_runner(onnx_file(tmp_path / "flat.onnx", ["n", 3]), name="m")


def test_records_for_machines_and_people() -> None:
    records = measure([runner("a|b", lambda: None, params_m=1.5), runner("c", lambda: None)], rounds=1)
    rows = json.loads(to_json(records))
    assert rows[0]["params_m"] == 1.5 and rows[1]["params_m"] is None and "torch" in rows[0]["versions"]
    table = to_markdown(records).splitlines()
    assert table[0].startswith("| model | backend |") and "| 1.50 |" in table[2] and table[3].endswith("|  |  |  |")
    assert "1 interleaved rounds" in table[-1] and "threads)" in table[-1]
    assert {line.replace("\\|", "").count("|") for line in table[:4]} == {table[0].count("|")}
    with pytest.raises(ValueError):
        measure([], rounds=0)
