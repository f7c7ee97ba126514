"""The search on a space of numbers, whose scores and costs are formulas."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError
from visionkd.search.budget import BUDGETS, exceeded, parse_budget
from visionkd.search.evolution import Answer, Search, SearchSettings, pareto
from visionkd.search.spaces import GridSpace

AXES = {name: tuple(range(8)) for name in "abcdef"}


def grid(axes: dict[str, Any] = AXES) -> GridSpace:
    return GridSpace("numbers", network="numbers", axes=axes)


def measure(configs: Sequence[NetworkConfig]) -> list[Answer]:
    return [Answer({"params_m": float(sum(c.args.values())), "macs_g": float(c.args["a"])}) for c in configs]


def score(configs: Sequence[NetworkConfig]) -> list[Answer]:
    """Best where all are 6, with interactions."""
    values = [-sum((x - 6) ** 2 for x in c.args.values()) - 3 * (c.args["a"] != c.args["b"]) for c in configs]
    return [Answer({"part": 1.0}, float(value)) for value in values]


def search(evaluations: int = 120, *, space: GridSpace | None = None, **settings: Any) -> Search:
    extra = {name: settings.pop(name) for name in ("limits", "state", "on_batch") if name in settings}
    functions = {"measure": settings.pop("measure", measure), "score": settings.pop("score", score)}
    made = SearchSettings(evaluations, **{"population": 16, "tournament": 5, **settings})
    return Search(space or grid(), made, **functions, **extra)


def order(made: Search) -> list[tuple[dict, float]]:
    return [(record.candidate, record.score) for record in made.ranking()]


def test_the_best_score_only_grows_and_the_budget_holds() -> None:
    best: list[float] = []
    made = search(limits={"params_m": 24.0}, on_batch=lambda s: best.append(s.ranking()[0].score))
    ranking = made.run()
    assert best == sorted(best) and len(best) > 10
    assert len(ranking) == made.done == 120 and made.strategy == "evolution"
    assert all(record.costs["params_m"] <= 24.0 for record in ranking)
    over = [record for record in made.records if record.status == "over_budget"]
    assert over and all(r.score is None and "is above 24" in r.reason for r in over)
    assert [r.number for r in made._population] == sorted(r.number for r in ranking)[-16:], "the oldest make place"


def test_children_differ_in_one_thing_or_are_made_of_their_parents() -> None:
    made = search()
    made.run()
    origins = {record.origin for record in made.records}
    assert origins == {"random", "mutation", "crossover"}
    for record in made.records:
        parents = [made.records[number].candidate for number in record.parents]
        if record.origin == "mutation":
            assert sum(record.candidate[axis] != parents[0][axis] for axis in AXES) == 1
        elif record.origin == "crossover":
            assert all(record.candidate[axis] in (parents[0][axis], parents[1][axis]) for axis in AXES)
    keys = [json.dumps(record.candidate, sort_keys=True) for record in made.records]
    assert len(keys) == len(set(keys)), "nothing is examined twice"


def test_evolution_beats_chance_at_equal_evaluations() -> None:
    def mean(strategy: str) -> float:
        return statistics.mean(search(seed=seed, strategy=strategy).run()[0].score for seed in range(8))

    assert mean("evolution") > mean("random") + 3


def test_the_seed_decides_everything() -> None:
    first, same, other = search(seed=1), search(seed=1), search(seed=2)
    for made in (first, same, other):
        made.run()
    assert first.records == same.records and order(first) != order(other)


@pytest.mark.parametrize("strategy", ["evolution", "random", "exhaustive"])
def test_a_stopped_search_goes_on_as_if_nothing_had_happened(strategy: str) -> None:
    whole = search(strategy=strategy, limits={"params_m": 24.0})
    whole.run()
    states: list[str] = []

    def stop(made: Search) -> None:
        states.append(json.dumps(made.state()))
        if len(states) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(strategy=strategy, limits={"params_m": 24.0}, on_batch=stop).run()
    resumed = search(strategy=strategy, limits={"params_m": 24.0}, state=json.loads(states[-1]))
    assert 0 < resumed.done < 120
    resumed.run()
    assert resumed.records == whole.records and order(resumed) == order(whole)


def test_a_small_space_is_gone_through() -> None:
    space = grid({"a": (1, 2, 3), "b": (1, 2)})
    made = search(6, space=space)
    assert len(made.run()) == 6 and made.strategy == "exhaustive" and made.ended is None
    more = search(50, space=space, strategy="evolution")
    assert len(more.run()) == 6 and "no further candidates" in more.ended


def test_candidates_that_fail_have_their_reason_and_a_place() -> None:
    def fragile(configs: Sequence[NetworkConfig]) -> list[Answer]:
        return [Answer(reason="breaks") if config.args["a"] == 0 else answer
                for config, answer in zip(configs, measure(configs), strict=True)]  # fmt: skip

    def sometimes(configs: Sequence[NetworkConfig]) -> list[Answer]:
        bad = {1: Answer(reason="no score"), 2: Answer({}, float("nan"))}
        return [bad.get(config.args["a"], answer) for config, answer in zip(configs, score(configs), strict=True)]

    made = search(measure=fragile, score=sometimes)
    ranking = made.run()
    assert made.done == 120 and all(record.candidate["a"] > 2 for record in ranking)
    reasons = {record.reason for record in made.records if record.status == "failed"}
    assert reasons == {"breaks", "no score", "the score is nan"}


def test_an_impossible_budget_ends() -> None:
    made = search(limits={"params_m": -1.0}, strategy="random", space=grid({"a": (1, 2), "b": (1, 2)}))
    assert made.run() == [] and "no further candidates" in made.ended


def test_equal_scores_rank_the_smaller_first() -> None:
    made = search(score=lambda configs: [Answer({}, 1.0) for _ in configs], evaluations=40)
    params = [record.costs["params_m"] for record in made.run()]
    assert params == sorted(params)


def test_the_front_is_what_no_cheaper_one_equals() -> None:
    made = search()
    ranking = made.run()
    front = pareto(ranking, "params_m")
    assert front[-1].score == ranking[0].score
    for record in ranking:
        dominated = any(f.costs["params_m"] <= record.costs["params_m"] and f.score >= record.score for f in front)
        assert dominated, "something on the front is as cheap and as good"


def test_budgets() -> None:
    assert parse_budget(None) == {}
    assert parse_budget(" params_m=0.5, latency_ms=3") == {"params_m": 0.5, "latency_ms": 3.0}
    assert parse_budget({"macs_g": 1}) == {"macs_g": 1.0}
    assert exceeded({"params_m": 0.6}, {"params_m": 0.5}) and not exceeded({"params_m": 0.5}, {"params_m": 0.5})
    with pytest.raises(RequestError) as error:
        parse_budget("parms_m=1,macs_g=0,x=1,params_m=1,params_m=2,latency_ms")
    said = str(error.value)
    assert "Did you mean 'params_m'" in said and "macs_g must be a number above 0" in said and "given twice" in said
    assert all(name in said for name in BUDGETS), "what is allowed is listed"
    with pytest.raises(RequestError, match="is empty"):
        parse_budget("")
