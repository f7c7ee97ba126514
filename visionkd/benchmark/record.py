"""One measured model as a typed record, for machines and for people."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_PACKAGES = ("visionkd", "torch", "torchvision", "timm", "onnxruntime", "tensorrt", "tensorrt-rtx-cu12", "numpy")


@dataclass(frozen=True)
class BenchRecord:
    """Latency and size of one model on one backend.

    Attributes:
        model: Name of the model.
        backend: ``torch`` or ``onnxruntime``.
        device: Processor or GPU.
        precision: Number format, ``fp32``.
        batch_size: Images in a batch.
        threads: Threads within an operator.
        img_size: Height and width in pixels.
        latency_ms: Median over the timed calls, for one batch.
        latency_p90_ms: 90th percentile.
        throughput_img_s: Images a second at the median.
        params_m: Parameters in millions, if known.
        macs_g: Multiply-accumulates for one image in 10^9, if known.
        size_mb: Weights, or the file, in 10^6 bytes.
        rounds: Interleaved rounds.
        calls: Timed calls.
        versions: Installed packages.
    """

    model: str
    backend: str
    device: str
    precision: str
    batch_size: int
    threads: int
    img_size: tuple[int, int]
    latency_ms: float
    latency_p90_ms: float
    throughput_img_s: float
    params_m: float | None
    macs_g: float | None
    size_mb: float | None
    rounds: int
    calls: int
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_COLUMNS = {
    "model": "{}",
    "backend": "{}",
    "batch_size": "{}",
    "threads": "{}",
    "latency_ms": "{:.2f}",
    "latency_p90_ms": "{:.2f}",
    "throughput_img_s": "{:.1f}",
    "params_m": "{:.2f}",
    "macs_g": "{:.3f}",
    "size_mb": "{:.2f}",
}


def to_json(records: Sequence[BenchRecord]) -> str:
    """Return the records as a JSON list."""
    return json.dumps([record.to_dict() for record in records], indent=2)


def to_markdown(records: Sequence[BenchRecord]) -> str:
    """Return the records as a Markdown table, and a line that says how they were measured."""
    rows = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for record in records:
        values = [getattr(record, name) for name in _COLUMNS]
        cells = ["" if v is None else form.format(v) for v, form in zip(values, _COLUMNS.values(), strict=True)]
        cells = [cell.replace("|", "\\|") for cell in cells]
        rows.append("| " + " | ".join(cells) + " |")
    if records:
        first = records[0]
        devices = ", ".join(dict.fromkeys(record.device for record in records))
        installed = ", ".join(f"{name} {version}" for name, version in first.versions.items())
        rows += ["", f"Medians over {first.rounds} interleaved rounds on {devices}; {installed}."]
    return "\n".join(rows)


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Return the name of the processor and how many of its threads may be used."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()} ({count} threads)"


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of those packages that are installed; by default of all that decide a measurement."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
