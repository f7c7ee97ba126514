from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.contract import tiny_network
from tests.methods.masked_nets import tiny_config, tiny_vit
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


def test_poly_falls_as_a_power_of_what_is_left():
    schedule = ScheduleConfig(name="poly", warmup_epochs=0, min_lr_ratio=0.1)
    factors = [lr_factor(step, schedule=schedule, budget=BUDGET) for step in (0, 25, 50)]
    assert factors == pytest.approx([1.0, 0.1 + 0.9 * 0.5**0.9, 0.1])


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


def test_rates_fall_from_layer_to_layer():
    projector = torch.nn.Linear(3, 3)
    for student in (tiny_vit(seed=1, global_pool="avg"), tiny_network("deit_tiny_distilled_patch16_224", seed=1)):
        net = student.net
        config = tiny_config("kd", teachers=1)
        config.optimizer = config.optimizer.model_copy(update={"layer_decay": 0.5, "lr": 1.0, "weight_decay": 0.1})
        made = build_optimizer(net, projector, config=config, budget=Budget(steps_per_epoch=1, epochs=1))
        found = {id(p): group for group in made["optimizer"].param_groups for p in group["params"]}
        depth = len(net.blocks)
        scale = {name: found[id(p)]["initial_lr"] for name, p in net.named_parameters()}
        assert scale["patch_embed.proj.weight"] == scale["cls_token"] == scale["pos_embed"] == 0.5 ** (depth + 1)
        assert [scale[f"blocks.{n}.mlp.fc1.weight"] for n in range(depth)] == [0.5 ** (depth - n) for n in range(depth)]
        full = ["head.weight", *(n for n in scale if n.startswith(("norm.", "fc_norm.", "head_dist.", "dist_token")))]
        assert len(full) > 2 and all(scale[name] == 1.0 for name in full)
        assert found[id(net.pos_embed)]["weight_decay"] == 0.0 == found[id(net.head.bias)]["weight_decay"]
        assert found[id(net.head.weight)]["weight_decay"] == 0.1 and found[id(projector.weight)]["initial_lr"] == 1.0
        assert len(found) == sum(1 for _ in (*net.parameters(), *projector.parameters()))
