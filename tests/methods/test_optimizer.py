from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.contract import tiny_network
from visionkd.config.schema import ScheduleConfig, TrainConfig
from visionkd.methods._optimizer import Budget, build_optimizer, lr_factor

BUDGET = Budget(steps_per_epoch=10, epochs=5)


def test_cosine_rises_linearly_then_falls_to_its_floor():
    schedule = ScheduleConfig(name="cosine", warmup_epochs=1.0, min_lr_ratio=0.1)
    factors = [lr_factor(step, schedule=schedule, budget=BUDGET) for step in range(51)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == pytest.approx(1.0) and factors[30] == pytest.approx(0.55)
    assert factors[50] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_constant_stays_at_the_peak():
    schedule = ScheduleConfig(name="constant", warmup_epochs=0)
    assert [lr_factor(step, schedule=schedule, budget=BUDGET) for step in (0, 49)] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_norms_and_biases_are_not_decayed_and_projectors_are_trained(name):
    config = TrainConfig(model={"name": "x"}, optimizer={"name": name, "lr": 0.1, "weight_decay": 0.3})
    student, projectors = tiny_network(seed=0).net, nn.ModuleDict({"p": nn.Linear(3, 3)})
    optimizer = build_optimizer(student, projectors, config=config, budget=BUDGET)["optimizer"]
    decayed = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    assert decayed.keys() == {id(p) for p in (*student.parameters(), *projectors.parameters())}
    assert all(decayed[id(p)] == (p.ndim > 1) for p in (*student.parameters(), *projectors.parameters()))


def test_schedule_survives_a_checkpoint_without_pickle(tmp_path):
    config = TrainConfig(model={"name": "x"}, optimizer={"lr": 0.1, "weight_decay": 0.0})
    built = build_optimizer(tiny_network(seed=0).net, nn.ModuleDict(), config=config, budget=BUDGET)
    torch.save(built["lr_scheduler"]["scheduler"].state_dict(), tmp_path / "state")
    torch.load(tmp_path / "state", weights_only=True)
