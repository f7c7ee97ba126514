"""What a finished run says of itself, as a zoo card wants it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from visionkd.errors import Problem, RequestError
from visionkd.hub.index import all_cards
from visionkd.runtime.onnx_file import read_onnx_file

_SLUG = re.compile(r"[^a-z0-9_.+-]+")


class History:
    """What a run directory says of how it came about."""

    def __init__(self, run: Path) -> None:
        self.config: Mapping[str, Any] = yaml.safe_load(_text(run / "config.yaml")) or {}
        about: Mapping[str, Any] = json.loads(_text(run / "environment.json") or "{}")
        started = re.search(r" start: (.*)", _text(run / "log.txt").partition("\n")[0])
        command = started.group(1) if started else about.get("command")
        self.command = _portable(command) if command else None
        recipe = re.search(r"--config ([a-z]+/\S+)", self.command or "")
        self.recipe = recipe.group(1) if recipe else None
        commit = str(about.get("commit") or "")
        self.commit = commit if re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", commit) else None
        devices = ", ".join(map(str, about.get("devices") or ())) or about.get("processor")
        threads = f", {about['threads']} thread(s)" if about.get("threads") and not about.get("devices") else ""
        precision = self.config.get("training", {}).get("precision")
        self.machine = f"{devices}{threads}{f', {precision}' if precision else ''}" if devices else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _portable(command: str) -> str:
    """Return a command without folders of the machine, which say nothing to a reader."""
    return re.sub(r"(?<!\S)/\S*/", "", command)


def forms_of(run: Path, package: Path, wanted: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files of each form, the package first."""
    found = {"weights": [file for file in sorted(package.iterdir()) if file.suffix in (".json", ".safetensors")]}
    for file in sorted((run / "export").glob("*.onnx")):
        about = read_onnx_file(file)
        name = {None: "onnx", "cpu": "int8", "tensorrt": "int8-tensorrt"}[about.int8_target]
        if about.has_external_data or name in found:
            continue
        found[name] = [file]
    if unknown := [form for form in wanted if form not in found]:
        raise RequestError(
            [Problem("--form", f"the run has no '{form}'", f"It has: {', '.join(found)}.") for form in unknown]
        )
    return {name: files for name, files in found.items() if not wanted or name in wanted}


def complexity_of(package: Path) -> tuple[float, float]:
    from visionkd.benchmark.complexity import measure_complexity
    from visionkd.models.factory import load_packaged

    cost = measure_complexity(load_packaged(package)[0])
    return round(cost.params_m, 6), round(cost.macs_g, 6)


def teacher_of(about: Mapping[str, Any]) -> str | None:
    """Return the teachers by name: those of the zoo where a card's command made the run that taught."""
    names = about.get("origin", {}).get("teachers") or ()
    return ", ".join(_teacher_name(str(name)) for name in names) or None


def _teacher_name(name: str) -> str:
    made = {}
    for card in all_cards():
        out = re.search(r"--out (\S+)", card.training.command or "")
        if out:
            made[Path(out.group(1)).name] = f"zoo:{card.name}"
    last = Path(name).name
    return made.get(last, last)


def data_name(config: Mapping[str, Any], about: Mapping[str, Any], data: str | None) -> str:
    given = data or config.get("data", {}).get("path") or about.get("origin", {}).get("data")
    if not given:
        raise RequestError(Problem("--data", "is required: the run does not say what it was trained on"))
    return Path(str(given)).name.partition(".")[0]


def slug(text: str) -> str:
    return _SLUG.sub("_", text.lower()).strip("_.+-")
