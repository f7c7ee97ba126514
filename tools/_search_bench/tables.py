"""Accuracies of distilled students, which scores are compared with, from the tables that hold them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from visionkd.config.schema import NetworkConfig


@dataclass(frozen=True)
class Row:
    """A student that was distilled: how often it was, and how good it is."""

    student: NetworkConfig
    params_m: float
    macs_g: float
    top1: float


@dataclass(frozen=True)
class Table:
    """Students of one benchmark.

    Attributes:
        name: Of the benchmark.
        rows: The students.
        teachers: Networks to score against, by name; the first is the one that taught.
        num_classes: Of the data the students were trained on.
        random_labels: Whether images at hand are of other data, so that their labels say nothing.
    """

    name: str
    rows: Sequence[Row]
    teachers: dict[str, NetworkConfig]
    num_classes: int
    random_labels: bool


def own_table(file: Path) -> Table:
    """Return the benchmark of this project; accuracies are means over seeds."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    with file.open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            groups.setdefault((row["blocks"], row["channels"]), []).append(row)
    rows = [
        Row(
            _student(blocks, channels), float(found[0]["params_m"]), float(found[0]["macs_g"]),
            mean(float(row["top1"]) for row in found),
        )
        for (blocks, channels), found in groups.items()
    ]  # fmt: skip
    teachers = {
        "cifar_resnet14 x 2": NetworkConfig(name="cifar_resnet14", pretrained=False, args={"width": 2}),
        # not the one that taught, but as wide as the students: semantics are then compared channel by channel
        "cifar_resnet56": NetworkConfig(name="cifar_resnet56", pretrained=False),
    }
    return Table("cifar10", rows, teachers, num_classes=10, random_labels=False)


def s0_table(file: Path) -> Table:
    """Return the 64 students of DisWOT's space S0, distilled on CIFAR-100 by the authors.

    Args:
        file: ``.npz`` with ``depth`` 64 x 3, ``acc_kd``, ``params`` and ``macs``, 64 each.
    """
    found = np.load(file)
    columns = zip(found["depth"].tolist(), found["params"], found["macs"], found["acc_kd"], strict=True)
    rows = [
        Row(_student("-".join(map(str, depth)), "16-32-64"), params / 1e6, macs / 1e9, float(top1))
        for depth, params, macs, top1 in columns
    ]
    teachers = {"cifar_resnet110": NetworkConfig(name="cifar_resnet110", pretrained=False)}
    return Table("s0", rows, teachers, num_classes=100, random_labels=True)


def _student(blocks: str, channels: str) -> NetworkConfig:
    args = {
        name: [int(part) for part in text.split("-")] for name, text in (("blocks", blocks), ("channels", channels))
    }
    return NetworkConfig(name="cifar_resnet", pretrained=False, args=args)
