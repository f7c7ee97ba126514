"""The zoo: what there is, where it lies, and whether it is what its card says. No torch but where a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.hub import cache
from visionkd.hub.card import Card
from visionkd.hub.index import all_cards, find_card, split_name
from visionkd.hub.pull import choose, is_pulled, pull
from visionkd.types import Listener
from visionkd.workflows._zoo_add import add_zoo
from visionkd.workflows._zoo_push import push_zoo
from visionkd.workflows._zoo_rows import (
    COSTS,
    ZooRow,
    allows_commercial_use,
    least_metrics,
    limited,
    ordered,
    rows_of,
)
from visionkd.workflows._zoo_verify import verify_zoo

__all__ = ["add_zoo", "list_zoo", "prune_zoo", "pull_zoo", "push_zoo", "show_zoo", "verify_zoo"]


@dataclass(frozen=True)
class ZooFile:
    """A form of a model on this machine.

    Attributes:
        model: What stands for it wherever a MODEL is taken.
        path: Its packaged directory or its ONNX file; None where timm or torchvision keep it.
        size_mb: Bytes of its files in 10^6, None where a publisher does not say.
        fetched: Whether it was fetched just now, and not found in a cache.
        licence: Licence of the weights.
    """

    model: str
    path: Path | None
    size_mb: float | None
    fetched: bool
    licence: str


def list_zoo(
    *,
    words: Sequence[str] = (),
    task: str | None = None,
    data: str | None = None,
    origin: str | None = None,
    licence: Sequence[str] = (),
    commercial: bool = False,
    max_params_m: float | None = None,
    max_macs_g: float | None = None,
    max_size_mb: float | None = None,
    max_latency_ms: float | None = None,
    least: Sequence[str] = (),
    pulled: bool = False,
    forms: bool = False,
    sort: str | None = None,
    reverse: bool = False,
    listener: Listener | None = None,
) -> tuple[ZooRow, ...]:
    """Return models of the zoo.

    Args:
        words: Each must occur in the name, the title, the method, or what the model is good for.
        task: ``classification``, ``segmentation`` or ``detection``.
        data: Data set that it was trained or measured on.
        origin: ``own`` or ``upstream``.
        licence: One of these licences.
        commercial: Leave out licences that forbid commercial use, and unknown ones.
        max_params_m: Most parameters in millions.
        max_macs_g: Most multiply-adds of an image in 10^9.
        max_size_mb: Largest files in 10^6 bytes.
        max_latency_ms: Slowest timing of one image.
        least: ``METRIC=VALUE`` pairs: smallest value of a metric in percent.
        pulled: Only what is in a cache, timm's and torchvision's too.
        forms: A row for each form of a model, such as its INT8 twin, instead of its first one.
        sort: Column to sort by; None sorts by task, data and metric.
        reverse: The other way round.
        listener: Is told what was left out because a value is not known.

    Raises:
        RequestError: If a column, a metric, a data set or a licence does not occur.
    """
    cards = list(all_cards())
    _check_known("--data", data, {name for card in cards for name in _data_sets(card)})
    for name in licence:
        _check_known("--licence", name, {card.licence for card in cards})
    least_values = least_metrics(least)
    wanted = [word.lower() for word in words]
    chosen = [
        card
        for card in cards
        if (task is None or card.task == task)
        and (data is None or data in _data_sets(card))
        and (origin is None or card.origin == origin)
        and (not licence or card.licence in licence)
        and (not commercial or allows_commercial_use(card.licence))
        and (not pulled or any(is_pulled(card, artifact) for artifact in card.artifacts))
        and all(word in _text(card) for word in wanted)
    ]
    limits = dict(zip(COSTS, (max_params_m, max_macs_g, max_size_mb, max_latency_ms), strict=True))
    rows, unknown = limited([row for card in chosen for row in rows_of(card, forms=forms)], limits, least_values)
    for column, count in unknown.items():
        (listener or Listener()).message(f"left out because their {column} is not known: {count}")
    return ordered(rows, sort, reverse=reverse)


def show_zoo(*, name: str) -> Card:
    """Return the card of a model.

    Args:
        name: Name of the model, with or without ``zoo:``.

    Raises:
        RequestError: If there is no such model, or its card is wrong.
    """
    return find_card(name)


def pull_zoo(
    *,
    names: Sequence[str],
    every: bool = False,
    offline: bool | None = None,
    listener: Listener | None = None,
) -> tuple[ZooFile, ...]:
    """Bring models onto this machine, verified.

    Args:
        names: ``NAME`` for the form that ``zoo:NAME`` stands for, ``NAME@FORM`` for a certain one.
        every: All forms of each model.
        offline: Take nothing from the network; None asks the environment.
        listener: Is told what happens.

    Raises:
        RequestError: If a name is unknown; nothing is fetched then.
        DownloadError: If a file is not to be had.
        DataError: If what is offered is not what the card says.
    """
    listener = listener or Listener()
    wanted = [f"{card.name}@{artifact}" for card, artifact in _chosen(names, every)]
    files = []
    for number, name in enumerate(wanted, 1):
        listener.stage("pull", f"Pull {name}", number, len(wanted))
        found = pull(name, offline=offline, listener=listener)
        size = found.card.size_bytes(found.artifact)
        size_mb = size / 1e6 if size is not None else None
        files.append(ZooFile(f"zoo:{name}", found.path, size_mb, found.fetched, found.card.licence))
    return tuple(files)


def prune_zoo(*, max_mb: float | None = None, every: bool = False) -> tuple[cache.Entry, ...]:
    """Remove pulled models from the cache, the longest unused first, until it is small enough.

    Args:
        max_mb: What may stay, in 10^6 bytes; None takes the cache's own limit.
        every: Empty the cache, also of what was asked for a moment ago.

    Returns:
        What was removed.

    Raises:
        RequestError: If both are given.
    """
    if every and max_mb is not None:
        raise RequestError(Problem("--max-mb", "does not go with --all", "Give one of them."))
    limit = 0 if every else None if max_mb is None else int(max_mb * 1e6)
    return tuple(cache.prune(limit, even_recent=every))


def _chosen(names: Sequence[str], every: bool) -> list[tuple[Card, str]]:
    """Return the forms that are meant, each once; all problems at once."""
    found, problems = [], []
    for name in names:
        try:
            card, artifact = find_card(name), split_name(name)[1]
            forms = list(card.artifacts) if every and artifact is None else [choose(card, artifact)]
            found += [(card, form) for form in forms]
        except RequestError as error:
            problems += error.problems or [Problem(name, error.message, error.hint)]
    if problems:
        raise RequestError(problems)
    return list({(card.name, form): (card, form) for card, form in found}.values())


def _data_sets(card: Card) -> set[str]:
    return {card.data, *(row.data for row in card.metrics)}


def _text(card: Card) -> str:
    return " ".join([card.name, card.title, card.training.method, *card.good_for]).lower()


def _check_known(option: str, name: str | None, known: set[str]) -> None:
    if name is not None and name not in known:
        hint = did_you_mean(name, known) or f"Known: {', '.join(sorted(known))}"
        raise RequestError(Problem(option, f"no model has '{name}'", hint))
