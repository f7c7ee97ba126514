"""kd, cwd and pairwise on maps of classes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.methods.contract import NUM_CLASSES
from tests.methods.dense_contract import DenseContract, dense_batch, dense_network
from visionkd.config.schema import DistillConfig
from visionkd.methods.kd import KD
from visionkd.types import Listener
from visionkd.workflows._method import choose_method


class TestKD(DenseContract):
    name = "kd"
    teacher_names = ("fpn_cifar_resnet8",)


class TestSeveralTeachersOfOtherReduction(DenseContract):
    name = "kd"
    teacher_names = ("fcn_cifar_resnet8", "fpn_cifar_resnet8")
    options = {"reduction": "pixel_ce", "labelled_only": True}
    differ_when_stored = ("kd_loss",)  # probabilities are resized, in place of logits

    def test_unlabelled_pixels_are_left_out(self):
        module, batch = self.build(), dense_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        student, teachers = module.student_output(image), module.teacher_outputs(image)
        loss = module.distill_loss(student=student, teachers=teachers, target=batch["target"])["kd_loss"]
        changed = student.logits.clone()
        unlabelled = batch["target"][:, 1::2, 1::2] == 255  # logits at stride 2
        assert unlabelled.shape[1:] == changed.shape[2:] and unlabelled.any()
        changed += 9 * torch.randn_like(changed) * unlabelled[:, None]
        other = dataclasses.replace(student, logits=changed)
        assert module.distill_loss(student=other, teachers=teachers, target=batch["target"])["kd_loss"] == loss


class TestHardKD(DenseContract):
    name = "kd"
    options = {"hard_labels": True}
    differ_when_stored = ("kd_loss",)


class TestCWD(DenseContract):
    name = "cwd"

    def test_features_weigh_more_unless_told(self):
        options = self.method.Options
        weights = [self.weight(options(maps="logits")), self.weight(options(maps="features"))]
        assert weights == [3.0, 50.0] and self.weight(options(maps="features", weight=7.0)) == 7.0

    def weight(self, options):
        self.options = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        return self.build().loss_weights()["cwd_loss"]


class TestCWDOnFeatures(DenseContract):
    name = "cwd"
    options = {"maps": "features"}
    teacher_names = ("fpn_cifar_resnet8",)

    def teacher(self, name, *, seed):
        return dense_network(name, seed=seed, channels=12)

    def test_the_student_is_lifted_to_the_teachers_channels(self):
        lift = self.build().projectors["lift0"]
        assert (lift.in_channels, lift.out_channels, lift.bias) == (8, 12, None)


class TestPairwise(DenseContract):
    name = "pairwise"
    options = {"scale": 0.25}


def test_maps_take_defaults_of_their_own_unless_options_are_given():
    config = DistillConfig(student={"name": "s"}, teachers=[{"name": "t"}], method="kd", options={"temperature": 2.0})
    student = dense_network("fpn_cifar_resnet8", seed=0)
    method, options = choose_method(config, student=student, teachers=[student], listener=Listener())
    assert method is KD and (options.temperature, options.task_loss_weight, options.distill_loss_weight) == (
        2.0,
        1.0,
        1.0,
    )
    assert config.options["distill_loss_weight"] == 1.0


@pytest.mark.parametrize("name", ["cwd", "pairwise"])
def test_methods_are_added_up_with_others(name):
    config = DistillConfig(
        student={"name": "s"}, teachers=[{"name": "t"}], losses={"task_loss": {}, "kd": {"weight": 2.0}, name: {}}
    )
    student, teacher = (dense_network("fpn_cifar_resnet8", seed=seed) for seed in range(2))
    method, options = choose_method(config, student=student, teachers=[teacher], listener=Listener())
    assert method.tasks == {"segmentation"} and options.parts[0].options.temperature == 1.0
    assert student.num_classes == NUM_CLASSES
