"""fgd and rpn_roi on detectors."""

from __future__ import annotations

import pytest
import torch

from tests.methods.contract import NUM_CLASSES, _NoTrainer, tiny_network
from tests.methods.detection_contract import CLASSES, DetectionContract, boxes_batch, detector
from visionkd.config.load import build_options, options_problems
from visionkd.config.schema import DistillConfig
from visionkd.losses.fgd import fgd_terms
from visionkd.methods._optimizer import Budget
from visionkd.methods.fgd import FGD, FGDOptions
from visionkd.methods.rpn_roi import RPNRoI, RPNRoIOptions
from visionkd.tasks.detection import DetectionTask
from visionkd.types import Listener
from visionkd.workflows._method import choose_method, methods_for

TWO_STAGES = "fasterrcnn_test_resnet"


class TestFGD(DetectionContract):
    name = "fgd"

    def test_each_term_is_the_sum_over_the_levels(self):
        module, batch = self.build(), boxes_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        student, teachers = module.student_output(image, batch["target"]), module.teacher_outputs(image)
        found = module.distill_loss(student=student, teachers=teachers, target=batch["target"])
        assert len(student.features) == 5 == len(module.projectors)
        boxes = [batch["target"][0]["boxes"], batch["target"][1]["boxes"][:1], batch["target"][2]["boxes"]]
        pairs = list(zip(student.features, teachers[0].features, strict=True))
        terms = [
            fgd_terms(student_map=own, teacher_map=other, boxes=boxes, image_size=tuple(image.shape[2:]))
            for own, other in pairs
        ]
        for name in ("foreground", "background", "attention"):
            assert found[f"{name}_loss"].item() == pytest.approx(sum(getattr(each, name).item() for each in terms))
        # untrained blocks add nothing
        distance = sum(((own - other) ** 2).sum().item() for own, other in pairs) / len(image)
        assert found["relation_loss"].item() == pytest.approx(distance, rel=1e-5)

    def test_a_crowd_is_no_object(self):
        module, batch = self.build(), boxes_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        torch.manual_seed(0)
        expected = module.loss_terms(image, batch["target"])["foreground_loss"].item()
        batch["target"][1]["boxes"][1] = torch.tensor([30.0, 20, 60, 40])
        torch.manual_seed(0)
        again = module.loss_terms(image, batch["target"])["foreground_loss"].item()
        assert again == pytest.approx(expected, rel=1e-4)


class TestFGDAcrossKinds(DetectionContract):
    """A two-stage teacher with wider maps: some strides are common, and the student is lifted."""

    name = "fgd"
    teacher_names = (TWO_STAGES,)

    def teacher(self, name, *, seed):
        return detector(name, seed=seed, channels=16)

    def test_common_strides_are_compared_after_the_student_is_lifted(self):
        module = self.build()
        assert list(module.student_stages()) == [0, 1, 2] and list(module.teacher_stages()) == [1, 2, 3]
        assert all((each["align"].in_channels, each["align"].out_channels) == (8, 16) for each in module.projectors)


class TestRPNRoI(DetectionContract):
    name = "rpn_roi"
    student_name = TWO_STAGES
    teacher_names = ("fasterrcnn_test_efficientnet",)
    options = {"rpn_box_weight": 0.5, "roi_box_weight": 0.5, "temperature": 2.0}

    def test_terms_without_weight_are_not_computed(self):
        self.options = {"rpn_weight": 0.0}
        module, batch = self.build(), boxes_batch()
        module.frozen.networks[0].net.rpn.head.forward = None  # nobody may ask it
        assert set(module.loss_terms(batch["image"].float() / 255, batch["target"])) == {"task_loss", "roi_loss"}

    def test_gradients_of_both_stages_reach_the_students_heads(self):
        module, batch = self.build(), boxes_batch()
        terms = module.loss_terms(batch["image"].float() / 255, batch["target"])
        heads = module.student.net
        layers = {
            "rpn_loss": heads.rpn.head.cls_logits, "roi_loss": heads.roi_heads.box_predictor.cls_score,
            "roi_box_loss": heads.roi_heads.box_predictor.bbox_pred,
        }  # fmt: skip
        for name, layer in layers.items():
            (gradient,) = torch.autograd.grad(terms[name], layer.weight, retain_graph=True)
            assert gradient.abs().sum() > 0


def alike(method, name: str, options=None):
    """A module whose teacher is its student, both with the statistics that batch norms have kept."""
    student, teacher = (detector(name, seed=1) for _ in range(2))
    module = method(
        student=student, teachers=[teacher], task=DetectionTask(num_classes=NUM_CLASSES),
        config=DistillConfig(student={"name": "s"}, teachers=[{"name": "t"}]),
        options=build_options(method.Options, options or {}), budget=Budget(steps_per_epoch=1, epochs=1),
    )  # fmt: skip
    module.trainer = _NoTrainer()
    module.train()
    for part in student.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.eval()
    batch = boxes_batch()
    return module, module.loss_terms(batch["image"].float() / 255, batch["target"])


def test_fgd_of_a_network_and_itself_is_zero():
    _, terms = alike(FGD, "fcos_test_resnet")
    assert terms.pop("task_loss") > 0.1
    # up to the rounding of batch norms that are folded into the teacher's convolutions
    assert len(terms) == 4 and all(value.item() == pytest.approx(0.0, abs=1e-4) for value in terms.values())


def test_rpn_roi_of_a_network_and_itself_is_least():
    module, terms = alike(RPNRoI, TWO_STAGES, {"rpn_box_weight": 1.0, "roi_box_weight": 1.0})
    for name in ("roi_loss", "roi_box_loss", "rpn_box_loss"):
        assert terms[name].item() == pytest.approx(0.0, abs=1e-4)
    weight = module.student.net.rpn.head.cls_logits.weight
    steepness = [
        torch.autograd.grad(terms[name], weight, retain_graph=True)[0].abs().max() for name in ("rpn_loss", "task_loss")
    ]
    assert steepness[0] < 1e-5 < 1e-3 < steepness[1]  # the teacher's answers have an entropy


def test_weights_are_the_authors_for_either_kind_and_scaled_together():
    def weights(name: str, **options):
        module, _ = alike(FGD, name, options)
        found = module.loss_weights()
        return [found[f"{each}_loss"] for each in ("foreground", "background", "attention", "relation")]

    assert weights("fcos_test_resnet") == [1e-3, 5e-4, 5e-4, 5e-6]
    assert weights(TWO_STAGES, scale=10.0) == pytest.approx([5e-4, 2.5e-4, 5e-4, 5e-6])
    assert weights("fcos_test_resnet", attention=0.25, scale=2.0)[2] == 0.5


# What is told before any training -------------------------------------------------------------------------------------


def config(**values) -> DistillConfig:
    return DistillConfig(student={"name": "s"}, teachers=[{"name": "t"}], **values)


def told(method, student, *teachers, options=None, **values) -> str:
    given = build_options(method.Options, options or {})
    found = method.check(student=student, teachers=teachers, config=config(**values), options=given)
    return " | ".join(f"{each.key}: {each.message} ({each.hint})" for each in found)


def test_teachers_that_do_not_suit_are_refused():
    fcos, two = detector("fcos_test_resnet", seed=0), detector(TWO_STAGES, seed=1)
    classifier = tiny_network(seed=0)
    for method in (FGD, RPNRoI):
        assert "takes one teacher, and 2 are named" in told(method, two, two, two)
        assert "answers classification" in told(method, two, classifier)
        assert told(method, classifier, classifier) == ""  # the task is refused instead
    assert told(FGD, fcos, two) == "" == told(RPNRoI, two, detector("fasterrcnn_test_efficientnet", seed=2))
    found = told(RPNRoI, fcos, two)
    assert found.startswith("--student: 'fcos_test_resnet' has one stage") and "--method fgd" in found
    assert "--teacher: 'fcos_test_resnet' has one stage" in told(RPNRoI, two, fcos)


def test_pyramids_without_a_common_stride_are_refused():
    student, teacher = detector("fasterrcnn_test_resnet", seed=0), detector("fcos_test_resnet", seed=1)
    for level in ("0", "1", "2", "3"):  # leaves the pooled level
        body = student.net.backbone
        body.register_forward_hook(lambda _, __, maps, level=level: {k: v for k, v in maps.items() if k != level})
    found = told(FGD, student, teacher)
    assert "no level in common: strides 64 of 'fasterrcnn_test_resnet', 8, 16, 32, 64" in found


def test_a_teacher_of_other_classes_is_taken_for_its_features_if_that_is_asked_for():
    student, teacher = detector("fcos_test_resnet", seed=0), detector("fcos_test_resnet", seed=1, classes=("a", "b"))
    found = told(FGD, student, teacher)
    assert "the 2 classes of 'fcos_test_resnet' are not the data's" in found and "other_classes=true" in found
    assert told(FGD, student, teacher, fit_teacher={"mode": "finetune"}) == ""
    assert told(FGD, student, teacher, options={"other_classes": True}) == ""
    assert not FGD.asks(teacher, FGDOptions(other_classes=True)) and FGD.asks(teacher, FGDOptions())


def test_other_anchors_leave_the_second_stage():
    student = detector(TWO_STAGES, seed=0)
    for teacher in (detector(TWO_STAGES, seed=1, anchor_scale=4.0), detector(TWO_STAGES, seed=1, min_stride=8)):
        assert "options.rpn_weight: the anchors of" in told(RPNRoI, student, teacher)
        assert told(RPNRoI, student, teacher, options={"rpn_weight": 0.0}) == ""
    wrong = options_problems(RPNRoIOptions, {"rpn_weight": 0.0, "roi_weight": 0.0})
    assert len(wrong) == 1 and "nothing would be learned" in wrong[0].message


def test_a_student_begins_with_the_teachers_neck_and_heads():
    def settled(*, trained: bool = False, **options):
        student, teacher = detector("fcos_test_resnet", seed=0), detector("fcos_test_resnet", seed=1)
        student.trained = trained
        said = FGD.settle(student=student, teachers=[teacher], config=config(), options=FGDOptions(**options))
        own, other = student.net.state_dict(), teacher.net.state_dict()
        taken = [name for name in own if name.startswith(("head.", "backbone.fpn."))]
        return said, all(torch.equal(own[name], other[name]) for name in taken)

    said, same = settled()
    assert same and "stride 8, 16, 32, 64" in said[0] and "begin with the teacher's" in said[1]
    assert settled(init_student=False) == (said[:1], False)
    said, same = settled(trained=True)
    assert not same and "was trained before" in said[1]


# Choosing and adding up -----------------------------------------------------------------------------------------------


def test_detectors_are_distilled_by_fgd_unless_told_otherwise():
    student, teacher = detector("fcos_test_resnet", seed=0), detector("fcos_test_efficientnet", seed=1)
    settings, said = config(), Said()
    method, options = choose_method(settings, student=student, teachers=[teacher], listener=said)
    assert method is FGD and settings.method == "fgd" and settings.options["temperature"] == options.temperature == 0.5
    assert "Student and teacher find boxes, so the method is fgd" in said.texts[0]
    assert {"fgd", "rpn_roi"} <= set(methods_for("detection")) and "kd" not in methods_for("detection")


def test_both_are_added_up():
    settings = config(losses={"task_loss": {}, "fgd": {"weight": 2.0}, "rpn_roi": {"weight": 0.5}})
    student, teacher = detector(TWO_STAGES, seed=0), detector("fasterrcnn_test_efficientnet", seed=1)
    method, options = choose_method(settings, student=student, teachers=[teacher], listener=Listener())
    assert method.tasks == {"detection"}
    module = method(
        student=student, teachers=[teacher], task=DetectionTask(num_classes=NUM_CLASSES), config=settings,
        options=options, budget=Budget(steps_per_epoch=1, epochs=1),
    )  # fmt: skip
    module.trainer = _NoTrainer()
    module.train()
    batch = boxes_batch()
    torch.manual_seed(3)
    terms = module.loss_terms(batch["image"].float() / 255, batch["target"])
    assert set(terms) == {
        "task_loss", *(f"fgd.{name}_loss" for name in ("foreground", "background", "attention", "relation")),
        "rpn_roi.rpn_loss", "rpn_roi.roi_loss",
    }  # fmt: skip
    weights = module.loss_weights()
    assert weights["fgd.foreground_loss"] == 2 * 5e-5 and weights["rpn_roi.roi_loss"] == 0.5
    module.total(terms).backward()
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert CLASSES == module.student.classes


class Said(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str, *, level: str = "info") -> None:
        self.texts.append(text)
