"""Settings of a search, as its run directory keeps them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visionkd.config.schema import Positive, Strict


class SearchCompute(Strict):
    """What may differ when a search is resumed: it changes nothing of what is found."""

    workers: Positive = 1


class SearchConfig(Strict):
    """A search for a student.

    Attributes:
        teacher: MODEL that the student is to learn from.
        space: Name of a space, or the file of one.
        data: DATA, of which one batch is looked at.
        options: ``KEY=VALUE`` settings of the distillation that follows; those of ``data`` hold for the search too.
        budget: Largest value of each cost that is limited.
        score: Name of the score.
        init: How weights are drawn for it.
        evaluations: Candidates within the budget to examine, at most.
        strategy: ``auto``, ``evolution``, ``random`` or ``exhaustive``.
        seed: Of everything.
        population: Scored candidates that parents are taken from.
        tournament: Candidates drawn from these, of which the best becomes a parent.
        img_size: Input size of candidates in pixels; None takes each network's own.
        batch_size: Images that are looked at.
        backend: What latency is measured on; None measures none.
        compute: What may differ on resuming.
    """

    teacher: str
    space: str
    data: str = "shapes"
    options: list[str] = []
    budget: dict[str, float] = {}
    score: str = "diswot"
    init: Literal["default", "gaussian"] = "default"
    evaluations: Positive = 200
    strategy: Literal["auto", "evolution", "random", "exhaustive"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    population: Annotated[int, Field(ge=2)] = 32
    tournament: Positive = 8
    img_size: Positive | None = None
    batch_size: Annotated[int, Field(ge=2)] = 64
    backend: Literal["torch", "onnxruntime", "onnxruntime-int8"] | None = None
    compute: SearchCompute = SearchCompute()
