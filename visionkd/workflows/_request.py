"""From a command's parameters to a checked configuration."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from visionkd import registry
from visionkd.config.load import load_config
from visionkd.config.schema import RunConfig
from visionkd.errors import Problem, RequestError
from visionkd.workflows._rundir import read_run_config
from visionkd.workflows.configs import show_config

C = TypeVar("C", bound=RunConfig)
METHODS = "visionkd.methods"
#: What ``--method auto`` takes.
AUTO_METHOD = "kd"


def build_config(
    kind: type[C],
    *,
    config: str | None,
    options: Sequence[str],
    overrides: Mapping[str, Any],
    out: str | None,
    resume: bool,
) -> C:
    """Read the recipe, or the configuration of the run that is resumed, and apply what was given on the command line.

    Raises:
        RequestError: With everything that is wrong.
    """
    text, where = None, "config"
    if resume and config is None and out is not None:
        text, where = read_run_config(Path(out)), f"{out}/config.yaml"
    elif config is not None:
        text, where = show_config(config), config
    return load_config(
        kind, text=text, where=where, overrides=overrides, options=options, method_options=method_options
    )


def method_options(name: str) -> type | None:
    """Return the frozen options dataclass of a method, None for ``auto`` and names that do not exist."""
    name = AUTO_METHOD if name == "auto" else name
    if name not in registry.names(METHODS):
        return None
    return registry.load(METHODS, name, key="--method").METHOD.Options


def shared_overrides(
    *,
    data: str | None,
    task: str | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int | None,
    export: str | None,
    accelerator: str | None,
    devices: int | str | None,
    nodes: int | None,
    strategy: str | None,
    precision: str | None,
) -> dict[str, Any]:
    """Return the configuration keys behind the options that ``distill`` and ``train`` share."""
    return {
        "data.path": data,
        "task": task,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "optimizer.lr": lr,
        "training.seed": seed,
        "training.precision": precision,
        "export.formats": export.split(",") if export else None,
        "compute.accelerator": accelerator,
        "compute.devices": int(devices) if isinstance(devices, str) and devices.isdecimal() else devices,
        "compute.nodes": nodes,
        "compute.strategy": strategy,
    }


def check_mode(*, resume: bool, overwrite: bool) -> None:
    """Refuse options that contradict each other."""
    if resume and overwrite:
        raise RequestError(Problem("--resume", "contradicts --overwrite", "Give one of the two."))


def command_line() -> str:
    """Return how this process was called, for ``environment.json`` and the header of ``config.yaml``."""
    name = Path(sys.argv[0]).name
    words = ["visionkd" if name in ("visionkd", "__main__.py") else name, *sys.argv[1:]]
    return " ".join(f"'{word}'" if not word or set(word) & set(" '\"$&|;<>*?()") else word for word in words)
