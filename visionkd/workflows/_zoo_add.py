"""From a finished run to a card and its files, ready to be looked at and proposed."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from visionkd.errors import DataError, Problem, RequestError
from visionkd.files import replacing, sha256, write_text
from visionkd.hub.card import CARD_FORMAT, Card
from visionkd.hub.index import card_files, own_directory, read_card
from visionkd.models.names import package_directory
from visionkd.models.package_file import CARD_FILE, verified_weights
from visionkd.models.package_file import read_card as read_package
from visionkd.types import Listener
from visionkd.workflows._zoo_card import card_text
from visionkd.workflows._zoo_run import History, complexity_of, data_name, forms_of, slug, teacher_of
from visionkd.workflows.evaluate import evaluate

#: Metrics that a card keeps; the others of a run are for its report.
_METRICS = ("top1", "top5", "miou", "pixel_acc", "ap", "ap50", "ap75", "ap50_base", "ap50_novel")


@dataclass(frozen=True)
class ZooAdded:
    """A card that was written.

    Attributes:
        card: Its file.
        name: What ``zoo:`` takes.
        files: The copied files.
        size_mb: Their bytes in 10^6.
        to_do: What a person has to look at before it is proposed.
    """

    card: Path
    name: str
    files: tuple[Path, ...]
    size_mb: float
    to_do: tuple[str, ...]


def add_zoo(
    *,
    run: str,
    name: str | None = None,
    title: str | None = None,
    zoo: str | None = None,
    licence: str = "unknown",
    licence_note: str | None = None,
    good_for: Sequence[str] = (),
    bad_for: Sequence[str] = (),
    notes: Sequence[str] = (),
    forms: Sequence[str] = (),
    data: str | None = None,
    measure: bool = True,
    time: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> ZooAdded:
    """Write a card of a finished run, and copy its files beside the cards.

    Args:
        run: Run directory.
        name: Name of the model; None makes ``<architecture>.<method>_<teacher>_<data>``.
        title: One line on what it is; None makes one.
        zoo: Folder of cards to write into; None takes the checkout's own.
        licence: SPDX identifier of the licence that you give the weights.
        licence_note: What a user has to know of it.
        good_for: What the model is good for.
        bad_for: What it is bad for.
        notes: What else a user has to know.
        forms: Which forms to take: ``weights``, ``onnx``, ``int8``, ``int8-tensorrt``; None are named: all there are.
        data: DATA to measure on; None takes the run's.
        measure: Measure each form on the validation split; without it the card states what the run measured.
        time: Time each form on this machine, one image and one thread.
        overwrite: Replace a card and files of the same name.
        listener: Is told what happens.

    Raises:
        RequestError: If the run is not finished, or a card of that name exists.
        DataError: If its files are damaged.
    """
    listener = listener or Listener()
    source, root = Path(run).expanduser(), _zoo_folder(zoo)
    package = package_directory(source)
    if package is None:
        raise RequestError(
            f"'{run}' is not a finished run: it has no model/model.json", hint="Continue it with --resume --out DIR."
        )
    about = read_package(package)
    verified_weights(package, about)
    history = History(source)
    found = forms_of(source, package, forms)
    data_set = data_name(history.config, about, data)
    teacher = teacher_of(about)
    method = str(about.get("origin", {}).get("method") or "supervised")
    if name is None:
        taught_by = [each.removeprefix("zoo:").partition(".")[0] for each in teacher.split(", ")] if teacher else []
        parts = [method, *taught_by, data_set]
        name = slug(f"{about['architecture']}.{'_'.join(parts)}")
    target = root / about["task"] / f"{name}.yaml"
    _check_free(name, target, root, overwrite)
    params_m, macs_g = complexity_of(package)
    values: dict[str, Any] = {
        "format": CARD_FORMAT,
        "name": name,
        "title": title or _title(about["architecture"], method, teacher, data_set),
        "task": about["task"],
        "origin": "own",
        "licence": licence,
        "licence_note": licence_note,
        "data": data_set,
        "num_classes": about["num_classes"],
        "classes": about["classes"],
        "architecture": {"name": about["architecture"], "library": about["source"], "args": about["model_args"]},
        "preprocessing": about["input"],
        "params_m": params_m,
        "macs_g": macs_g,
        "training": {
            "method": method,
            "teacher": teacher,
            "recipe": history.recipe,
            "command": history.command,
            "commit": history.commit,
            "seed": history.config.get("training", {}).get("seed"),
            "machine": history.machine,
        },
        "artifacts": {form: _artifact(form, files, name) for form, files in found.items()},
        "metrics": _measurements(name, found, package, about, data_set, data, measure, listener),
        "latencies": _latencies(found, package, listener) if time else [],
        "good_for": list(good_for) or [f"images like those of {data_set}"],
        "bad_for": list(bad_for) or [f"images unlike those of {data_set}"],
        "notes": list(notes),
    }
    try:
        card = Card.model_validate(values)
    except ValidationError as error:
        problems = [Problem(".".join(map(str, item["loc"])) or "card", item["msg"]) for item in error.errors()]
        raise RequestError(problems, hint="Correct the options, or the run's files.") from error
    copied = [_copy(file, root / "weights" / name / file.name) for files in found.values() for file in files]
    write_text(target, card_text(card))
    read_card(target)
    return ZooAdded(target, name, tuple(copied), sum(file.stat().st_size for file in copied) / 1e6,
                    _to_do(card, good_for, bad_for))  # fmt: skip


def _artifact(form: str, files: Sequence[Path], name: str) -> dict[str, Any]:
    listed = [
        {
            "name": file.name,
            "sha256": sha256(file),
            "size_bytes": file.stat().st_size,
            "sources": [{"kind": "repository", "path": f"weights/{name}/{file.name}"}],
        }
        for file in files
    ]
    if form == "weights":
        quantized = "quantization" in json.loads((files[0].parent / CARD_FILE).read_text(encoding="utf-8"))
        return {"format": "package", "precision": "int8" if quantized else "float32", "files": listed}
    precision = {"onnx": ("float32", None), "int8": ("int8", "cpu"), "int8-tensorrt": ("int8", "tensorrt")}[form]
    return {"format": "onnx", "precision": precision[0], "target": precision[1], "files": listed}


def _measurements(
    name: str,
    found: Mapping[str, Sequence[Path]],
    package: Path,
    about: Mapping[str, Any],
    data_set: str,
    data: str | None,
    measure: bool,
    listener: Listener,
) -> list[dict[str, Any]]:
    rows = []
    for number, form in enumerate(found):
        model = f"zoo:{name}" + (f"@{form}" if number else "")
        row: dict[str, Any] = {"artifact": form, "data": data_set, "split": "val", "by": "here"}
        row["how"] = f"visionkd eval {model} --data {shlex.quote(data_set)} --split val"
        if measure:
            result = evaluate(model=str(_model(form, found, package)), data=data, split="val", listener=listener)
            values, row["images"] = result.metrics, result.num_images
        elif form == "weights":
            values = about.get("metrics", {})
        else:
            continue
        row["values"] = {key: round(float(values[key]), 2) for key in _METRICS if key in values}
        if row["values"]:
            rows.append(row)
    return rows


def _latencies(found: Mapping[str, Sequence[Path]], package: Path, listener: Listener) -> list[dict[str, Any]]:
    """Time all forms in interleaved rounds."""
    from visionkd.workflows.bench import bench

    models = {str(_model(form, found, package)): form for form in found if form != "int8-tensorrt"}
    rows = []
    for row in bench(models=tuple(models), listener=listener).rows:
        size = [int(side) for side in str(row.values["img_size"]).split("x")]
        rows.append(
            {
                "artifact": models[row.model],
                "backend": row.values["backend"],
                "device": row.values["device"],
                "threads": row.values["threads"],
                "batch_size": row.values["batch_size"],
                "img_size": size if len(size) == 2 else size * 2,
                "latency_ms": round(float(row.values["latency_ms"] or 0.0), 3),
            }
        )
    return rows


def _model(form: str, found: Mapping[str, Sequence[Path]], package: Path) -> Path:
    return package if form == "weights" else found[form][0]


def _title(architecture: str, method: str, teacher: str | None, data_set: str) -> str:
    if teacher:
        return f"{architecture}, taught by {teacher} ({method}) on {data_set}"
    return f"{architecture}, {'trained' if method == 'supervised' else method} on {data_set}"


def _to_do(card: Card, good_for: Sequence[str], bad_for: Sequence[str]) -> tuple[str, ...]:
    found = []
    if card.licence == "unknown":
        found.append("licence: say which one you give the weights (--licence)")
    if not good_for or not bad_for:
        found.append("good_for and bad_for: write what a user of it should know (--good-for, --bad-for)")
    if not card.metrics:
        found.append("metrics: nothing was measured")
    if card.training.recipe is None:
        found.append("training.recipe: the command names no recipe, so that tools/train_zoo cannot make it again")
    if (card.training.commit or "-dirty").endswith("-dirty"):
        found.append("training.commit: the run came from changed or unknown files")
    return tuple(found)


def _zoo_folder(zoo: str | None) -> Path:
    if zoo is not None:
        return Path(zoo).expanduser()
    own = own_directory()
    if own is None or own.name == "_zoo":
        raise RequestError(
            Problem("--zoo", "is required: this is no checkout of visionkd", "Example: --zoo my_zoo"),
            hint="VISIONKD_ZOO=my_zoo then adds it to the zoo.",
        )
    return own


def _check_free(name: str, target: Path, root: Path, overwrite: bool) -> None:
    if name != slug(name):
        raise RequestError(Problem("--name", f"'{name}' has other letters than a-z, 0-9, '_', '.', '+' and '-'"))
    taken = [file for file in (target, root / "weights" / name) if file.exists()]
    other = card_files().get(name)
    if other is not None and other.parent.parent.resolve() == root.resolve() and other.resolve() != target.resolve():
        raise RequestError(f"{other} has the same name", hint="Give another one with --name.")
    if taken and not overwrite:
        raise RequestError(
            f"{taken[0]} exists, and nothing is written over unasked.", hint="Give --name, or --overwrite."
        )


def _copy(file: Path, target: Path) -> Path:
    with replacing(target) as temporary:
        shutil.copyfile(file, temporary)
    if sha256(target) != sha256(file):
        raise DataError(f"'{target}' was copied wrongly", hint="Look at the disk, and try again.")
    return target
