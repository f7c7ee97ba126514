from __future__ import annotations

import pytest
import torch

from tests.methods.contract import MethodContract, tiny_batch
from visionkd.errors import RequestError
from visionkd.methods.kd import KDOptions
from visionkd.types import Output
from visionkd.workflows._request import build_config, method_options


class TestKD(MethodContract):
    name = "kd"


class TestHardKD(MethodContract):
    name = "kd"
    options = {"hard_labels": True}


class TestSeveralTeachers(MethodContract):
    name = "kd"
    teacher_names = ("cifar_resnet8", "cifar_resnet8")

    def test_teachers_count_equally(self):
        module, batch = self.build(), tiny_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        teachers = module.teacher_outputs(image)
        logits = module.student(image).logits.detach()

        def gradient(given):
            student = Output(logits=logits.clone().requires_grad_())
            module.distill_loss(student=student, teachers=given, target=batch["target"])["kd_loss"].backward()
            return student.logits.grad

        both, each = gradient(teachers), [gradient((one,)) for one in teachers]
        torch.testing.assert_close(both, torch.stack(each).mean(0), rtol=1e-4, atol=1e-7)
        assert (each[0] - each[1]).abs().max() > 1e-3


def test_zero_weights_are_refused():
    with pytest.raises(ValueError, match="nothing would be learned"):
        KDOptions(task_loss_weight=0, distill_loss_weight=0)


def test_wrong_options_are_reported_together_with_the_nearest_name():
    from visionkd.config.schema import DistillConfig

    with pytest.raises(RequestError) as caught:
        build_config(
            DistillConfig,
            config=None,
            options=["options.temprature=3", "options.distill_loss_weight=-1", "method=kd"],
            overrides={"student.name": "resnet18", "teachers": [{"name": "resnet50"}]},
            out=None,
            resume=False,
        )
    text = str(caught.value)
    assert "options.temprature" in text and "'temperature'" in text
    assert "options.distill_loss_weight" in text
    assert method_options("kd") is KDOptions
