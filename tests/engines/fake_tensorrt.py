"""Stand-ins for TensorRT 10 and 11 and for pycuda: their names and numbers, and the behaviour that the code relies on.

Flags have the numbers of the public headers, which differ between the two; what 11 removed does not exist here either,
so that touching it raises AttributeError as it would there.
"""

from __future__ import annotations

import enum
import json
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

SIDES = (3, 32, 32)


def tensorrt(version: str, *, refuses: tuple[str, ...] = (), dla_cores: int = 0, name: str = "tensorrt") -> ModuleType:
    """Return a module like ``tensorrt`` of ``version``.

    Args:
        version: ``10.*`` or ``11.*``.
        refuses: What it does not build: ``strong``, ``weak``, ``parse`` or ``load``.
        dla_cores: Cores of the deep learning accelerator.
        name: Name of the module.

    The module's ``calls`` lists what was done with it; ``built`` is given by each build.
    """
    is_10 = version.startswith("10.")
    trt = ModuleType(name)
    trt.__version__ = version
    trt.calls = []
    trt.float32 = "FLOAT"

    flags = (
        {"STRONGLY_TYPED": 1, "EXPLICIT_BATCH": 0} if is_10 else {"STRONGLY_TYPED": 0, "PREFER_JIT_PYTHON_PLUGINS": 1}
    )
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags)
    kept = {"GPU_FALLBACK": 3, "TF32": 6}
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", kept | ({"FP16": 0, "INT8": 1} if is_10 else {}))
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["DETAILED"])
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", ["JSON"])
    trt.DeviceType = enum.Enum("DeviceType", ["GPU", "DLA"])
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])

    class ILogger:
        Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})

    class TimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return f"{version} measured".encode()

    class Config:
        def __init__(self) -> None:
            self.flags: set[Any] = set()
            self.pools: dict[Any, int] = {}
            self.profiles: list[Any] = []
            self.cache: TimingCache | None = None
            self.profiling_verbosity = self.default_device_type = self.DLA_core = None

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.pools[pool] = size

        def add_optimization_profile(self, profile: Any) -> None:
            self.profiles.append(profile)

        def create_timing_cache(self, content: bytes) -> TimingCache | None:
            return TimingCache(content)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.content and not cache.content.startswith(version.encode()):
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> TimingCache:
            return self.cache

    class Builder:
        num_DLA_cores = dla_cores

        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            strong = bool(flags >> int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1) or not is_10
            image = SimpleNamespace(name="image", shape=(-1, *SIDES))
            return SimpleNamespace(flags=flags, strong=strong, num_inputs=1, get_input=lambda index: image)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Any:
            shapes: dict[str, Any] = {}
            return SimpleNamespace(shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three}))

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            typing = "strong" if network.strong else "weak"
            trt.calls.append((typing, network, config))
            if network.strong and any(flag.name in ("INT8", "FP16") for flag in config.flags):
                raise AssertionError("precision flags in a strongly typed network")
            if typing in refuses:
                self.logger.log(ILogger.Severity.ERROR, f"{typing} networks are not built")
                return None
            return f"engine of {version}".encode()

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            pass

        def parse(self, graph: bytes) -> bool:
            trt.calls.append(("parse", graph))
            if "parse" in refuses:
                self.num_errors = 1
            return "parse" not in refuses

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(desc=lambda: "node_of_b: input has type Int32")

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            if "load" in refuses:
                self.logger.log(ILogger.Severity.ERROR, "magic tag does not match")
                return None
            return _Engine(trt)

    trt.ILogger, trt.Builder, trt.OnnxParser, trt.Runtime = ILogger, Builder, OnnxParser, Runtime
    return trt


LAYERS = {
    "Layers": [
        {"LayerType": "Reformat", "Inputs": [{"Format/Datatype": "FP32 NCHW"}]},
        {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Int8 NC/32HW32"}]},
        {"LayerType": "PoolingV2", "Inputs": [{"Format/Datatype": "Half"}]},
    ]
}


class _Engine:
    """Answers with the mean of each channel of the image, and with 0 for the fourth class."""

    num_io_tensors = 2

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: json.dumps(LAYERS))

    def get_tensor_name(self, index: int) -> str:
        return ("image", "logits")[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name == "image" else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return self.trt.float32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *SIDES) if name == "image" else (-1, 4)

    def create_execution_context(self) -> Any:
        return _Context(self.trt)


class _Context:
    def __init__(self, trt: ModuleType) -> None:
        self.trt, self.batch, self.addresses = trt, 0, {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert name == "image" and tuple(shape[1:]) == SIDES
        self.batch = shape[0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *SIDES) if name == "image" else (self.batch, 4)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert _Cuda.depth == 1, "the primary context is not current"
        self.trt.calls.append(("execute", self.batch))
        image = _Cuda.memory[self.addresses["image"]].view(np.float32).reshape(-1, *SIDES)[: self.batch]
        logits = _Cuda.memory[self.addresses["logits"]].view(np.float32).reshape(-1, 4)
        logits[: self.batch, :3], logits[: self.batch, 3] = image.mean((2, 3)), 0.0
        return True


class _Cuda:
    memory: dict[int, np.ndarray] = {}
    depth = 0


def pycuda_driver() -> ModuleType:
    """Return a module like ``pycuda.driver`` whose device memory are arrays."""
    cuda = ModuleType("pycuda.driver")
    cuda.__version__, cuda.init = "2026.1", lambda: None

    class Allocation(int):
        """An address, as pycuda's allocations convert to."""

    class Primary:
        def push(self) -> None:
            _Cuda.depth += 1

        def pop(self) -> None:
            _Cuda.depth -= 1

    class Device:
        def __init__(self, index: int) -> None:
            assert index == 0

        def retain_primary_context(self) -> Primary:
            return Primary()

    class Stream:
        handle = 7

        def synchronize(self) -> None:
            pass

    def mem_alloc(size: int) -> Allocation:
        address = Allocation(1000 + len(_Cuda.memory))
        _Cuda.memory[address] = np.full(
            size, 255, np.uint8
        )  # not zeros: what is not written must not be right by chance
        return address

    def memcpy_htod_async(target: int, source: np.ndarray, stream: Any) -> None:
        _Cuda.memory[target][: source.nbytes] = np.ascontiguousarray(source).view(np.uint8).reshape(-1)

    def memcpy_dtoh_async(target: np.ndarray, source: int, stream: Any) -> None:
        target[...] = _Cuda.memory[source][: target.nbytes].view(target.dtype).reshape(target.shape)

    cuda.Device, cuda.Stream, cuda.mem_alloc = Device, Stream, mem_alloc
    cuda.pagelocked_empty = np.empty
    cuda.memcpy_htod_async, cuda.memcpy_dtoh_async = memcpy_htod_async, memcpy_dtoh_async
    return cuda
