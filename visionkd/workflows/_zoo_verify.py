"""Hold models of the zoo against their cards: hashes, shape, and with data the metrics themselves."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visionkd.errors import DataError, DownloadError, Problem, RequestError, VisionKDError
from visionkd.hub.card import (
    Card,
    Measurement,
    OnnxArtifact,
    PublishedArtifact,
    PythonPackageSource,
    RepositorySource,
    Source,
)
from visionkd.hub.index import all_cards, card_file, find_card, split_name
from visionkd.hub.pull import Pulled, choose, pull, verify
from visionkd.runtime.session import is_model_file, open_session
from visionkd.types import InputSpec, Listener
from visionkd.workflows.evaluate import evaluate

TOLERANCE_POINTS = 0.1


@dataclass(frozen=True)
class ZooCheck:
    """What was found of one form of a model, or of one metric of it.

    Attributes:
        model: ``NAME``, or ``NAME@FORM``.
        state: ``ok``, ``failed`` or ``skipped``.
        checked: What was looked at: ``hash``, ``loads``, and ``metric`` where data were given.
        data: Data set of the metric.
        metric: Its name.
        stated: What the card says, in percent.
        measured: What was measured now.
        difference: The second less the first, in points.
        reason: Why it failed, or was skipped.
    """

    model: str
    state: Literal["ok", "failed", "skipped"]
    checked: tuple[str, ...] = ()
    data: str | None = None
    metric: str | None = None
    stated: float | None = None
    measured: float | None = None
    difference: float | None = None
    reason: str | None = None


def verify_zoo(
    *,
    names: Sequence[str] = (),
    data: Sequence[str] = (),
    tolerance: float = TOLERANCE_POINTS,
    offline: bool | None = None,
    accelerator: str | None = None,
    listener: Listener | None = None,
) -> tuple[ZooCheck, ...]:
    """Compare models with their cards.

    Files are compared with their SHA-256, the model is loaded, has the outputs and the input that its card says, and
    answers with finite numbers. What was measured here is measured again where the data are given.

    Args:
        names: ``NAME`` for all forms of a model, ``NAME@FORM`` for one. None are named: all that need no download.
        data: ``NAME=DATA`` pairs, where NAME is a data set of the cards; without ``NAME=`` it is the folder's name.
        tolerance: Largest difference of a metric in points.
        offline: Take nothing from the network; None asks the environment.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        listener: Is told what happens.

    Raises:
        RequestError: If a name is unknown, or a data set has no measurement.
    """
    listener = listener or Listener()
    forms = list(_forms(names))
    sets = data_sets(data, {row.data for card, _ in forms for row in card.metrics if row.by == "here"})
    found: list[ZooCheck] = []
    for number, (card, artifact) in enumerate(forms, 1):
        model = card.name if artifact == next(iter(card.artifacts)) else f"{card.name}@{artifact}"
        listener.stage("verify", f"Verify {model}", number, len(forms))
        try:
            pulled = pull(f"{card.name}@{artifact}", offline=True if not names else offline, listener=listener)
            verify(card, artifact)
            checked = (*(["hash"] if _has_hash(card, artifact) else []), *check_answers(pulled))
        except VisionKDError as error:
            may_skip = (offline or not names) and _is_elsewhere(card, artifact, error)
            found.append(ZooCheck(model, "skipped" if may_skip else "failed", reason=_flat(error)))
            continue
        rows = list(_metrics(pulled, model, checked, sets, tolerance, accelerator, listener))
        found += rows or [ZooCheck(model, "ok", checked)]
    return tuple(found)


def data_sets(given: Sequence[str], known: set[str]) -> dict[str, str]:
    """Read ``NAME=DATA`` pairs into DATA by the name of the data set.

    Raises:
        RequestError: If no card has a measurement on one.
    """
    found, problems = {}, []
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(os.path.expanduser(text)).name.partition(".")[0], text
        if name not in known:
            hint = (
                f"Measured here: {', '.join(sorted(known)) or 'nothing'}. Write NAME=DATA for a folder of another name."
            )
            problems.append(Problem("--data", f"no chosen model was measured here on '{name}'", hint))
        found[name] = path
    if problems:
        raise RequestError(problems)
    return found


def check_answers(pulled: Pulled) -> tuple[str, ...]:
    """Load a model and let it answer to one grey image.

    Raises:
        DataError: If its input or its outputs are not those of the card.
    """
    card = pulled.card
    height, width = card.preprocessing.img_size
    grey = np.full((1, 3, height, width), 0.5, np.float32)
    if is_model_file(pulled.model):
        session = open_session(pulled.model)
        spec = session.input
        logits = np.swapaxes(session.predict_candidates(grey)[1], 1, 2) if card.task == "detection" else (
            session.predict_logits(grey)
        )
    else:
        spec, logits = _network_logits(pulled.model, grey)
    problems = _differences(card, spec)
    if card.num_classes and (logits is None or logits.shape[1] != card.num_classes):
        count = "none" if logits is None else logits.shape[1]
        problems.append(f"its outputs are {count}, and the card says {card.num_classes}")
    if logits is not None and not np.isfinite(logits).all():
        problems.append("it answers with numbers that are not finite")
    if problems:
        raise DataError(f"zoo:{card.name}@{pulled.artifact}: {'; '.join(problems)}")
    return ("loads",)


def _network_logits(model: str, image: np.ndarray) -> tuple[InputSpec, np.ndarray | None]:
    import torch

    from visionkd.workflows._networks import load_network

    network = load_network(model).eval()
    with torch.inference_mode():
        answer = network(torch.from_numpy(image))
    if network.task == "detection":  # the scores of what it found, each in the row of its class
        found = answer.boxes[0]
        scores = torch.zeros(1, network.num_classes, len(found.scores))
        scores[0, found.labels, torch.arange(len(found.scores))] = found.scores.float()
        return network.input, scores.numpy()
    return network.input, None if answer.logits is None else answer.logits.float().numpy()


def _differences(card: Card, spec: InputSpec) -> list[str]:
    wanted = card.preprocessing.spec()
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(wanted, name), getattr(spec, name))
        for name in ("img_size", "mean", "std", "interpolation", "crop_pct")
    }
    return [f"its {name} is {_plain(found)}, and the card says {_plain(said)}" for name, (said, found) in pairs.items()
            if not _same(said, found)]  # fmt: skip


def _same(said: Any, found: Any) -> bool:
    if isinstance(said, str):
        return bool(said == found)
    return bool(np.allclose(np.asarray(said, float), np.asarray(found, float), atol=1e-3))


def _plain(value: Any) -> str:
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, (tuple, list)) else str(value)


def _metrics(
    pulled: Pulled,
    model: str,
    checked: tuple[str, ...],
    sets: Mapping[str, str],
    tolerance: float,
    accelerator: str | None,
    listener: Listener,
) -> Iterator[ZooCheck]:
    for row in _measured_here(pulled.card, pulled.artifact):
        if row.data not in sets:
            continue
        try:
            result = evaluate(
                model=pulled.model, data=sets[row.data], split=row.split, accelerator=accelerator, listener=listener
            )
        except VisionKDError as error:
            yield ZooCheck(model, "failed", checked, row.data, reason=_flat(error))
            continue
        problem = None
        if row.images is not None and result.num_images != row.images:
            problem = f"{result.num_images:,} images, and the card says {row.images:,}"
        for name, stated in row.values.items():
            if name not in result.metrics:
                yield ZooCheck(model, "failed", checked, row.data, name, stated, reason="it was not measured")
                continue
            measured = float(result.metrics[name])
            # a figure of a card has two decimals: half of the last one is no difference
            far = abs(measured - stated) > tolerance + 0.005
            reason = problem or (f"more than {tolerance:g} points from the card" if far else None)
            state: Literal["failed", "ok"] = "failed" if reason else "ok"
            difference = round(measured - stated, 4)
            yield ZooCheck(model, state, (*checked, "metric"), row.data, name, stated, measured, difference, reason)


def _is_elsewhere(card: Card, artifact: str, error: VisionKDError) -> bool:
    """Tell whether a form could not be looked at because it is not on this machine, or this machine cannot run it."""
    found = card.artifacts[artifact]
    if isinstance(error, RequestError):
        return importlib.util.find_spec("torch") is None and not isinstance(found, OnnxArtifact)
    if not isinstance(error, DownloadError):
        return False
    if isinstance(found, PublishedArtifact):
        return True
    local = [source for file in found.files for source in file.sources]
    return not any(_is_here(source, card_file(card.name).parent.parent) for source in local)


def _is_here(source: Source, zoo: Path) -> bool:
    if isinstance(source, PythonPackageSource):
        return bool(list(importlib.metadata.distributions(name=source.package)))
    return isinstance(source, RepositorySource) and (zoo / source.path).is_file()


def _has_hash(card: Card, artifact: str) -> bool:
    found = card.artifacts[artifact]
    return not isinstance(found, PublishedArtifact) or found.sha256 is not None


def _measured_here(card: Card, artifact: str) -> tuple[Measurement, ...]:
    first = next(iter(card.artifacts))
    return tuple(row for row in card.metrics if row.by == "here" and (row.artifact or first) == artifact)


def _forms(names: Sequence[str]) -> Iterator[tuple[Card, str]]:
    if not names:
        for card in all_cards():
            for artifact in card.artifacts:
                yield card, artifact
        return
    problems, found = [], []
    for name in names:
        try:
            card, artifact = find_card(name), split_name(name)[1]
            found += [(card, choose(card, artifact))] if artifact else [(card, each) for each in card.artifacts]
        except RequestError as error:
            problems += error.problems or [Problem(name, error.message, error.hint)]
    if problems:
        raise RequestError(problems)
    yield from found


def _flat(error: VisionKDError) -> str:
    return " ".join(f"{error.message} {error.hint or ''}".split())
