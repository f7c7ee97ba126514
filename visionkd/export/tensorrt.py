"""TensorRT engines from ONNX files, by one builder for TensorRT 10.3 to 11 and for TensorRT-RTX.

The types in the graph decide the precision (a strongly typed network): INT8 where Q/DQ nodes stand, FP16 where
``half.py`` has written it. TensorRT 11 has nothing else. On 10.x the same graph is tried weakly typed, with precision
flags, where it does not build otherwise. Flags are taken from the enumerations by name when they exist, never as
numbers: these changed from 10 to 11.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import visionkd
from visionkd.errors import RequestError, WorkError, first_line
from visionkd.export._engine_checks import (
    EngineOptions,
    capability_for,
    check_batch,
    check_dla,
    check_onnx,
    check_room,
    sm_of,
)
from visionkd.export._engine_layers import count_layers
from visionkd.export.half import to_half
from visionkd.files import check_writable, replacing, write_bytes
from visionkd.runtime.cuda_driver import find_device
from visionkd.runtime.engine_file import EngineInfo, Library, write_engine
from visionkd.runtime.onnx_file import OnnxFile
from visionkd.runtime.trt import load_library, make_logger, said, this_platform

_MB = 1024**2


def build_engine(
    onnx: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    library: Library,
    options: EngineOptions = EngineOptions(),  # noqa: B008  (frozen)
    check: Callable[[Path], None] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> EngineInfo:
    """Build an engine from an ONNX file of visionkd's.

    Args:
        onnx: The file.
        path: Engine file to write; it appears complete or not at all.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        options: How to build.
        check: Called with the written file before it gets its name; if it raises, no file is left.
        report: Told what is worth knowing.

    Raises:
        RequestError: If the file is not ours, is too old, or has shapes that cannot be built, a package or the GPU is
            missing, or an option does not fit.
        WorkError: If TensorRT refuses the graph or fails to build it; its own words are in the message.
    """
    onnx, path = Path(onnx), Path(path)
    described = check_onnx(onnx)
    trt = load_library(library)
    device = find_device()
    capability = capability_for(trt, library, device, options.compute_capability)
    check_batch(onnx, described, options)
    check_writable(path)
    check_room(path, onnx)
    build = _Build(trt, library, onnx, described, options, capability if library == "tensorrt_rtx" else None, report)
    engine, precision, typing = build.run()
    info = EngineInfo(
        library=library,
        library_version=trt.__version__,
        platform=this_platform(),
        device=device.name if device is not None and device.compute_capability == capability else None,
        compute_capabilities=(capability,),
        onnx_sha256=hashlib.sha256(onnx.read_bytes()).hexdigest(),
        onnx_file=onnx.name,
        precision=precision,
        quantized=described.is_quantized,
        typing=typing,
        batch=options.batch,
        dla_core=options.dla_core,
        metadata=described.metadata,
        layers=_layers(trt, engine) if device is not None and device.compute_capability == capability else {},
        visionkd_version=visionkd.__version__,
    )
    with replacing(path) as temporary:
        info = write_engine(temporary, info, engine)
        if check is not None:
            check(temporary)
    return info


def default_timing_cache(library: Library) -> Path | None:
    """Return where measured tactics are kept for this TensorRT on this GPU; None where nothing is measured."""
    device = find_device()
    if library == "tensorrt_rtx" or device is None:
        return None
    root = Path(os.environ.get("VISIONKD_CACHE") or Path.home() / ".cache" / "visionkd")
    name = f"{load_library(library).__version__}_{device.name}_{device.compute_capability}"
    return root / "tensorrt" / f"{''.join(c if c.isalnum() or c in '._-' else '-' for c in name)}.timing"


class _Build:
    """One engine: the attempts at it share the graph and the options."""

    def __init__(
        self, trt: Any, library: Library, onnx: Path, described: OnnxFile, options: EngineOptions,
        capability: str | None, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.trt, self.library, self.onnx, self.described = trt, library, onnx, described
        self.options, self.capability, self.report = options, capability, report
        self.logger = make_logger(trt)
        try:
            self.builder = trt.Builder(self.logger)
        except Exception as error:  # without a GPU the binding raises a bare TypeError
            raise RequestError(
                f"{library} {trt.__version__} does not start: {_words(self.logger, error)}",
                hint="See what this machine lacks with: visionkd doctor",
            ) from error
        check_dla(self.builder, library, trt.__version__, options)

    def run(self) -> tuple[Any, str, str]:
        """Return the engine, its precision and how its network was typed."""
        flags = self._precision_flags()
        weak_first = self.options.dla_core is not None and bool(flags)  # DLA on 10.x follows flags, not graph types
        half = self.options.precision == "fp16"
        data = self.onnx.read_bytes()
        strong: bytes | None = data
        if half:
            try:
                strong = to_half(data)
            except RequestError:
                if not flags:
                    raise
                strong = None  # flags do it too
        attempts = [(strong, "strong", ())] if strong is not None else []
        if flags:
            attempts.insert(0 if weak_first else len(attempts), (data, "weak", flags))
        reasons = []
        for graph, typing, used in attempts:
            try:
                engine = self._attempt(graph, used)
            except _Refused as error:
                reasons.append(f"{typing}ly typed: {error}")
                continue
            if reasons:
                self.report(f"Built {typing}ly typed; {reasons[0]}")
            return engine, self.options.precision, typing
        version = f"{self.library} {self.trt.__version__}"
        raise WorkError(
            f"{version} does not build an engine from '{self.onnx}'. {' ; '.join(reasons)}",
            hint="Export it with --target tensorrt; a file for the cpu target has types that TensorRT does not take.",
        )

    def _attempt(self, graph: bytes, flags: tuple[Any, ...]) -> Any:
        trt = self.trt
        self.logger.errors.clear()
        creation = 0
        if not flags:
            member = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
            creation = 0 if member is None else 1 << int(member)
        network = self.builder.create_network(creation)
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(graph):
            raise _Refused(_parser_words(parser) or said(self.logger))
        config = self.builder.create_builder_config()
        self._configure(config, network, flags)
        cache = self._timing_cache(config)
        engine = self.builder.build_serialized_network(network, config)
        if engine is None:
            raise _Refused(said(self.logger))
        if cache:
            self._keep_timing_cache(config)
        return engine

    def _configure(self, config: Any, network: Any, flags: tuple[Any, ...]) -> None:
        trt, options = self.trt, self.options
        for flag in flags:
            config.set_flag(flag)
        if options.workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * _MB)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names and types for the inspector
        profile = self.builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sides = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, *((count, *sides) for count in options.batch))
        config.add_optimization_profile(profile)
        if self.capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(sm_of(trt, self.capability), 0)
        if options.dla_core is not None:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = options.dla_core
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)

    def _precision_flags(self) -> tuple[Any, ...]:
        """Return the flags of a weakly typed network; empty where this TensorRT has none (11, RTX)."""
        wanted = ("INT8",) if self.described.is_quantized else ()
        wanted += ("FP16",) if self.options.precision == "fp16" else ()
        found = tuple(getattr(self.trt.BuilderFlag, name, None) for name in wanted)
        return () if None in found else found

    def _timing_cache(self, config: Any) -> bool:
        file = self.options.timing_cache
        if file is None:
            return False
        stored = b""
        with contextlib.suppress(OSError):
            stored = file.read_bytes()
        cache = config.create_timing_cache(stored)
        if cache is None or not config.set_timing_cache(cache, False):  # never one of another TensorRT or GPU
            self.report(f"The timing cache '{file}' is of another TensorRT or GPU, and is begun anew")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return True

    def _keep_timing_cache(self, config: Any) -> None:
        try:
            write_bytes(self.options.timing_cache, bytes(config.get_timing_cache().serialize()))
        except OSError as error:  # the engine is what was asked for
            self.report(f"The timing cache is not kept: {first_line(error)}")


class _Refused(Exception):
    """TensorRT does not take a graph in one way; there may be another."""


def _parser_words(parser: Any) -> str:
    found = [" ".join(str(parser.get_error(index).desc()).split()) for index in range(parser.num_errors)]
    return " | ".join(found)[:400]


def _words(logger: Any, error: BaseException) -> str:
    return said(logger) if logger.errors else first_line(error)


def _layers(trt: Any, engine: Any) -> dict[str, int]:
    """Load the engine once, which shows that it does load, and count its layers."""
    logger = make_logger(trt)
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        raise WorkError(f"the engine was built and does not load: {said(logger)}", hint="Run: visionkd doctor")
    return count_layers(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
