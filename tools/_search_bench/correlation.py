"""How well scores rank students: over all of them, among those of equal cost, and by the winner of a budget."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import mean, pstdev
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from _search_bench.tables import Row, Table
from visionkd.data.subset import stratified_subset, targets_of
from visionkd.models.factory import create_network
from visionkd.models.network import Network
from visionkd.search._passes import seeded
from visionkd.search.scores import make_scorer, needs_teacher, score_names
from visionkd.types import Source

EQUAL = 0.05  # relative difference of costs up to which two students count as equally large
BUDGETS = (0.3, 0.5, 0.7)  # share of the students that keep to the limit of a budget
_FROM_DISWOT = {"diswot_relation": "relation", "diswot_semantic": "semantic"}  # parts of one pass


def scored(
    table: Table, source: Source, *, teacher: str, init: str, seed: int, batch: int
) -> tuple[dict[str, list[float]], float]:
    """Return what each score says of each student, and the seconds of one score ``diswot``.

    Args:
        table: The students.
        source: Images; a batch of them is looked at.
        teacher: One of the table's.
        init: How weights are drawn; ``gaussian`` leaves out the scores that compare with no teacher.
        seed: Of weights, batch and labels.
        batch: Number of images.
    """
    image, target = _batch(source, batch, seed, table)
    names = [name for name in score_names() if name not in _FROM_DISWOT and (init == "default" or needs_teacher(name))]
    given = {"image": image, "target": target, "num_classes": table.num_classes, "seed": seed, "init": init}
    network = _network(table, table.teachers[teacher], seed + 1000)
    scorers = {name: make_scorer(name, teacher=network if needs_teacher(name) else None, **given) for name in names}
    found: dict[str, list[float]] = {name: [] for name in (*names, *_FROM_DISWOT)}
    seconds = 0.0
    for row in table.rows:
        student = _network(table, row.student, seed)
        for name in names:
            started = time.perf_counter()
            result = scorers[name](student)
            found[name].append(result.value)
            if name == "diswot":
                seconds += time.perf_counter() - started
                for part_of, part in _FROM_DISWOT.items():
                    found[part_of].append(-result.parts[part])
    return found, seconds / len(table.rows)


def correlations(table: Table, by_seed: Sequence[dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """Yield one row for each score, means over seeds: rank correlations, and those among pairs of equal cost."""
    top1 = np.array([row.top1 for row in table.rows])
    pairs = {cost: _equal_pairs(table.rows, cost) for cost in ("params", "macs")}
    for name in by_seed[0]:
        columns: dict[str, list[float]] = {"kendall": [], "spearman": [], "params": [], "macs": []}
        for values in by_seed:
            score = np.array(values[name])
            columns["kendall"].append(float(kendalltau(score, top1).statistic))
            columns["spearman"].append(float(spearmanr(score, top1).statistic))
            for cost, (first, second) in pairs.items():
                columns[cost].append(_agreement(score, top1, first, second))
        # a name each, so that a reader of the table needs no legend
        yield {
            "score": name,
            "seeds": len(by_seed),
            **{key: f"{mean(columns[key]):.3f}" for key in ("kendall", "spearman")},
            **{f"{key}_std": f"{pstdev(columns[key]):.3f}" for key in ("kendall", "spearman")},
            **{f"kendall_equal_{cost}": f"{mean(columns[cost]):.3f}" for cost in pairs},
            **{f"pairs_equal_{cost}": len(first) for cost, (first, _) in pairs.items()},
        }


def winners(table: Table, by_seed: Sequence[dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """Yield, for each budget and score, the accuracy of the student that the score would choose."""
    for cost, values in (
        ("params_m", [row.params_m for row in table.rows]),
        ("macs_g", [r.macs_g for r in table.rows]),
    ):
        for share in BUDGETS:
            limit = float(np.quantile(values, share))
            inside = [number for number, value in enumerate(values) if value <= limit]
            best = max(table.rows[number].top1 for number in inside)
            for name in by_seed[0]:
                chosen = [max(inside, key=lambda number: scores[name][number]) for scores in by_seed]
                top1 = mean(table.rows[number].top1 for number in chosen)
                yield {"score": name, "limited": cost, "limit": f"{limit:.4f}", "students_inside": len(inside),
                       "top1": f"{top1:.2f}", "best_top1": f"{best:.2f}"}  # fmt: skip


def _equal_pairs(rows: Sequence[Row], cost: str) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([row.params_m if cost == "params" else row.macs_g for row in rows])
    first, second = np.triu_indices(len(rows), 1)
    near = np.abs(np.log(values[first] / values[second])) <= np.log1p(EQUAL)
    return first[near], second[near]


def _agreement(score: np.ndarray, top1: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau over some pairs alone: those ordered alike less those ordered otherwise, as a share of all."""
    if not len(first):
        return float("nan")
    return float(np.mean(np.sign(score[first] - score[second]) * np.sign(top1[first] - top1[second])))


def _batch(source: Source, count: int, seed: int, table: Table) -> tuple[torch.Tensor, torch.Tensor]:
    part = stratified_subset(source, count, seed=seed)
    images = [torch.from_numpy(np.array(part.load(index).convert("RGB"))) for index in range(len(part))]
    target = torch.from_numpy(targets_of(part))
    if table.random_labels:
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(table.num_classes, (len(part),), generator=generator)
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), target


def _network(table: Table, config: Any, seed: int) -> Network:
    with seeded(seed):
        return create_network(config, num_classes=table.num_classes, in_training=True)
