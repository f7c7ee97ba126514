"""What this machine can do: devices, versions, optional packages, and what to do about each that is missing."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import visionkd
from visionkd.benchmark.record import processor
from visionkd.runtime.cuda_driver import find_device

Status = Literal["ok", "missing", "broken"]
_GB = 1e9
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
_CHECKED_EXTRAS = ("", "train")


@dataclass(frozen=True)
class DoctorRow:
    """One finding.

    Attributes:
        name: What was looked at.
        status: ``ok``; ``missing``, which only matters to who needs it; ``broken``, which is there but does not work.
        detail: Version, size or reason.
        hint: What to do about it.
    """

    name: str
    status: Status
    detail: str
    hint: str | None = None


@dataclass(frozen=True)
class DoctorResult:
    """All findings, in the order in which they are worth reading."""

    rows: tuple[DoctorRow, ...]


@dataclass(frozen=True)
class Requirement:
    """A package that visionkd wants: its name, lowest version and the extra that brings it (empty for the base)."""

    name: str
    minimum: str
    extra: str


def doctor() -> DoctorResult:
    """Look at this machine; nothing is changed and no network is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [*_system(), *_places(), *map(check_package, requirements()), *_accelerators(), *_engines()]
    return DoctorResult(tuple(rows))


def requirements() -> tuple[Requirement, ...]:
    """Return what the installed metadata ask for; in a checkout that is not installed, what ``setup.cfg`` says."""
    try:
        lines = importlib.metadata.requires("visionkd") or []
    except importlib.metadata.PackageNotFoundError:
        lines = list(_declared(Path(visionkd.__file__).resolve().parent.parent / "setup.cfg"))
    found = [parse_requirement(line) for line in lines]
    return tuple(one for one in found if one.extra in _CHECKED_EXTRAS)


def parse_requirement(line: str) -> Requirement:
    """Read a line such as ``torch>=2.8; extra == "train"``, which is as complicated as ours are."""
    name = re.match(r"\s*([A-Za-z0-9._-]+)", line)
    minimum = re.search(r">=\s*([\d.]+)", line)
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", line)
    return Requirement(
        name.group(1).lower() if name else line, minimum.group(1) if minimum else "", extra.group(1) if extra else ""
    )


def _declared(file: Path) -> Iterator[str]:
    parser = configparser.ConfigParser()
    parser.read(file, encoding="utf-8")
    yield from parser.get("options", "install_requires", fallback="").split()
    for line in parser.get("options.extras_require", "train", fallback="").split():
        yield f"{line}; extra == 'train'"


def check_package(wanted: Requirement) -> DoctorRow:
    """Import a package and compare its version; an import that fails is the finding that matters most."""
    install = f"pip install 'visionkd[{wanted.extra}]'" if wanted.extra else "pip install visionkd"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return DoctorRow(wanted.name, "missing", "not installed", install)
    try:
        module = importlib.import_module(_MODULES.get(wanted.name, wanted.name.replace("-", "_")))
    except Exception as error:  # whatever a broken package raises is what the user has to see
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return DoctorRow(
            wanted.name, "broken", f"{version} cannot be imported: {reason}", f"{install} --force-reinstall"
        )
    if wanted.minimum and _numbers(version) < _numbers(wanted.minimum):
        return DoctorRow(wanted.name, "broken", f"{version} is older than {wanted.minimum}", f"{install} --upgrade")
    detail = version
    if wanted.name == "onnxruntime":
        names = [name.removesuffix("ExecutionProvider") for name in module.get_available_providers()]
        detail = f"{version} ({', '.join(names)})"
    return DoctorRow(wanted.name, "ok", detail)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with, less zeros at the end: (2, 14, 1) for ``2.14.1+cu130``."""
    start = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in start.group().split(".")] if start else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _system() -> Iterator[DoctorRow]:
    yield DoctorRow("visionkd", "ok", f"{visionkd.__version__} in {Path(visionkd.__file__).resolve().parent}")
    version = platform.python_version()
    supported = sys.version_info >= (3, 10)
    hint = None if supported else "Install Python 3.10 or newer."
    yield DoctorRow("python", "ok" if supported else "broken", f"{version} in {sys.prefix}", hint)
    yield DoctorRow("system", "ok", platform.platform())
    release = Path("/etc/nv_tegra_release")
    if release.is_file():
        yield DoctorRow(
            "jetson", "ok", release.read_text(encoding="utf-8", errors="replace").splitlines()[0].lstrip("# ")
        )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield DoctorRow("processor", "ok", f"{usable} of {os.cpu_count()} cores usable, {_processor()}")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield DoctorRow("memory", "ok", f"{total / _GB:.1f} GB")


def _processor() -> str:
    """Return the model and, since they decide how fast INT8 runs, the integer dot-product instructions it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return processor()
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm"}
    found = sorted(known.intersection(flags.group(1).split())) if flags else []
    return f"{processor()} ({', '.join(found)})" if found else processor()


def _places() -> Iterator[DoctorRow]:
    yield _place("working directory", Path.cwd(), needed_gb=1.0, hint="Write elsewhere with --out.")
    cache = Path(os.environ.get("VISIONKD_CACHE") or Path.home() / ".cache" / "visionkd")
    yield _place("cache", cache, needed_gb=1.0, hint="Set VISIONKD_CACHE to a directory with room.")
    shared = Path("/dev/shm")
    if shared.is_dir():
        hint = "Data loaders need it: start the container with --shm-size=1g, or use -o data.workers=0."
        yield _place("shared memory", shared, needed_gb=0.25, hint=hint)


def _place(name: str, path: Path, *, needed_gb: float, hint: str) -> DoctorRow:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        free_gb = shutil.disk_usage(existing).free / _GB
    except OSError as error:
        return DoctorRow(name, "broken", f"{path}: {error.strerror or error}", hint)
    if free_gb < needed_gb:
        return DoctorRow(name, "broken", f"{path}: only {free_gb:.2f} GB free", hint)
    return DoctorRow(name, "ok", f"{path}: {free_gb:.1f} GB free")


def _accelerators() -> Iterator[DoctorRow]:
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    try:
        import torch
    except Exception:  # its own row tells why
        device = find_device()
        if device is not None:  # enough for engines
            size = f"{device.memory_bytes / _GB:.1f} GB, compute {device.compute_capability}"
            yield DoctorRow("gpu", "ok", f"{device.name}, {size}, without PyTorch")
            return
        detail = "there is an NVIDIA driver that shows no GPU" if has_driver else "no NVIDIA driver"
        yield DoctorRow("gpu", "missing", detail, "Check it with: nvidia-smi" if has_driver else None)
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(torch, index)
    elif has_driver:
        built = (
            f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without CUDA"
        )
        hint = "Install a PyTorch build that fits the driver: compare with the CUDA version that nvidia-smi prints."
        yield DoctorRow("gpu", "broken", f"an NVIDIA driver is there, but {built} and cannot use it", hint)
    elif getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        yield DoctorRow("gpu", "ok", "Apple GPU through MPS")
    else:
        yield DoctorRow("gpu", "missing", "none: training and evaluation run on the processor")


def _gpu(torch: Any, index: int) -> DoctorRow:
    """Describe a GPU after letting it compute: a build without kernels for it is only found out this way."""
    name = "gpu" if index == 0 else f"gpu {index}"
    try:
        properties = torch.cuda.get_device_properties(index)
        ones = torch.ones(8, 8, device=f"cuda:{index}")
        if float((ones @ ones).sum()) != 512.0:
            return DoctorRow(
                name, "broken", f"{properties.name} computes wrong results", "Check the driver and the card."
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return DoctorRow(name, "broken", reason, "Install a PyTorch build with kernels for this card.")
    formats = "bf16, fp16" if properties.major >= 8 else "fp16"
    detail = (
        f"{properties.name}, {properties.total_memory / _GB:.1f} GB, compute {properties.major}.{properties.minor}, "
        f"CUDA {torch.version.cuda}, {formats}"
    )
    return DoctorRow(name, "ok", detail)


def _engines() -> Iterator[DoctorRow]:
    """Say what is there to build TensorRT engines with, and to run them."""
    found = [
        _engine_package("tensorrt", "Only for engines; JetPack brings it on a Jetson, elsewhere: pip install tensorrt"),
        _engine_package("tensorrt_rtx", "Only to build engines without a GPU: pip install tensorrt-rtx-cu12"),
        _engine_package("pycuda.driver", "Only to run engines: pip install pycuda"),
    ]
    yield from found
    if found[0].status != "missing" and found[2].status == "missing":
        yield DoctorRow(
            "engines", "missing", "TensorRT is there to build engines, and pycuda to run them is not",
            "pip install pycuda",
        )  # fmt: skip
    elif Path("/etc/nv_tegra_release").is_file() and found[0].status == "missing" and sys.prefix != sys.base_prefix:
        yield DoctorRow(
            "engines", "missing", "this virtual environment hides JetPack's TensorRT",
            "python3 -m venv --system-site-packages DIR",
        )  # fmt: skip


def _engine_package(module: str, hint: str) -> DoctorRow:
    name = module.partition(".")[0]
    if importlib.util.find_spec(name) is None:
        return DoctorRow(name, "missing", "not installed", hint)
    try:
        loaded = importlib.import_module(module)
        version = getattr(loaded, "__version__", None) or importlib.metadata.version(name)
    except Exception as error:  # a library of another CUDA fails in ways of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return DoctorRow(name, "broken", f"cannot be imported: {reason}", "Reinstall it to fit the driver.")
    return DoctorRow(name, "ok", str(version))
