from __future__ import annotations

import pytest
import torch

from tests.methods.contract import MethodContract, tiny_batch, tiny_network
from tests.methods.test_combined import build as build_combination
from tests.methods.test_combined import step
from tests.models.families import tiny_family
from visionkd.config.load import build_options
from visionkd.config.schema import DistillConfig
from visionkd.losses.diswot import relation_distance, semantic_distance
from visionkd.methods.diswot import DisWOT, DisWOTOptions
from visionkd.models.fold import fold_batch_norm
from visionkd.models.stages import plan_of


class TestDisWOT(MethodContract):
    name = "diswot"

    def test_the_distances_are_those_of_the_deepest_maps(self):
        module, batch = self.build(), tiny_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        (teacher,), student = module.teacher_outputs(image), module.student_output(image)
        assert student.features[-1].shape == teacher.features[-1].shape == (8, 64, 8, 8)
        found = module.distill_loss(student=student, teachers=(teacher,), target=batch["target"])
        maps = {"student_map": student.features[-1], "teacher_map": teacher.features[-1]}
        torch.testing.assert_close(found["relation_loss"], relation_distance(**maps))
        torch.testing.assert_close(found["semantic_loss"], semantic_distance(**maps))
        assert found["semantic_loss"] > 0 and found["relation_loss"] > 0

    def test_each_distance_alone_teaches_the_student(self):
        for name in ("relation_loss", "semantic_loss"):
            module, batch = self.build(), tiny_batch()
            weights = {f"{each}_weight": float(each == name) for each in module.loss_weights()}
            module.options = build_options(DisWOTOptions, weights)
            optimizer, losses = torch.optim.Adam(module.student.parameters(), lr=1e-3), []
            for _ in range(12):
                loss = self.step(module, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[-1] < 0.9 * losses[0], name


class TestSeveralTeachers(MethodContract):
    name = "diswot"
    teacher_names = ("cifar_resnet8", "cifar_resnet8")

    def test_they_count_equally(self):
        module, batch = self.build(), tiny_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        teachers, student = module.teacher_outputs(image), module.student_output(image)
        both = module.distill_loss(student=student, teachers=teachers, target=batch["target"])
        each = [module.distill_loss(student=student, teachers=(t,), target=batch["target"]) for t in teachers]
        for name in ("relation_loss", "semantic_loss"):
            torch.testing.assert_close(both[name], (each[0][name] + each[1][name]) / 2)


def check(student, teacher, **options):
    config = DistillConfig(student={"name": "cifar_resnet8"}, teachers=[{"name": "cifar_resnet8"}])
    given = {"student": student, "teachers": [teacher], "config": config}
    return DisWOT.check(**given, options=build_options(DisWOTOptions, options))


def test_other_widths_are_refused_unless_only_samples_are_related():
    student, teacher = tiny_network(seed=0), tiny_network(seed=1, width=2)
    (problem,) = check(student, teacher)
    assert problem.key == "options.semantic_loss_weight"
    assert "64 in the student, 128 in the teacher" in problem.message
    assert "semantic_loss_weight=0" in problem.hint
    assert not check(student, teacher, semantic_loss_weight=0)
    assert not check(student, tiny_network(seed=1))


def test_relations_of_samples_cross_families():
    student, teacher = tiny_network(seed=0), tiny_family("vit", seed=1)
    assert not check(student, teacher, semantic_loss_weight=0)
    module, _ = build_combination("method: diswot\noptions: {semantic_loss_weight: 0}")
    assert "semantic_loss" not in module.distill_loss(
        student=module.student_output(torch.rand(4, 3, 32, 32)),
        teachers=module.teacher_outputs(torch.rand(4, 3, 32, 32)),
        target=torch.zeros(4, dtype=torch.int64),
    )


def test_weights_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="teach nothing"):
        DisWOTOptions(kd_loss_weight=0, relation_loss_weight=0, semantic_loss_weight=0)


def test_in_a_combination_each_part_sees_its_own_maps():
    module, _ = build_combination("losses: {ofa_kd: {}, diswot: {}, kd: {}}")
    alone, _ = build_combination("method: diswot")
    step(module)
    step(alone)
    found, expected = module.take_train_metrics(), alone.take_train_metrics()
    for name in ("kd_loss", "relation_loss", "semantic_loss"):
        assert found[f"train/diswot.{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-5)
    assert list(module.teacher_stages()) == [-1] and len(module.student_stages()) > 1


def test_teachers_give_no_maps_unless_asked():
    module, _ = build_combination("method: kd")
    (output,) = module.teacher_outputs(torch.rand(2, 3, 32, 32))
    assert output.features == ()


def test_a_folded_network_is_looked_at_anew():
    network = tiny_network(seed=0).eval()
    before = plan_of(network)
    folded = fold_batch_norm(network)
    assert folded is not network and plan_of(folded) is not before and plan_of(network) is before
