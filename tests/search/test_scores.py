from __future__ import annotations

import pytest
import torch

from tests.models.families import bare, tiny_family
from visionkd.errors import RequestError, WorkError
from visionkd.search.scores import ScoreResult, combine, make_scorer, score_names

IMAGE = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(8) % 4


def scorer(name: str, teacher=None, init: str = "default"):
    teacher = teacher or tiny_family("cnn", seed=5)
    return make_scorer(name, teacher=teacher, image=IMAGE, target=TARGET, num_classes=4, seed=0, init=init)


@pytest.mark.parametrize("name", score_names())
def test_a_score_leaves_the_network_alone_and_repeats(name: str) -> None:
    network = tiny_family("cnn", seed=1).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    score = scorer(name)
    first, second = score(network), score(network)
    assert first == second
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_a_network_is_at_no_distance_from_itself_and_at_some_from_others() -> None:
    teacher = tiny_family("cnn", seed=5)
    score = scorer("diswot", teacher)
    assert score(teacher).value == pytest.approx(0.0, abs=1e-5)
    parts = score(tiny_family("cnn", seed=1)).parts
    assert 0.0 < parts["relation"] <= 4.0 / 8 and 0.0 < parts["semantic"] <= 4.0


def test_gaussian_draws_teacher_and_student_apart() -> None:
    assert scorer("diswot", init="gaussian")(tiny_family("cnn", seed=1)).value < -1e-3


def test_other_widths_are_compared_by_class() -> None:
    parts = scorer("diswot")(tiny_family("vit", seed=1)).parts
    assert parts["semantic_by_class"] == 1.0 and 0.0 < parts["semantic"] <= 4.0


def test_combined_parts_count_equally_by_rank() -> None:
    results = [ScoreResult(0.0, {"relation": r, "semantic": s}) for r, s in ((0.1, 9.0), (0.2, 1.0), (0.3, 5.0))]
    assert combine(results, "rank") == pytest.approx([-1.0, -0.5, -1.5])
    assert combine(results) == pytest.approx([-9.1, -1.2, -5.3])


def test_wrong_requests_and_candidates_are_told() -> None:
    with pytest.raises(RequestError, match="unknown name"):
        scorer("diswott")
    with pytest.raises(WorkError, match="cannot be scored"):
        scorer("diswot")(bare(torch.nn.Linear(2, 2)))
