"""The CUDA driver, called directly: which GPU there is, and graphs. It comes with every driver and needs no package."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from visionkd.errors import WorkError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_CAPTURE_THREAD_LOCAL = 1


@dataclass(frozen=True)
class CudaDevice:
    """A GPU: its name, its compute capability such as ``8.7``, and its memory in bytes."""

    name: str
    compute_capability: str
    memory_bytes: int


def library() -> Any | None:
    """Return the driver's library; None where there is none."""
    names = ["nvcuda.dll"] if sys.platform == "win32" else ["libcuda.so.1", ctypes.util.find_library("cuda")]
    for name in filter(None, names):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def find_device(index: int = 0) -> CudaDevice | None:
    """Return the GPU number ``index`` of those that are visible; None where there is none."""
    cuda = library()
    if cuda is None or cuda.cuInit(0) != 0:
        return None
    count, handle = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value <= index:
        return None
    if cuda.cuDeviceGet(ctypes.byref(handle), index) != 0:
        return None
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        parts.append(str(value.value))
    return CudaDevice(name.value.decode(errors="replace"), ".".join(parts), memory.value)


class CudaGraph:
    """Work captured from a stream, to be launched again at little cost.

    Args:
        stream: Handle of the stream.
        enqueue: Puts the work on the stream; called once, and must allocate nothing.

    Raises:
        WorkError: If the work cannot be captured.
    """

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        self._cuda, self._stream = library(), ctypes.c_void_p(stream)
        graph, self._launchable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_THREAD_LOCAL)
        try:
            enqueue()
        finally:
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._launchable), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Put the captured work on the stream again."""
        self._call("cuGraphLaunch", self._launchable, self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            raise WorkError(
                f"the engine cannot be captured as a CUDA graph: {name} answered with error {code}",
                hint="Run it without --cuda-graph.",
            )
