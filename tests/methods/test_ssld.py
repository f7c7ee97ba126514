from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.methods.contract import MethodContract, tiny_batch
from visionkd.config.schema import DistillConfig
from visionkd.losses.distillation import average_probabilities, soft_cross_entropy
from visionkd.losses.symmetric_kl import symmetric_kl_loss
from visionkd.methods.ssld import SSLD, SSLDOptions
from visionkd.types import Output


class TestSSLD(MethodContract):
    name = "ssld"

    def test_labels_change_nothing_and_may_be_absent(self):
        results = []
        for labels in (None, 0, -1):
            module, batch = self.build(), tiny_batch()
            if labels is not None:
                batch["target"] = torch.full_like(batch["target"], labels)
            loss = self.step(module, batch)
            loss.backward()
            results.append((loss.detach(), torch.cat([p.grad.flatten() for p in module.parameters()])))
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])

    def test_unlabelled_images_can_be_mixed(self):
        module, batch = self.build(), tiny_batch()
        module.config.augment.mixup_alpha = 0.5
        from visionkd.data.mixing import batch_mixer

        module._mixer = batch_mixer(module.config.augment, num_classes=4)
        batch["target"][::2] = -1
        assert torch.isfinite(self.step(module, batch))

    def test_the_loss_is_the_symmetric_divergence_from_the_teacher(self):
        module, batch = self.build(), tiny_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        (teacher,) = module.teacher_outputs(image)
        student = module.student(image)
        found = module.distill_loss(student=student, teachers=(teacher,), target=batch["target"])["ssld_loss"]
        expected = symmetric_kl_loss(student_logits=student.logits, teacher_logits=teacher.logits)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


class TestSSLDOfSeveralTeachers(MethodContract):
    name = "ssld"
    teacher_names = ("cifar_resnet8", "cifar_resnet8")
    options = {"divergence": "soft_ce"}

    def test_probabilities_are_averaged(self):
        module = self.build()
        student = Output(logits=torch.randn(6, 4))
        teachers = tuple(Output(logits=3 * torch.randn(6, 4)) for _ in range(2))
        found = module.distill_loss(student=student, teachers=teachers, target=None)["ssld_loss"]
        probs = average_probabilities([teacher.logits for teacher in teachers])
        assert torch.equal(found, soft_cross_entropy(student_logits=student.logits, teacher_probs=probs))


class TestSSLDWithATeacherInTrainMode(MethodContract):
    """The authors' way: the teacher's batch norms look at the batch, and nothing else of it is in train mode."""

    name = "ssld"
    options = {"teacher_mode": "train"}

    def test_gradient_reaches_all_that_trains_and_nothing_else(self):
        module = self.build()
        before = [copy.deepcopy(teacher.state_dict()) for teacher in module.teachers]
        self.step(module, tiny_batch()).backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        for teacher, state in zip(module.teachers, before, strict=True):
            assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
            assert all(torch.equal(value, state[name]) for name, value in teacher.named_parameters())
            running = [name for name in state if name.endswith(("running_mean", "running_var"))]
            now = teacher.state_dict()
            assert running and not any(torch.equal(now[name], state[name]) for name in running)

    def test_teacher_stays_in_eval_mode_and_out_of_the_checkpoint(self):
        module = self.build()
        module.train()
        for teacher in module.teachers:
            for part in teacher.modules():
                assert part.training == isinstance(part, nn.BatchNorm2d)
        assert not any("teacher" in name for name in module.state_dict())

    def test_labels_depend_on_the_batch_so_no_store_can_hold_them(self):
        assert not SSLD.can_store_labels(SSLDOptions(teacher_mode="train"))
        assert SSLD.can_store_labels(SSLDOptions())
        module, image = self.build(), tiny_batch()["image"].float() / 255
        whole = module.teacher_outputs(image)[0].logits[:4]
        assert not torch.allclose(whole, module.teacher_outputs(image[:4])[0].logits, atol=1e-3)


def test_the_drift_never_reaches_the_teacher_that_was_given():
    case = TestSSLDWithATeacherInTrainMode()
    given = []

    class Watched(SSLD):
        def prepare_teacher(self, teacher):
            given.append((teacher, copy.deepcopy(teacher.state_dict())))
            return super().prepare_teacher(teacher)

    type(case).method = property(lambda self: Watched)
    try:
        module = case.build()
        for seed in range(3):
            case.step(module, tiny_batch(seed=seed))
    finally:
        del type(case).method
    (teacher, before) = given[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_dropout_of_a_teacher_in_train_mode_stays_off():
    module = TestSSLDWithATeacherInTrainMode().build()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten()).eval()
    prepared = module.prepare_teacher(net)
    image = torch.rand(4, 3, 8, 8)
    assert torch.equal(prepared(image), prepared(image)) and prepared[1].training and not net[1].training


def config(**data) -> DistillConfig:
    return DistillConfig(student={"name": "x"}, teachers=[{"name": "y"}], method="ssld", data=data)


def test_stage_two_is_a_hundredth_of_the_rate_on_the_labelled_data_alone():
    assert [stage.name for stage in SSLD.stages(config(), SSLDOptions())] == ["distill"]
    first, second = SSLD.stages(config(), SSLDOptions(finetune_epochs=7))
    assert (first.epochs, first.lr_ratio, first.labeled_only) == (None, 1.0, False)
    assert (second.epochs, second.lr_ratio, second.labeled_only) == (7, 0.01, True)
    module = TestSSLD().build()
    assert module.loss_weights()["task_loss"] == 0.0


def test_what_changes_nothing_is_said():
    from tests.methods.contract import tiny_network

    networks = {"student": tiny_network(seed=0), "teachers": [tiny_network(seed=1)]}
    options = SSLDOptions(finetune_epochs=2, teacher_mode="train")
    (said,) = SSLD.warnings(**networks, config=config(), options=options)
    assert "--unlabeled" in said
    assert not SSLD.warnings(**networks, config=config(unlabeled="pool"), options=options)
    for module in networks["teachers"][0].modules():
        for name, part in module.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    (said,) = SSLD.warnings(**networks, config=config(unlabeled="pool"), options=options)
    assert "no batch norm" in said
