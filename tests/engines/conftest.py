"""Engines, from the ONNX file to the run on a device; the stand-ins for TensorRT and pycuda serve all tests here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_tensorrt  # noqa: E402

from visionkd.export import tensorrt as builder_module  # noqa: E402
from visionkd.runtime import bundle_file  # noqa: E402
from visionkd.runtime import trt as runtime_module  # noqa: E402
from visionkd.runtime.cuda_driver import CudaDevice  # noqa: E402
from visionkd.workflows import _engine as workflow_module  # noqa: E402

ORIN = CudaDevice("Orin", "8.7", 8 * 1024**3)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    """Return a function that puts a pretended TensorRT, pycuda and GPU on this machine."""

    def become(version: str = "10.3.0", *, device: CudaDevice | None = ORIN, **settings: Any) -> ModuleType:
        trt = fake_tensorrt.tensorrt(version, **settings)
        monkeypatch.setitem(sys.modules, trt.__name__, trt)
        pycuda = ModuleType("pycuda")
        pycuda.driver = fake_tensorrt.pycuda_driver()
        monkeypatch.setitem(sys.modules, "pycuda", pycuda)
        monkeypatch.setitem(sys.modules, "pycuda.driver", pycuda.driver)
        for made in (trt, pycuda):  # what looks whether a package is there looks at its specification
            made.__spec__ = ModuleSpec(made.__name__, None)
        for module in (builder_module, runtime_module, bundle_file, workflow_module):
            monkeypatch.setattr(module, "find_device", lambda index=0: device)
        monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
        return trt

    return become
