"""The CUDA driver by its C interface, against a stand-in library."""

from __future__ import annotations

import ctypes

import pytest

from visionkd.errors import WorkError
from visionkd.runtime import cuda_driver
from visionkd.runtime.cuda_driver import CudaDevice, CudaGraph, find_device


class Driver:
    """Answers as libcuda does: results through pointers, 0 for success."""

    def __init__(self, *, devices: int = 1, fails: str = "") -> None:
        self.devices, self.fails, self.calls = devices, fails, []

    def __getattr__(self, name: str):
        def call(*arguments: object) -> int:
            self.calls.append(name)
            if name == self.fails:
                return 900
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = self.devices
            elif name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            elif name == "cuDeviceTotalMem_v2":
                arguments[0]._obj.value = 8 << 30
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 7}[arguments[1]]
            elif name == "cuStreamBeginCapture_v2":
                assert isinstance(arguments[0], ctypes.c_void_p) and arguments[0].value == 7
            return 0

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    def put(made: Driver | None) -> Driver | None:
        monkeypatch.setattr(cuda_driver, "library", lambda: made)
        return made

    return put


def test_the_gpu_is_described(driver) -> None:
    driver(Driver())
    assert find_device() == CudaDevice("Orin", "8.7", 8 << 30)


@pytest.mark.parametrize("made", [None, Driver(devices=0), Driver(fails="cuInit"), Driver(fails="cuDeviceGet")])
def test_there_is_no_gpu(driver, made: Driver | None) -> None:
    driver(made)
    assert find_device() is None


def test_work_is_captured_once_and_launched_often(driver) -> None:
    made = driver(Driver())
    graph = CudaGraph(7, lambda: made.calls.append("work"))
    graph.launch()
    graph.launch()
    assert made.calls == [
        "cuStreamBeginCapture_v2", "work", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphDestroy",
        "cuGraphLaunch", "cuGraphLaunch",
    ]  # fmt: skip


def test_work_that_cannot_be_captured(driver) -> None:
    driver(Driver(fails="cuStreamEndCapture"))
    with pytest.raises(WorkError, match="cuStreamEndCapture answered with error 900"):
        CudaGraph(7, lambda: None)
