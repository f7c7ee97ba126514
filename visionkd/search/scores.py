"""Zero-cost scores: what is said of an untrained network after one forward and at most one backward pass.

    scorer = make_scorer("diswot", teacher=teacher, image=image, target=target, num_classes=10, seed=0)
    scorer(candidate).value    # higher is better

A score works on a copy in float32, so the candidate stays as it was: no running statistic moves, no gradient is left,
every module keeps its mode. What is random in a pass (dropout) and in an initialisation comes from the seed alone.
:mod:`._passes` runs the networks; :mod:`._measures` holds the scores that look at no teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from visionkd.benchmark.complexity import measure_complexity
from visionkd.errors import Problem, RequestError, WorkError, did_you_mean, first_line
from visionkd.losses.distillation import kd_loss
from visionkd.losses.diswot import (
    class_relation_distance,
    relation_matrix,
    relation_matrix_distance,
    semantic_distance,
    zero_share,
)
from visionkd.models.network import Network
from visionkd.search import _measures
from visionkd.search._passes import INITS, Batch, Pass, initialised, run

__all__ = [
    "INITS",
    "Batch",
    "Score",
    "ScoreResult",
    "TeacherStatistics",
    "combine",
    "make_scorer",
    "needs_teacher",
    "score_names",
    "teacher_statistics",
]

#: Temperature of the score ``kd_loss``, the same as of the distillation that follows a search.
_KD_TEMPERATURE = 4.0
#: Added to the seed that the teacher's weights are drawn from.
_TEACHER_SEED = 1_000_003


@dataclass(frozen=True)
class ScoreResult:
    """What a score says of one network.

    Attributes:
        value: Higher is better.
        parts: What it is made of, by name.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherStatistics:
    """What the scores want of the teacher, computed once for a batch.

    Attributes:
        relation: B x B, from :func:`visionkd.losses.diswot.relation_matrix` of the last map before pooling.
        grad: K x C, gradient of the cross-entropy with respect to the classifier's weights.
        logits: B x K.
        zero_rows: Share of classes whose gradient is zero.
    """

    relation: Tensor
    grad: Tensor
    logits: Tensor
    zero_rows: float


class Score(Protocol):
    """A zero-cost score: of a network (a copy, which it may change) on a batch, beside the teacher's statistics."""

    def __call__(self, network: Network, batch: Batch, teacher: TeacherStatistics | None, /) -> ScoreResult: ...


def score_names() -> tuple[str, ...]:
    """Return the names of all scores."""
    return tuple(_SCORES)


def needs_teacher(name: str) -> bool:
    """Whether the score compares with a teacher."""
    return name in _OF_A_TEACHER


def make_scorer(
    name: str,
    *,
    teacher: Network | None,
    image: Tensor,
    target: Tensor,
    num_classes: int,
    seed: int,
    init: str = "default",
) -> Callable[[Network], ScoreResult]:
    """Return the score ``name`` as a function of a candidate; the teacher is run once, here.

    Args:
        name: One of :func:`score_names`.
        teacher: Network to compare with, left as it is. Its weights are not looked at if they were trained: random
            ones are compared. None for scores that need no teacher.
        image: B x 3 x H x W in [0, 1], or uint8. 64 images or more.
        target: Class indices, B.
        num_classes: Classes K; a teacher with others gets a fresh classifier.
        seed: Of what is random.
        init: ``default`` takes a candidate's weights as they are (fresh ones where they were trained); ``gaussian``
            draws all weights from N(0, 1), with norms at 1 and biases at 0.

    Raises:
        RequestError: If a name is unknown, or the teacher or the batch does not suit.
        WorkError: If the teacher cannot be scored; by the function returned, if a candidate cannot.
    """
    if name not in _SCORES:
        raise RequestError(
            Problem("--score", f"unknown name '{name}'", did_you_mean(name, _SCORES) or f"Known: {', '.join(_SCORES)}")
        )
    if init not in INITS:
        raise RequestError(Problem("--init", f"unknown scheme '{init}'", f"Known: {', '.join(INITS)}"))
    if needs_teacher(name) and teacher is None:
        raise RequestError(Problem("--teacher", f"the score '{name}' compares with a teacher", "Name one."))
    batch = Batch.of(image, target, num_classes, seed)
    statistics = None
    if teacher is not None and needs_teacher(name):
        statistics = _told(teacher, name, lambda: teacher_statistics(teacher, batch, init=init))
    score = _SCORES[name]

    def scorer(network: Network) -> ScoreResult:
        result = _told(network, name, lambda: score(initialised(network, batch, init=init), batch, statistics))
        if not math.isfinite(result.value):
            raise WorkError(f"'{network.architecture}' cannot be scored by '{name}': the score is {result.value}")
        return result

    return scorer


def _told(network: Network, name: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except WorkError:
        raise
    except Exception as error:  # a network may fail in any way, and a search goes on without it
        message = f"'{network.architecture}' cannot be scored by '{name}': {first_line(error)}"
        raise WorkError(message) from error


def teacher_statistics(teacher: Network, batch: Batch, *, init: str = "default") -> TeacherStatistics:
    """Run a randomly initialised copy of ``teacher`` once, forward and backward.

    Raises:
        WorkError: If it has no linear classifier, or its answers are not finite.
    """
    # from another seed than the candidates: one of the same architecture would be drawn with the same weights
    found = run(initialised(teacher, batch, init=init, seed=batch.seed + _TEACHER_SEED), batch)
    assert found.grad is not None
    return TeacherStatistics(relation_matrix(found.feature), found.grad, found.logits, float(zero_share(found.grad)))


def combine(
    results: Sequence[ScoreResult],
    how: Literal["sum", "rank", "zscore"] = "sum",
    *,
    parts: Sequence[str] = ("relation", "semantic"),
) -> list[float]:
    """Add up parts of scores over a population; higher is better.

    Args:
        results: Of the networks that are to be ranked.
        how: ``sum`` adds the distances as released: the semantic one is about a hundred times the other, so its ranking
            is the sum's. ``rank`` adds each part's rank in the population, as a share of it, ``zscore`` its number of
            standard deviations from the mean: both parts count equally. The default is the sum, because it depends on
            one network alone: what a search has scored stays comparable with what it scores later.
        parts: Names of distances in ``parts``; smaller is better.

    Returns:
        One number for each result.
    """
    if not results:
        return []
    columns = torch.tensor([[result.parts[name] for name in parts] for result in results], dtype=torch.float64)
    if how == "rank":
        below = (columns[None] < columns[:, None]).sum(1) + 0.5 * ((columns[None] == columns[:, None]).sum(1) - 1)
        columns = below / max(1, len(results) - 1)
    elif how == "zscore":
        spread = columns.std(0, correction=0)
        columns = (columns - columns.mean(0)) / torch.where(spread > 0, spread, 1.0)
    elif how != "sum":
        raise ValueError(f"how '{how}' is not sum, rank or zscore")
    return (-columns.sum(1)).tolist()


# The scores -----------------------------------------------------------------------------------------------------------


def _relation(found: Pass, teacher: TeacherStatistics) -> float:
    return float(relation_matrix_distance(student=relation_matrix(found.feature), teacher=teacher.relation))


def _classes(found: Pass, teacher: TeacherStatistics, *, by_class: bool) -> dict[str, float]:
    """Return the semantic distance; with ``by_class``, or where the classifiers' widths differ, that of classes."""
    assert found.grad is not None
    by_class = by_class or found.grad.shape != teacher.grad.shape
    if by_class:
        distance = class_relation_distance(student_grad=found.grad, teacher_grad=teacher.grad)
    else:
        distance = semantic_distance(student_map=found.grad, teacher_map=teacher.grad)
    return {
        "semantic": float(distance),
        "semantic_by_class": float(by_class),
        "zero_rows": float(zero_share(found.grad)),
        "teacher_zero_rows": teacher.zero_rows,
    }


def _diswot(
    network: Network, batch: Batch, teacher: TeacherStatistics | None, *, by_class: bool = False
) -> ScoreResult:
    assert teacher is not None
    found = run(network, batch)
    parts = {"relation": _relation(found, teacher), **_classes(found, teacher, by_class=by_class)}
    return ScoreResult(-parts["relation"] - parts["semantic"], parts)


def _diswot_by_class(network: Network, batch: Batch, teacher: TeacherStatistics | None) -> ScoreResult:
    return _diswot(network, batch, teacher, by_class=True)


def _diswot_relation(network: Network, batch: Batch, teacher: TeacherStatistics | None) -> ScoreResult:
    assert teacher is not None
    relation = _relation(run(network, batch, backward=False), teacher)
    return ScoreResult(-relation, {"relation": relation})


def _diswot_semantic(network: Network, batch: Batch, teacher: TeacherStatistics | None) -> ScoreResult:
    assert teacher is not None
    parts = _classes(run(network, batch), teacher, by_class=False)
    return ScoreResult(-parts["semantic"], parts)


def _kd_loss(network: Network, batch: Batch, teacher: TeacherStatistics | None) -> ScoreResult:
    """Minus the loss of knowledge distillation between the random networks, at temperature 4."""
    assert teacher is not None
    logits = run(network, batch, backward=False).logits
    loss = float(kd_loss(student_logits=logits, teacher_logits=teacher.logits, temperature=_KD_TEMPERATURE))
    return ScoreResult(-loss, {"kd_loss": loss})


def _params(network: Network, batch: Batch, teacher: TeacherStatistics | None) -> ScoreResult:
    count = sum(parameter.numel() for parameter in network.net.parameters())
    return ScoreResult(float(count), {"params_m": count / 1e6})


def _macs(network: Network, batch: Batch, teacher: TeacherStatistics | None) -> ScoreResult:
    macs_g = measure_complexity(network).macs_g
    return ScoreResult(macs_g * 1e9, {"macs_g": macs_g})


def _alone(measure: Callable[[Network, Batch], float]) -> Score:
    """Return a score of one number that looks at no teacher."""
    return lambda network, batch, teacher, /: ScoreResult(measure(network, batch))


_SCORES: Mapping[str, Score] = {
    "diswot": _diswot,
    "diswot_relation": _diswot_relation,
    "diswot_semantic": _diswot_semantic,
    "diswot_by_class": _diswot_by_class,
    "params": _params,
    "macs": _macs,
    "nwot": _alone(_measures.nwot),
    "synflow": _alone(_measures.synflow),
    "grad_norm": _alone(_measures.grad_norm),
    "kd_loss": _kd_loss,
}
_OF_A_TEACHER = frozenset({"diswot", "diswot_relation", "diswot_semantic", "diswot_by_class", "kd_loss"})
