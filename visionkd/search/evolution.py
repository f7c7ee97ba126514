"""The search itself: regularised (aging) evolution, random search, and going through a small space as a whole.

"Regularized Evolution for Image Classifier Architecture Search" (Real et al., 2019): parents win a tournament, a child
differs in one thing or is crossed from two parents, and the oldest of the population make place. Nothing here knows
what a score means, and nothing but scores and costs is asked for.

Candidates are examined in batches of a fixed size, whatever the number of processes, so that what is found follows from
the seed alone. The state is handed out after every batch, and a search goes on from it as if it had not been stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Literal

from visionkd.config.schema import NetworkConfig
from visionkd.search.budget import exceeded
from visionkd.search.spaces import Candidate, Space, key_of

STRATEGIES = ("auto", "evolution", "random", "exhaustive")
_DRAWS = 100  # for one candidate that is new
_ROUNDS = 200  # of candidates that are all too expensive, before a search gives up
_VERSION = 1


@dataclass(frozen=True)
class Answer:
    """What an examination of one candidate gave.

    Attributes:
        values: Costs, or parts of the score, by name.
        score: Higher is better; None where only costs were asked for.
        reason: Why it could not be examined, None where it could.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    reason: str | None = None


Examine = Callable[[Sequence[NetworkConfig]], Sequence[Answer]]


@dataclass(frozen=True)
class Record:
    """A candidate and what became of it.

    Attributes:
        number: In the order of examination, from 0.
        candidate: As its space describes it.
        origin: ``random``, ``mutation``, ``crossover`` or ``listed``.
        parents: Numbers of the candidates it was made from.
        status: ``scored``, ``over_budget`` or ``failed``.
        costs: ``params_m``, ``macs_g`` and perhaps ``latency_ms``.
        score: Higher is better.
        parts: What the score is made of.
        reason: Why there is no score.
    """

    number: int
    candidate: Candidate
    origin: str
    parents: tuple[int, ...] = ()
    status: Literal["scored", "over_budget", "failed"] = "scored"
    costs: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        evaluations: Candidates within the budget to examine, at most.
        strategy: ``auto`` goes through a space that is no larger than that, and takes ``evolution`` otherwise.
        seed: Of all choices.
        population: Scored candidates that parents are taken from, the latest ones.
        tournament: Candidates drawn from the population, of which the best becomes a parent.
        crossover: Share of children that are crossed from two parents; the others are mutated from one.
        batch: Candidates that are examined together.
    """

    evaluations: int
    strategy: str = "auto"
    seed: int = 0
    population: int = 32
    tournament: int = 8
    crossover: float = 0.25
    batch: int = 8


class Search:
    """A search.

    Args:
        space: Where to look.
        settings: How.
        measure: Gives costs.
        score: Gives scores, of candidates whose costs are within the budget.
        limits: Largest value of each cost that is limited.
        on_batch: Called after every batch, with this search.
        state: What :meth:`state` gave, to go on from there.
    """

    def __init__(
        self,
        space: Space,
        settings: SearchSettings,
        *,
        measure: Examine,
        score: Examine,
        limits: Mapping[str, float] | None = None,
        on_batch: Callable[[Search], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.space, self.settings = space, settings
        self._measure, self._score, self._limits = measure, score, dict(limits or {})
        self._on_batch = on_batch
        self.records: list[Record] = []
        #: Why the search ended before its last evaluation.
        self.ended: str | None = None
        self._rng = Random(settings.seed)
        self._population: deque[Record] = deque(maxlen=settings.population)
        self._seen: set[str] = set()
        self._listed: Iterator[Candidate] | None = None
        self.strategy = settings.strategy
        if self.strategy == "auto":
            small = space.size is not None and space.size <= settings.evaluations
            self.strategy = "exhaustive" if small else "evolution"
        if state is not None:
            self._restore(state)

    @property
    def done(self) -> int:
        """Evaluations that are done: candidates that have a score or failed."""
        return sum(record.status != "over_budget" for record in self.records)

    def run(self) -> list[Record]:
        """Search to the end and return the ranking."""
        while (left := self.settings.evaluations - self.done) > 0:
            accepted, failed = self._within_budget(min(self.settings.batch, left))
            if not accepted and not failed:
                break
            answers = self._score([self.space.network(record.candidate) for record in accepted]) if accepted else []
            for record, answer in zip(accepted, answers, strict=True):
                self._keep(record, answer)
            if self._on_batch is not None:
                self._on_batch(self)
        return self.ranking()

    def ranking(self) -> list[Record]:
        """Return the scored candidates, the best first; of equal scores the smaller network."""
        scored = [record for record in self.records if record.score is not None]
        return sorted(scored, key=lambda r: (-_number(r.score), r.costs.get("params_m", 0.0), r.number))

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, as JSON holds it."""
        version, numbers, gauss = self._rng.getstate()
        return {
            "version": _VERSION,
            "rng": [version, list(numbers), gauss],
            "population": [record.number for record in self._population],
            "records": [asdict(record) for record in self.records],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        version, numbers, gauss = state["rng"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self.records = [Record(**{**values, "parents": tuple(values["parents"])}) for values in state["records"]]
        self._population.extend(self.records[number] for number in state["population"])
        self._seen = {key_of(record.candidate) for record in self.records}

    # One batch --------------------------------------------------------------------------------------------------------

    def _within_budget(self, wanted: int) -> tuple[list[Record], int]:
        """Return up to ``wanted`` new candidates within the budget, and how many could not be measured."""
        accepted: list[Record] = []
        failed = 0
        for _ in range(_ROUNDS):
            proposed = self._proposals(wanted - len(accepted) - failed)
            if not proposed:
                self.ended = self.ended or "there are no further candidates"
                break
            answers = self._measure([self.space.network(candidate) for candidate, *_ in proposed])
            for (candidate, origin, parents), answer in zip(proposed, answers, strict=True):
                record = Record(len(self.records), candidate, origin, parents, costs=dict(answer.values))
                reason = answer.reason or exceeded(answer.values, self._limits)
                if reason is None:
                    accepted.append(record)
                else:
                    status = "failed" if answer.reason else "over_budget"
                    record = Record(**{**vars(record), "status": status, "reason": reason})
                    failed += bool(answer.reason)
                self.records.append(record)
            if len(accepted) + failed >= wanted:
                break
        else:
            self.ended = f"{_ROUNDS} rounds of candidates in a row had too few within the budget"
        return accepted, failed

    def _keep(self, record: Record, answer: Answer) -> None:
        reason = answer.reason
        if reason is None and (answer.score is None or not math.isfinite(answer.score)):
            reason = f"the score is {answer.score}"
        values = {**vars(record), "parts": dict(answer.values), "score": answer.score}
        if reason is not None:
            values |= {"status": "failed", "reason": reason, "score": None}
        kept = Record(**values)
        self.records[record.number] = kept
        if kept.score is not None:
            self._population.append(kept)  # the oldest makes place

    # New candidates ---------------------------------------------------------------------------------------------------

    def _proposals(self, count: int) -> list[tuple[Candidate, str, tuple[int, ...]]]:
        found: list[tuple[Candidate, str, tuple[int, ...]]] = []
        while len(found) < count:
            new = self._listed_next() if self.strategy == "exhaustive" else self._new()
            if new is None:
                break
            self._seen.add(key_of(new[0]))
            found.append(new)
        return found

    def _listed_next(self) -> tuple[Candidate, str, tuple[int, ...]] | None:
        if self._listed is None:
            self._listed = self.space.enumerate()
        for candidate in self._listed:
            if key_of(candidate) not in self._seen:
                return candidate, "listed", ()
        return None

    def _new(self) -> tuple[Candidate, str, tuple[int, ...]] | None:
        evolve = self.strategy == "evolution" and len(self._population) >= min(
            self.settings.population, max(2, self.settings.evaluations // 4)
        )
        for make in (self._child, self._any) if evolve else (self._any,):
            for _ in range(_DRAWS):
                candidate, origin, parents = make()
                if key_of(candidate) not in self._seen:
                    return candidate, origin, parents
        if self.space.size is None or self.space.size > 10 * _DRAWS * _ROUNDS:
            return None
        new = self._listed_next()  # chance rarely meets the last few of a space
        return None if new is None else (new[0], "listed", ())

    def _any(self) -> tuple[Candidate, str, tuple[int, ...]]:
        return self.space.sample(self._rng), "random", ()

    def _child(self) -> tuple[Candidate, str, tuple[int, ...]]:
        first = self._winner()
        if self._rng.random() < self.settings.crossover:
            second = self._winner()
            child = self.space.crossover(first.candidate, second.candidate, self._rng)
            return child, "crossover", (first.number, second.number)
        return self.space.mutate(first.candidate, self._rng), "mutation", (first.number,)

    def _winner(self) -> Record:
        """Return the best of a random subset of the population."""
        size = min(self.settings.tournament, len(self._population))
        return max(self._rng.sample(list(self._population), size), key=lambda record: _number(record.score))


def _number(score: float | None) -> float:
    return -math.inf if score is None else score


def pareto(records: Sequence[Record], cost: str) -> list[Record]:
    """Return the scored candidates that no cheaper one equals, the cheapest first."""
    known = [record for record in records if record.score is not None and record.costs.get(cost) is not None]
    front: list[Record] = []
    for record in sorted(known, key=lambda r: (r.costs[cost], -_number(r.score))):
        if not front or _number(record.score) > _number(front[-1].score):
            front.append(record)
    return front
