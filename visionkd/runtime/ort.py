"""ONNX Runtime, imported only when it is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visionkd.errors import DataError, RequestError

Accelerator = Literal["auto", "cpu", "gpu"]
#: Makes x86 processors without VNNI add pairs of 8-bit products in 32 bits, where their kernels overflow in 16; others
#: do so anyway.
PRECISE = "session.x64quantprecision"
_SILENT = 4  # onnxruntime's severities end at 4, fatal


class OrtModel:
    """An ONNX file, ready to run.

    Args:
        path: The ``.onnx`` file.
        threads: Threads within an operator; None leaves the choice to ONNX Runtime.
        accelerator: ``cpu``; ``gpu`` needs the CUDA provider, ``auto`` takes it where there is one.
        optimize: False runs the nodes as they are in the file.

    Attributes:
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        input_shapes: Shape of each input; free sides are names.
        device: ``cpu`` or ``gpu``, as it turned out.
        metadata: The file's own key-value pairs.

    Raises:
        RequestError: If there is no such file, ONNX Runtime is not installed, or a GPU is asked for and not there.
        DataError: If the file cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        accelerator: Accelerator = "cpu",
        optimize: bool = True,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise RequestError(f"there is no file '{self.path}'", hint="Export a model first: visionkd export MODEL")
        runtime = _onnxruntime()
        providers = _providers(runtime, accelerator)
        options = runtime.SessionOptions()
        options.log_severity_level = _SILENT
        if not optimize:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            # Spinning threads would take the processor from whatever is measured or run beside them.
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")

        self._reopen = partial(_open, runtime, os.fspath(self.path), options, providers)
        # The precise mode rewrites weights, and some files of others fail only once they run.
        self._unproven = False
        try:
            if optimize:
                self._session, self._unproven = open_precisely(runtime, os.fspath(self.path), options, providers)
            else:
                self._session = self._reopen(precise=False)
        except Exception as error:  # onnxruntime's own exceptions share no base but Exception
            first = str(error).strip().splitlines()[0][:200]
            raise DataError(
                f"'{self.path}' cannot be loaded as an ONNX model: {first}", hint="Export or copy it again."
            ) from error
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        self.input_shapes: tuple[tuple[Any, ...], ...] = tuple(tuple(v.shape) for v in self._session.get_inputs())
        self.device = "cpu" if self._session.get_providers()[0] == "CPUExecutionProvider" else "gpu"
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for ``arrays``, in the order of :attr:`inputs`."""
        given = dict(zip(self.inputs, arrays, strict=True))
        try:
            found = self._session.run(None, given)
        except Exception:
            if not self._unproven:
                raise
            self._session = self._reopen(precise=False)
            found = self._session.run(None, given)
        self._unproven = False
        return found


def open_precisely(
    runtime: Any, model: str | bytes, options: Any, providers: Sequence[str]
) -> tuple[Any, bool]:
    """Return a session of ONNX Runtime that does not overflow, and whether it was to be had.

    Weights that several nodes share, as a detector's heads do, and weights that share a zero point only load without.

    Args:
        runtime: The module ``onnxruntime``.
        model: A file, or its content.
        options: Of the session; :data:`PRECISE` is set in them.
        providers: Names of execution providers.
    """
    try:
        return _open(runtime, model, options, providers, precise=True), True
    except Exception:  # onnxruntime's own exceptions share no base but Exception
        return _open(runtime, model, options, providers, precise=False), False


def _open(runtime: Any, model: str | bytes, options: Any, providers: Sequence[str], *, precise: bool) -> Any:
    options.add_session_config_entry(PRECISE, "1" if precise else "0")
    return runtime.InferenceSession(model, options, providers=providers)


def version() -> str | None:
    """Return the version of ONNX Runtime; None where it is not installed."""
    try:
        return _onnxruntime().__version__
    except RequestError:
        return None


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RequestError(
            "ONNX files need ONNX Runtime, which is not installed", hint="Run: pip install onnxruntime"
        ) from error
    return onnxruntime


def _providers(runtime: Any, accelerator: Accelerator) -> Sequence[str]:
    available = runtime.get_available_providers()
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if accelerator == "cpu" or (accelerator == "auto" and cuda not in available):
        return [cpu]
    if cuda not in available:
        raise RequestError(
            "this ONNX Runtime has no CUDA provider", hint="Run: pip install onnxruntime-gpu, or pass --accelerator cpu"
        )
    return [cuda, cpu]
