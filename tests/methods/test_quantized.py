from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.methods.contract import MethodContract, tiny_batch, tiny_network
from visionkd import registry
from visionkd.config.schema import DistillConfig
from visionkd.hub.package import load_package, save_package
from visionkd.methods._optimizer import Budget
from visionkd.methods._quantized_points import BATCHES
from visionkd.methods.quantized import Quantized, QuantizedOptions, softened_kl
from visionkd.quantization.packing import post_training_copy
from visionkd.quantization.quantized_distillation import fake_quantize_uniform, quantize_uniform
from visionkd.tasks.classification import ClassificationTask

DQ = {"mode": "differentiable", "bits": 3, "points_lr_ratio": 0.01}


def at_epoch(module, epoch, epochs=5):
    module.trainer = copy.copy(module.trainer)
    module.trainer.current_epoch = epoch
    object.__setattr__(module.budget, "epochs", epochs)


def steps(case, module, count, *, optimizer=None, first=0):
    optimizer = optimizer or module.configure_optimizers()["optimizer"]
    for seed in range(first, first + count):
        loss = case.step(module, tiny_batch(seed=seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


class TestQuantized(MethodContract):
    name = "quantized"

    def test_the_student_runs_with_quantised_weights_and_the_optimiser_never_sees_them(self):
        module = self.build()
        before = {name: p.clone() for name, p in module.student.named_parameters()}
        image = torch.rand(4, 3, 32, 32)
        reference = copy.deepcopy(module.student)
        for name in module._names:
            weight = reference.net.get_parameter(name)
            weight.data.copy_(quantize_uniform(weight, num_levels=16, bucket_size=256))
        assert torch.equal(module.student_output(image).logits, reference(image).logits)
        for (name, buffer), other in zip(module.student.named_buffers(), reference.buffers(), strict=True):
            assert torch.equal(buffer, other), name  # statistics are those of the quantised network
        optimizer = module.configure_optimizers()["optimizer"]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        steps(self, module, 1, optimizer=optimizer)
        assert all(torch.equal(p, before[name]) for name, p in module.student.named_parameters())

    def test_what_is_validated_and_packaged_is_quantised(self, tmp_path):
        module = self.build(ema_decay=0.5)
        steps(self, module, 2)
        module.ema.update_parameters(module.student)
        deployed = module.deployed_student
        weight = module.ema.module.net.get_parameter(module._names[1])
        found = deployed.net.get_parameter(module._names[1])
        assert torch.equal(found, quantize_uniform(weight, num_levels=16, bucket_size=256))
        assert not torch.equal(found, weight) and not deployed.training
        module.eval()
        module.on_validation_epoch_start()
        assert module.deployed_student is module.deployed_student
        saved = save_package(deployed, tmp_path / "m", task="classification", classes=None, metrics={}, origin={})
        found = load_package(saved)[0].net.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in deployed.net.state_dict().items())

    def test_levels_that_change_are_counted_for_each_epoch(self):
        module = self.build()
        optimizer = module.configure_optimizers()["optimizer"]
        optimizer.param_groups[0]["lr"] = 1.0
        steps(self, module, 2, optimizer=optimizer)
        module.on_validation_epoch_start()
        assert 0.0 < module.take_train_metrics()["train/levels_changed"] <= 1.0

    def test_without_a_weight_the_teacher_never_runs(self):
        self.options = {"distill_loss_weight": 0.0}
        try:
            module = self.build()
        finally:
            del self.options
        module.frozen.forwards = None
        loss = self.step(module, tiny_batch())
        assert module.take_train_metrics().keys() == {"train/loss", "train/task_loss"}
        assert torch.isfinite(loss) and module.loss_weights()["task_loss"] == 1.0
        assert not Quantized.can_store_labels(module.options)


class TestTwoBitsAtRandom(MethodContract):
    name = "quantized"
    options = {"bits": 2, "stochastic": True, "backward": "complicated", "quantize_batch_norm": True}

    def test_stored_probabilities_can_stand_for_the_teachers(self):
        pytest.skip("two forward passes of this student round differently; the tests of the other options cover it")

    def test_the_result_is_rounded_to_the_nearest(self):
        module = self.build()
        first, second = module.deployed_student, module.deployed_student
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class TestTruncated(MethodContract):
    name = "quantized"
    options = {"backward": "truncated", "bucket_size": None, "quantize_first_last": False, "kl_reduction": "elements"}

    def test_weights_stay_within_one(self):
        module = self.build()
        inner = module.student.net.get_parameter(module._names[0])
        inner.data.mul_(100.0)
        self.step(module, tiny_batch()).backward()
        assert inner.abs().max() == 1.0


class TestDifferentiable(MethodContract):
    name = "quantized"
    options = DQ

    def test_levels_move_stay_sorted_and_weights_do_not(self):
        module = self.build(ema_decay=0.5)
        before = {name: p.clone() for name, p in module.student.net.named_parameters()}
        start = [p.detach().clone() for p in module.student.points]
        steps(self, module, 2)
        assert all(torch.equal(p, before[name]) for name, p in module.student.net.named_parameters())
        assert all(torch.equal(p, p.sort().values) for p in module.student.points)
        assert any(not torch.equal(p, old) for p, old in zip(module.student.points, start, strict=True))
        module.ema.update_parameters(module.student)
        used = dict(zip(module._names, module.ema.module.points, strict=True))
        name = max(module._names, key=lambda each: module.student.net.get_parameter(each).numel())
        coded = module.deployed_student.quantization["tensors"][name]
        assert coded["num_levels"] == len(used[name]) == 8
        assert not hasattr(module.deployed_student, "points")

    def test_levels_are_spread_by_gradients_and_a_checkpoint_holds_their_numbers(self):
        module = self.build(ema_decay=0.5)
        optimizer = steps(self, module, BATCHES - 1)
        checkpoint = {}
        module.on_save_checkpoint(checkpoint)
        state = copy.deepcopy(module.state_dict())
        steps(self, module, 1, optimizer=optimizer, first=BATCHES - 1)
        numbers = [len(p) for p in module.student.points]
        assert sum(numbers) == 8 * len(numbers) and len(set(numbers)) > 1
        assert [len(p) for p in module.ema.module.points] == numbers
        other = self.build(ema_decay=0.5)  # goes on in the middle of the measurement
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(state)
        steps(self, other, 1, first=BATCHES - 1)
        assert all(torch.equal(a, b) for a, b in zip(module.student.points, other.student.points, strict=True))
        fresh = self.build(ema_decay=0.5)
        fresh.load_state_dict(module.state_dict())
        assert [len(p) for p in fresh.student.points] == numbers
        assert len(module.deployed_student.quantization["tensors"]) == len(numbers)

    def test_levels_have_a_rate_of_their_own_and_no_decay(self):
        for name, expected in (("sgd", 0.05 * 0.01), ("adamw", 0.05 * 0.01)):
            module = self.build()
            module.config.optimizer.name, module.config.optimizer.decay_norm_and_bias = name, True
            module.config.optimizer.weight_decay = 0.1
            groups = [g for g in module.configure_optimizers()["optimizer"].param_groups if g["params"]]
            assert [group["lr"] for group in groups] == [pytest.approx(expected)]
            assert [group["weight_decay"] for group in groups] == [0.0]


def test_alternation_goes_from_weights_to_levels_and_ends_with_weights():
    case = TestQuantized()
    case.options = {"mode": "alternating", "bits": 2, "allocate_points": False, "points_lr_ratio": 0.01}
    module = case.build()
    parts = lambda: torch.cat([p.detach().flatten().clone() for p in module.student.net.parameters()])  # noqa: E731
    turns, optimizer = [], module.configure_optimizers()["optimizer"]
    for epoch in range(4):
        at_epoch(module, epoch, epochs=4)
        weights, points = parts(), torch.cat([p.detach().clone() for p in module.student.points])
        steps(case, module, 2, optimizer=optimizer, first=2 * epoch)
        levels = "points" if module._learns_points else "uniform"
        assert module.deployed_student.quantization["levels"] == levels
        turns.append(levels)
        if levels == "points":
            made = module.deployed_student
            assert torch.equal(parts(), weights)
            assert not torch.equal(torch.cat([p.detach() for p in module.student.points]), points)
    assert turns == ["uniform", "points", "uniform", "uniform"]
    at_epoch(module, 1, epochs=4)
    steps(case, module, 1, optimizer=optimizer)
    made = module.deployed_student
    at_epoch(module, 2, epochs=4)
    module._change_phase()  # the weights become what the levels made of them
    name = module._names[1]
    assert torch.equal(module.student.net.get_parameter(name), made.net.get_parameter(name))


def test_a_packed_student_trains_as_floats():
    case = TestQuantized()
    packed = post_training_copy(tiny_network(seed=0), bits=2).requires_grad_(True)
    given = {"task": ClassificationTask(num_classes=4), "config": config(), "budget": Budget(10, 1)}
    module = registry.load("visionkd.methods", "kd", key="--method").METHOD
    trained = module(student=packed, options=module.Options(), **given)
    assert trained.student.packed is None and trained.student.quantization is None
    assert case.build().student.packed is None


def test_the_divergence_of_the_released_code_is_weaker_by_the_number_of_classes():
    given = {"student_logits": torch.randn(6, 10), "teacher_probs": torch.randn(6, 10).softmax(1), "temperature": 2.0}
    torch.testing.assert_close(softened_kl(**given, reduction="batch"), 10 * softened_kl(**given, reduction="elements"))


def config(**changes) -> DistillConfig:
    return DistillConfig(student={"name": "x"}, teachers=[{"name": "y"}], method="quantized", **changes)


@pytest.mark.parametrize(
    ("changes", "options", "key"),
    [
        ({"compute": {"strategy": "fsdp"}}, {}, "compute.strategy"),
        ({"training": {"compile": True}}, {}, "training.compile"),
        ({"label_store": {"mode": "on"}}, {"post_training": True}, "label_store.mode"),
        ({"label_store": {"mode": "on"}}, {"distill_loss_weight": 0.0}, "label_store.mode"),
        ({"augment": {"learned": "hard"}}, {"distill_loss_weight": 0.0}, "options.distill_loss_weight"),
        ({"compute": {"devices": 2}}, {"mode": "alternating"}, "options.mode"),
        ({"compute": {"devices": 2}}, {"mode": "differentiable"}, "options.allocate_points"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, options, key):
    given = {"student": tiny_network(seed=0), "teachers": [], "config": config(**changes)}
    (problem,) = Quantized.check(**given, options=QuantizedOptions(**options))
    assert problem.key == key and problem.hint
    assert not Quantized.check(**{**given, "config": config()}, options=QuantizedOptions(**options))


def test_post_training_quantisation_is_a_stage_without_epochs():
    options = QuantizedOptions(post_training=True)
    (stage,) = Quantized.stages(config(), options)
    assert stage.epochs == 0 and not Quantized.can_store_labels(options)
    (said,) = Quantized.warnings(student=tiny_network(seed=0), teachers=[], config=config(), options=options)
    assert "random" in said


def test_training_at_two_bits_beats_rounding_a_trained_network():
    """The paper's claim, on points that a small network tells apart by regions of no simple shape."""
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    target = (torch.randn(8, 12) * 1.5).T.matmul(x.T).sin().T.matmul(torch.randn(12, 4)).argmax(1)

    def net():
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def accuracy(weights):
        with torch.no_grad():
            return (functional_call(student, weights, (x,)).argmax(1) == target).float().mean().item()

    def quantized():
        return {n: fake_quantize_uniform(p, num_levels=4) for n, p in student.named_parameters()}

    student, teacher = net(), net()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), target).backward()
        optimizer.step()
    student.load_state_dict(teacher.state_dict())
    probs = (teacher(x).detach() / 2).softmax(1)
    full, rounded = accuracy(dict(student.named_parameters())), accuracy(quantized())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.003)
    for _ in range(200):
        logits = functional_call(student, quantized(), (x,))
        loss = softened_kl(student_logits=logits, teacher_probs=probs, temperature=2.0, reduction="batch")
        optimizer.zero_grad()
        (0.7 * loss + 0.3 * F.cross_entropy(logits, target)).backward()
        optimizer.step()
    trained = accuracy(quantized())
    assert full > 0.95
    assert trained > rounded + 0.12, (full, rounded, trained)
