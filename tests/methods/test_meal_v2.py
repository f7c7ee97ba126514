from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.methods.contract import MethodContract, tiny_batch
from visionkd.config.schema import ScheduleConfig
from visionkd.losses.distillation import average_probabilities, soft_cross_entropy
from visionkd.methods._optimizer import Budget, lr_factor
from visionkd.methods.meal_v2 import MEALV2, Discriminator, MEALV2Options, discriminator_loss
from visionkd.types import Output


class TestMEALV2(MethodContract):
    name = "meal_v2"
    teacher_names = ("cifar_resnet8", "cifar_resnet8")
    options = {"discriminator_reduction": 2}
    differ_when_stored = ("discriminator_loss", "discriminator_dead")

    def test_labels_change_nothing(self):
        losses, gradients = [], []
        for shift in (0, 1):
            module, batch = self.build(), tiny_batch()
            batch["target"] = (batch["target"] + shift) % 4
            loss = self.step(module, batch)
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        assert losses[0] == losses[1] and torch.equal(*gradients)

    def test_the_discriminator_adds_its_gradient_with_a_plus_sign(self):
        module = self.build()
        for layer in list(module.projectors["discriminator"])[::2]:
            layer.bias.data.fill_(1.0)  # so narrow a one may be born dead
        logits = torch.randn(6, 4)
        teachers = tuple(Output(logits=torch.randn(6, 4)) for _ in range(2))

        def gradients():
            student = Output(logits=logits.clone().requires_grad_())
            terms = module.distill_loss(student=student, teachers=teachers, target=None)
            parts = [
                torch.autograd.grad(terms[name], student.logits, retain_graph=True)[0]
                for name in ("similarity_loss", "discriminator_loss")
            ]
            module.total(terms).backward()
            return parts, student.logits.grad

        parts, total = gradients()
        assert parts[1].abs().max() > 0
        torch.testing.assert_close(total, parts[0] + parts[1])

    def test_stored_labels_put_probabilities_on_both_sides(self):
        module, logits = self.build(), torch.randn(6, 4)
        probs = torch.randn(6, 4).softmax(1)
        sides = module._discriminated(logits, (Output(probs=probs),), probs)
        assert torch.equal(sides["student"], logits.softmax(1)) and torch.equal(sides["teacher"], probs)


def test_several_teachers_are_averaged_after_the_softmax():
    logits = [torch.randn(5, 10, generator=torch.Generator().manual_seed(k)) * 4 for k in range(2)]
    probs = average_probabilities(logits)
    assert (probs - torch.stack(logits).mean(0).softmax(1)).abs().max() > 0.1
    torch.testing.assert_close(probs, torch.stack([z.softmax(1) for z in logits]).mean(0))


def test_similarity_is_kl_plus_the_teachers_entropy():
    student, probs = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7).softmax(1)
    loss = soft_cross_entropy(student_logits=student, teacher_probs=probs)
    entropy = -(probs * probs.log()).sum(1).mean()
    torch.testing.assert_close(loss - entropy, F.kl_div(student.log_softmax(1), probs, reduction="batchmean"))
    loss.backward()
    torch.testing.assert_close(student.grad, (student.softmax(1) - probs).detach() / 5)


def test_discriminator_widths_and_floor():
    assert [layer.out_features for layer in list(Discriminator(1000))[::2]] == [125, 15, 2]
    assert [layer.out_features for layer in list(Discriminator(64))[::2]] == [8, 1, 2]
    assert [layer.out_features for layer in list(Discriminator(4))[::2]] == [1, 1, 2]
    made = Discriminator(16, 2)
    for scale in (1.0, 100.0):
        sides = {"student": torch.randn(8, 16) * scale, "teacher": torch.randn(8, 16) * scale}
        assert discriminator_loss(made, **sides)[0] >= math.log(2) / 2


def test_a_dead_discriminator_is_counted_and_has_no_gradient():
    made = Discriminator(16, 2)
    made[4].bias.data.fill_(-50.0)
    student = torch.randn(8, 16, requires_grad=True)
    loss, dead = discriminator_loss(made, student=student, teacher=torch.randn(8, 16))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and dead == 1.0
    assert not student.grad.any() and not any(p.grad.any() for p in made.parameters())


def test_a_discriminator_alone_is_refused():
    with pytest.raises(ValueError, match="similarity_weight"):
        MEALV2Options(similarity_weight=0.0)


def test_no_weight_decay_by_default_and_a_step_after_epoch_101():
    assert MEALV2.default_weight_decay == 0.0
    schedule = ScheduleConfig(name="step", warmup_epochs=0, milestones=(101,), gamma=0.1)
    budget = Budget(steps_per_epoch=10, epochs=180)
    # the paper counts epochs from 0: 100 is the last one at the full rate
    assert lr_factor(100 * 10 + 9, schedule=schedule, budget=budget) == 1.0
    assert lr_factor(101 * 10, schedule=schedule, budget=budget) == pytest.approx(0.1)


def test_the_discriminator_may_learn_at_a_rate_of_its_own():
    module = TestMEALV2()
    module.options = {"discriminator_lr_ratio": 0.01}
    groups = module.build().configure_optimizers()["optimizer"].param_groups
    own = {id(p) for p in groups[-1]["params"]}
    assert sorted({round(group["lr"], 8) for group in groups}) == [0.0005, 0.05] and own
