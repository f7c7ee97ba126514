"""TensorRT engines, run through pycuda. Both packages are imported only when an engine is opened.

pycuda works in the device's primary context, the one that every other library uses: a context of its own would clash
with PyTorch's in the same process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from visionkd.errors import RequestError, WorkError, first_line
from visionkd.runtime.cuda_driver import CudaDevice, CudaGraph, find_device
from visionkd.runtime.engine_file import EngineInfo, Library, read_engine

_INSTALL = {
    "tensorrt": "On a Jetson it comes with JetPack (python3-libnvinfer); elsewhere: pip install tensorrt",
    "tensorrt_rtx": "Run: pip install tensorrt-rtx-cu12",
}


class TrtModel:
    """An engine file, ready to run. It takes batches of any size: larger ones are cut, smaller ones filled up.

    Args:
        path: The ``.engine`` file.
        cuda_graph: Launch the engine as a CUDA graph, which saves the processor's time for each layer.

    Attributes:
        info: Header of the file.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        input_shapes: Shape of each input; a free batch is its name.
        device: Name of the GPU.
        metadata: Key-value pairs of the ONNX file that it was built from.

    Raises:
        RequestError: If there is no such file, a package or the GPU is missing, or the engine is for another one.
        DataError: If the file is damaged.
        WorkError: If TensorRT does not load the engine.
    """

    def __init__(self, path: str | os.PathLike[str], *, cuda_graph: bool = False) -> None:
        self.path = Path(path)
        self.info, engine = read_engine(self.path)
        self.metadata: dict[str, str] = dict(self.info.metadata)
        library = load_library(self.info.library)
        device = find_device()
        if reasons := foreign(self.info, version=library.__version__, device=device):
            raise RequestError(
                f"'{self.path}' does not run here: {'; '.join(reasons)}",
                hint="Build it on this device from its ONNX file: visionkd export"
                f" {self.info.onnx_file} --format tensorrt",
            )
        self.device = device.name if device is not None else "gpu"
        self._cuda = _pycuda()
        self._cuda.init()
        self._primary = self._cuda.Device(0).retain_primary_context()
        self._graphs: dict[int, CudaGraph] | None = {} if cuda_graph else None
        with self._current():
            self._load(library, engine)

    def _load(self, library: Any, engine: bytes) -> None:
        self._logger = make_logger(library)
        self._runtime = library.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise WorkError(
                f"{self.info.library} does not load '{self.path}': {said(self._logger)}",
                hint="Build it anew on this device.",
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise WorkError(f"the engine '{self.path}' does not start: {said(self._logger)}", hint="Free GPU memory.")
        self._stream = self._cuda.Stream()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == library.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        for name in names:
            if self._engine.get_tensor_dtype(name) != library.float32:
                raise WorkError(f"'{name}' of '{self.path}' is not float32", hint="Build it anew with visionkd.")
        low, _, high = self.info.batch
        sides = {name: tuple(self._engine.get_tensor_shape(name))[1:] for name in self.inputs}
        self.input_shapes: tuple[tuple[Any, ...], ...] = tuple(
            (high if low == high else "batch", *sides[name]) for name in self.inputs
        )
        for name in self.inputs:  # with the largest batch, so that the outputs' largest sizes are known
            self._context.set_input_shape(name, (high, *sides[name]))
        self._host, self._device_memory = {}, {}
        for name in names:
            shape = tuple(self._context.get_tensor_shape(name))
            self._host[name] = self._cuda.pagelocked_empty(shape, np.float32)
            self._device_memory[name] = self._cuda.mem_alloc(self._host[name].nbytes)
            self._context.set_tensor_address(name, int(self._device_memory[name]))

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for ``arrays``, in the order of :attr:`inputs`."""
        given = dict(zip(self.inputs, arrays, strict=True))
        count, largest = len(arrays[0]), self.info.batch[2]
        with self._current():
            parts = [
                self._run_part({name: array[start : start + largest] for name, array in given.items()})
                for start in range(0, count, largest)
            ]
        return [np.concatenate([part[index] for part in parts]) for index in range(len(self.outputs))]

    def _run_part(self, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        count = len(next(iter(given.values())))
        size = max(count, self.info.batch[0])
        for name, array in given.items():
            host = self._host[name][:size]
            host[:count], host[count:] = array, 0.0
            self._context.set_input_shape(name, host.shape)
            self._cuda.memcpy_htod_async(self._device_memory[name], host, self._stream)
        self._launch(size)
        for name in self.outputs:
            self._cuda.memcpy_dtoh_async(self._host[name][:size], self._device_memory[name], self._stream)
        self._stream.synchronize()
        return [self._host[name][:count].copy() for name in self.outputs]

    def _launch(self, size: int) -> None:
        if self._graphs is None:
            return self._enqueue()
        if size not in self._graphs:
            self._enqueue()  # TensorRT allocates in the first call of a shape, which must not be captured
            self._stream.synchronize()
            self._graphs[size] = CudaGraph(self._stream.handle, self._enqueue)
        return self._graphs[size].launch()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise WorkError(f"the engine '{self.path}' failed: {said(self._logger)}")

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        self._primary.push()
        try:
            yield
        finally:
            self._primary.pop()


def foreign(info: EngineInfo, *, version: str, device: CudaDevice | None) -> list[str]:
    """Return why an engine does not run here; empty if it does.

    Args:
        info: Header of the engine.
        version: Version of ``info.library`` that is installed.
        device: The GPU that is here.
    """
    reasons = []
    if info.platform != this_platform():
        reasons.append(f"it was built for {info.platform}, and this is {this_platform()}")
    if info.library_version != version:
        reasons.append(f"it was built by {info.library} {info.library_version}, and {version} is installed")
    if device is None:
        return [*reasons, "there is no NVIDIA GPU with a driver"]
    if device.compute_capability not in info.compute_capabilities:
        known = ", ".join(info.compute_capabilities)
        reasons.append(
            f"it was built for compute capability {known}, and this GPU ({device.name}) has {device.compute_capability}"
        )
    elif info.library == "tensorrt" and info.device is not None and info.device != device.name:
        reasons.append(f"it was built and tuned on '{info.device}', and this GPU is '{device.name}'")
    return reasons


def load_library(name: Library) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        RequestError: If it is not installed or does not start.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = "which is not installed" if absent else f"which cannot be imported: {first_line(error)}"
        raise RequestError(f"this engine needs the package {name}, {reason}", hint=_INSTALL[name]) from error


def make_logger(library: Any) -> Any:
    """Return a logger that keeps what TensorRT complains about, for :func:`said`."""

    class Log(library.ILogger):
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR):
                self.errors.append(" ".join(str(message).split()))

    return Log()


def said(logger: Any) -> str:
    """Return the last errors that TensorRT logged, in one line."""
    return " | ".join(logger.errors[-2:])[:400] or "it gives no reason"


def this_platform() -> str:
    """Return system and processor, such as ``linux-aarch64``."""
    return f"{sys.platform}-{platform.machine().lower()}"


def _pycuda() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise RequestError(
            f"running an engine needs pycuda, which cannot be imported: {first_line(error)}",
            hint="Run: pip install pycuda (it is compiled against the CUDA toolkit of this machine)",
        ) from error
