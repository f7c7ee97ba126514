"""What a search leaves: its state, the table of all candidates, and the picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionkd.config.search import SearchConfig
from visionkd.errors import DataError
from visionkd.files import write_text
from visionkd.report.pareto import Panel, pareto_svg
from visionkd.search.evolution import Record, Search, pareto
from visionkd.search.spaces import Space
from visionkd.types import MetricRow
from visionkd.workflows._search_request import described, distill_command

_FILES = {"state": "search.json", "candidates": "candidates.csv", "pareto": "pareto.svg"}
_COSTS = {"params_m": "Parameters, M", "macs_g": "MACs per image, G", "latency_ms": "Latency of an image, ms"}
_SHOWN = 10


def files_of(run: Path) -> dict[str, Path]:
    """Return the files of a search, by name."""
    return {name: run / file for name, file in _FILES.items() if (run / file).is_file()}


def read_state(run: Path) -> dict[str, Any] | None:
    """Return the state of a search that was stopped, None where none was kept.

    Raises:
        DataError: If the file is damaged.
    """
    file = run / _FILES["state"]
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}", hint="Start again with --overwrite.") from error


def write_state(run: Path, state: Mapping[str, Any]) -> None:
    """Keep the state of a search."""
    write_text(run / _FILES["state"], json.dumps(state) + "\n")


def write_files(run: Path, state: Mapping[str, Any], search: Search, config: SearchConfig, space: Space) -> None:
    """Write the state with what was found, the table and the picture of a search that is done."""
    ranking = search.ranking()
    best = space.network(ranking[0].candidate)
    write_state(run, {**state, "best": best.model_dump(), "command": distill_command(config, best)})
    write_text(run / _FILES["candidates"], _table(search, space))
    write_text(run / _FILES["pareto"], pareto_svg(_panels(ranking, config.budget), score=config.score))


def rows(ranking: Sequence[Record], space: Space, count: int = _SHOWN) -> tuple[MetricRow, ...]:
    """Return the best candidates as lines of a table."""
    return tuple(
        MetricRow(
            described(space.network(record.candidate)),
            {"rank": str(rank), **{name: record.costs.get(name) for name in _COSTS}, "score": record.score},
        )
        for rank, record in enumerate(ranking[:count], start=1)
    )


def _table(search: Search, space: Space) -> str:
    """Return all candidates as CSV: those with a score by rank, then the others, with the reason."""
    ranking = search.ranking()
    parts = sorted({name for record in ranking for name in record.parts})
    others = [record for record in search.records if record.score is None]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["rank", "candidate", "status", "score", *_COSTS, *parts, "number", "origin", "parents", "reason"]
    writer.writerow(header)
    for rank, record in [*enumerate(ranking, start=1), *((None, record) for record in others)]:
        writer.writerow(
            [
                rank,
                described(space.network(record.candidate)),
                record.status,
                record.score,
                *(record.costs.get(name) for name in _COSTS),
                *(record.parts.get(name) for name in parts),
                record.number,
                record.origin,
                " ".join(map(str, record.parents)),
                record.reason,
            ]
        )
    return out.getvalue()


def _panels(ranking: Sequence[Record], budget: Mapping[str, float]) -> dict[str, Panel]:
    panels = {}
    for cost, title in _COSTS.items():
        known = [record for record in ranking if record.costs.get(cost)]
        if not known or (cost == "latency_ms" and len(known) < len(ranking)):
            continue
        place = {record.number: index for index, record in enumerate(known)}
        panels[cost] = Panel(
            title,
            [record.costs[cost] for record in known],
            [float(record.score or 0.0) for record in known],
            [place[record.number] for record in pareto(known, cost)],
            best=0,
            limit=budget.get(cost),
        )
    return panels
