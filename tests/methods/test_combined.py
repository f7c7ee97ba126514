from __future__ import annotations

import pytest
import torch

from tests.methods.contract import NUM_CLASSES, _NoTrainer, tiny_batch, tiny_network
from visionkd.config.load import load_config
from visionkd.config.schema import DistillConfig
from visionkd.errors import RequestError
from visionkd.methods._optimizer import Budget
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import Listener
from visionkd.workflows._method import choose_method, method_name, suggested_method

BASE = """
student: {name: cifar_resnet8}
teachers: [{name: cifar_resnet8}]
optimizer: {name: sgd, lr: 0.05, weight_decay: 0.0}
training: {seed: 1}
"""


def build(text: str):
    config = load_config(DistillConfig, text=BASE + text)
    networks = {"student": tiny_network(seed=1), "teachers": [tiny_network(seed=2)]}
    method, options = choose_method(config, **networks, listener=Listener())
    module = method(
        **networks, task=ClassificationTask(num_classes=NUM_CLASSES), config=config, options=options,
        budget=Budget(steps_per_epoch=10, epochs=1),
    )  # fmt: skip
    module.trainer = _NoTrainer()
    return module.train(), config


def step(module):
    batch = module.on_after_batch_transfer(module.on_before_batch_transfer(tiny_batch(), 0), 0)
    return module.training_step(batch, 0)


def test_terms_are_those_of_the_parts_with_their_weights():
    module, config = build(
        "losses: {task_loss: {weight: 0.5}, kd: {weight: 2.0, options: {temperature: 1.0}}, meal_v2: {weight: 0.25}}"
    )
    loss = step(module)
    found = module.take_train_metrics()
    alone, _ = build("method: kd\noptions: {temperature: 1.0}")
    step(alone)
    weights = module.loss_weights()
    assert found["train/kd.kd_loss"] == pytest.approx(alone.take_train_metrics()["train/kd_loss"], rel=1e-6)
    assert weights["kd.kd_loss"] == pytest.approx(2.0 * 0.9) and weights["meal_v2.similarity_loss"] == 0.25
    total = sum(weights[name] * found[f"train/{name}"] for name in weights)
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert method_name(config) == "kd+meal_v2"


def test_projectors_of_all_parts_train_and_the_student_is_counted_once():
    module, _ = build("losses: {meal_v2: {}, kd: {}}")
    step(module).backward()
    names = [name for name, p in module.named_parameters() if p.grad is not None]
    assert any(name.startswith("projectors.meal_v2.discriminator") for name in names)
    assert len({name for name, _ in module.named_parameters() if name.startswith("student.")}) == len(
        list(module.student.parameters())
    )
    trained = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}


def test_exits_are_those_of_the_method_alone():
    module, _ = build("losses: {ofa_kd: {}, kd: {}, task_loss: {}}")
    alone, _ = build("method: ofa_kd")
    step(module)
    step(alone)
    found, expected = module.take_train_metrics(), alone.take_train_metrics()
    for name in ("kd_loss", "exit_loss", "exit4_loss"):
        assert found[f"train/ofa_kd.{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-5)
    shapes = [tuple(p.shape) for p in module.projectors["ofa_kd"].parameters()]
    assert shapes == [tuple(p.shape) for p in alone.projectors.parameters()]


def test_labels_count_only_where_they_are_weighted():
    module, _ = build("losses: {kd: {}}")
    step(module)
    assert "train/task_loss" not in module.take_train_metrics()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("losses: {kdd: {}}", "losses.kdd"),
        ("losses: {kd: {options: {temprature: 1}}}", "losses.kd.options.temprature"),
        ("losses: {kd: {}}\nmethod: meal_v2", "method"),
        ("losses: {task_loss: {}}", "losses"),
        ("losses: {kd: {weight: 0}}", "losses"),
        ("losses: {kd: {}}\noptions: {temperature: 2}", "options"),
        ("losses: {kd: {}, task_loss: {options: {a: 1}}}", "losses.task_loss.options"),
    ],
)
def test_wrong_combinations_are_refused(text, key):
    with pytest.raises(RequestError) as caught:
        build(text)
    assert key in [problem.key for problem in caught.value.problems]


def test_the_label_store_needs_one_temperature():
    same, _ = build("losses: {kd: {options: {temperature: 1.0}}, meal_v2: {}}")
    assert type(same).can_store_labels(same.options)
    different, _ = build("losses: {kd: {options: {temperature: 4.0}}, meal_v2: {}}")
    assert not type(different).can_store_labels(different.options)


def test_auto_looks_at_teachers_and_families():
    cnn, other = tiny_network(seed=1), tiny_network(seed=2)
    vit = tiny_network("test_vit", seed=3)
    assert suggested_method(student=cnn, teachers=[other])[0] == "kd"
    assert suggested_method(student=cnn, teachers=[other, vit])[0] == "meal_v2"
    assert suggested_method(student=cnn, teachers=[vit])[0] == "ofa_kd"
    assert suggested_method(student=vit, teachers=[cnn])[0] == "ofa_kd"


def test_a_student_from_scratch_is_warned_about():
    said = []

    class Hears(Listener):
        def message(self, text, *, level="info"):
            said.append((level, text))

    config = load_config(DistillConfig, text=BASE + "method: meal_v2")
    networks = {"student": tiny_network(seed=1), "teachers": [tiny_network(seed=2)]}
    choose_method(config, **networks, listener=Hears())
    assert [level for level, text in said if "random weights" in text] == ["warning"]
    assert any("discriminator_reduction=2" in text for _, text in said)
    said.clear()
    networks["student"].trained = True
    config.options = {"discriminator_reduction": 2}
    choose_method(config, **networks, listener=Hears())
    assert not said


def test_the_step_sees_mixed_labels_and_mixed_probabilities():
    config = load_config(DistillConfig, text=BASE + "method: kd\naugment: {mixup_alpha: 1.0}")
    networks = {"student": tiny_network(seed=1), "teachers": [tiny_network(seed=2)]}
    method, options = choose_method(config, **networks, listener=Listener())
    module = method(
        **networks, task=ClassificationTask(num_classes=NUM_CLASSES), config=config, options=options,
        budget=Budget(steps_per_epoch=10, epochs=1),
    )  # fmt: skip
    image, target = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, -1])
    probs = torch.eye(4)[:, [3, 2, 1, 0]].contiguous()
    torch.manual_seed(0)
    mixed, labels, mixed_probs = module._mixer(image, target, probs)
    # the last image has no label; the others' shares are those of the pictures
    share = labels[0, 0].item()
    torch.testing.assert_close(mixed[1], share * image[1] + (1 - share) * image[0])
    torch.testing.assert_close(mixed_probs[1], share * probs[1] + (1 - share) * probs[0])
    assert labels[3].sum() == pytest.approx(1 - share)
