from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError
from visionkd.search import examine
from visionkd.search.examine import Examiner, Examiners, Job

SMALL = NetworkConfig(name="cifar_resnet", args={"blocks": [1, 1, 1], "channels": [4, 4, 8]}, pretrained=False)
WRONG = NetworkConfig(name="cifar_resnet", args={"blocks": [1, 1, 0]}, pretrained=False)


def job(**changes: object) -> Job:
    image = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    values = {"score": "diswot", "teacher": NetworkConfig(name="cifar_resnet8", pretrained=False), "num_classes": 4,
              "image": image, "target": np.arange(8) % 4, "seed": 0, "teacher_seed": 1, "student_seed": 2}  # fmt: skip
    return Job(**{**values, **changes})


def test_costs_are_those_of_the_network() -> None:
    first = Examiner(job())
    network = first.build(SMALL)
    costs = first.measure(SMALL)
    assert costs.reason is None
    assert costs.values["params_m"] == pytest.approx(sum(p.numel() for p in network.net.parameters()) / 1e6)
    assert costs.values["macs_g"] > 0
    limited = Examiner(job(params_limit_m=1e-6)).measure(SMALL)
    assert set(limited.values) == {"params_m"}, "what has too many parameters is looked at no further"


def test_what_fails_says_why_and_nothing_else_happens() -> None:
    first = Examiner(job())
    for answer in (first.measure(WRONG), first.score(WRONG)):
        assert answer.score is None and "[1, 1, 0]" in answer.reason
    assert first.score(SMALL).score < 0


def test_a_score_repeats_and_depends_on_the_seed() -> None:
    scored = [Examiner(job(student_seed=seed)).score(SMALL).score for seed in (2, 2, 3)]
    assert scored[0] == scored[1] != scored[2]


def test_an_unknown_score_is_a_wrong_request() -> None:
    with pytest.raises(RequestError, match="--score"):
        Examiner(job(score="diswat"))


class Pool:
    """Stands for a pool of processes, one of which a wrong candidate kills; with it, all that waits is lost."""

    def __init__(self, first: Examiner) -> None:
        self.first, self.broken = first, False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, **_: object) -> None: ...

    def submit(self, function: object, kind: str, config: dict) -> Future:
        assert function is examine._examine
        future: Future = Future()
        self.broken |= config["args"]["blocks"][-1] == 0
        if self.broken:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(getattr(self.first, kind)(NetworkConfig(**config)))
        return future


def test_a_candidate_that_kills_its_process_takes_no_other_with_it(monkeypatch) -> None:
    examiners = Examiners(job(), workers=2)
    monkeypatch.setattr(examiners, "_new_pool", lambda workers: Pool(examiners.first))
    answers = examiners.score([SMALL, WRONG, SMALL])
    assert answers[0] == answers[2] == examiners.first.score(SMALL)
    assert answers[1].score is None and "died" in answers[1].reason


@pytest.mark.slow
def test_processes_agree_with_one() -> None:
    with Examiners(job(), workers=2) as examiners:
        answers = examiners.score([SMALL, WRONG])
    assert answers[0] == examiners.first.score(SMALL) and "[1, 1, 0]" in answers[1].reason
