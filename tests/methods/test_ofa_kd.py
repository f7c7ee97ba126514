from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.methods.contract import NUM_CLASSES, MethodContract, _NoTrainer, tiny_batch
from tests.models.families import bare, tiny_family
from visionkd.config.load import build_options
from visionkd.config.schema import DistillConfig
from visionkd.hub.package import save_package
from visionkd.losses.distillation import average_probabilities
from visionkd.losses.ofa import ofa_loss
from visionkd.methods._optimizer import Budget
from visionkd.methods.ofa_kd import OFAKD, OFAKDOptions
from visionkd.models.factory import load_packaged
from visionkd.models.features import FeatureOutput, four_stages
from visionkd.models.network import Network
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import Output

STUDENTS = ("cnn", "mobilenet", "convnext", "vit", "vit_no_class_token", "swin", "mixer")
TEACHERS = ("cnn", "mobilenet", "convnext", "vit", "swin", "mixer")
PAIRS = [(student, teacher) for student in STUDENTS for teacher in TEACHERS if student != teacher]


class TestOFAKD(MethodContract):
    name = "ofa_kd"
    options = {"exponent": 1.5}


class TestOfATransformer(MethodContract):
    name = "ofa_kd"
    options = {"exponent": [1.0, 1.1, 1.2], "temperature": 2.0, "stages": [2, 4], "readout": "class_token"}

    def build(self, **training) -> OFAKD:
        return module_of(tiny_family("vit", seed=1), tiny_family("cnn", seed=2), training=training, **self.options)


class TestSeveralTeachers(MethodContract):
    name = "ofa_kd"
    teacher_names = ("cifar_resnet8", "cifar_resnet8")

    def test_their_probabilities_are_averaged(self) -> None:
        module, batch = self.build(), tiny_batch()
        image = module.on_after_batch_transfer(batch, 0)["image"]
        teachers, student = module.teacher_outputs(image), module.student_output(image)
        found = module.distill_loss(student=student, teachers=teachers, target=batch["target"])["kd_loss"]
        probs = torch.stack([teacher.logits.softmax(1) for teacher in teachers]).mean(0)
        expected = ofa_loss(student_logits=student.logits, teacher_probs=probs, target=batch["target"])
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


class TestWithoutExits(MethodContract):
    name = "ofa_kd"
    options = {"stages": []}


@lru_cache
def teacher_of(kind: str) -> Network:
    return tiny_family(kind, seed=7)


def module_of(student: Network, *teachers: Network, training: dict | None = None, **options) -> OFAKD:
    config = DistillConfig(
        student={"name": "student"},
        teachers=[{"name": "teacher"}],
        method="ofa_kd",
        optimizer={"name": "sgd", "lr": 0.05, "weight_decay": 0.0},
        training={"seed": 1, **(training or {})},
    )
    module = OFAKD(
        student=student,
        teachers=teachers,
        task=ClassificationTask(num_classes=NUM_CLASSES),
        config=config,
        options=build_options(OFAKDOptions, options),
        budget=Budget(steps_per_epoch=10, epochs=1),
    )
    module.trainer = _NoTrainer()
    return module.train()


def images(size: int = 4) -> tuple[Tensor, Tensor]:
    batch = tiny_batch(size=size)
    return batch["image"].float() / 255, batch["target"]


def stem(student: Network) -> nn.Parameter:
    return next(parameter for name, parameter in student.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(("student_kind", "teacher_kind"), PAIRS)
def test_every_pair_of_families(student_kind: str, teacher_kind: str) -> None:
    module = module_of(tiny_family(student_kind), teacher_of(teacher_kind), exponent=1.5)
    assert [f"exit{number}" for number in four_stages(module.student)] == list(module.projectors)
    terms = module.loss_terms(*images())
    loss = module.total(terms)
    assert loss.isfinite()
    assert terms["exit_loss"].item() == pytest.approx(sum(terms[f"{name}_loss"].item() for name in module.projectors))
    expected = terms["task_loss"] + terms["kd_loss"] + terms["exit_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # the exits alone move the trunk
    (grad,) = torch.autograd.grad(terms["exit_loss"], stem(module.student), retain_graph=True)
    assert grad.abs().sum() > 0
    loss.backward()
    for name, exit_ in module.projectors.items():
        assert all(parameter.grad is not None for parameter in exit_.parameters()), name
        assert exit_.head.weight.grad.abs().sum() > 0, name
    assert not any(parameter.grad is not None for parameter in module.teachers[0].parameters())


@pytest.mark.parametrize("kind", ["cnn", "mobilenet", "convnext", "vit", "swin"])
def test_the_package_is_the_plain_student(kind: str, tmp_path: Path) -> None:
    module = module_of(tiny_family(kind), teacher_of("cnn" if kind != "cnn" else "swin"), training={"ema_decay": 0.5})
    optimizer = module.configure_optimizers()["optimizer"]
    image, target = images()
    module.total(module.loss_terms(image, target)).backward()
    optimizer.step()
    module.ema.update_parameters(module.student)
    assert not any("exit" in name for name in module.ema.state_dict()), "the average is the student's alone"
    deployed = module.deployed_student.eval()
    classes = tuple("abcd")
    save_package(deployed, tmp_path / "m", task="classification", classes=classes, metrics={}, origin={})
    loaded, _ = load_packaged(tmp_path / "m")
    assert set(loaded.net.state_dict()) == set(tiny_family(kind).net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(image).logits, deployed(image).logits)
    assert not hasattr(loaded, "projectors")


def gradients(module: OFAKD) -> dict[str, Tensor]:
    module.total(module.loss_terms(*images())).backward()
    return {name: parameter.grad for name, parameter in module.student.named_parameters()}


def test_a_weight_of_0_and_no_stages_give_the_gradients_of_labels_and_kd() -> None:
    found = [
        gradients(module_of(tiny_family("cnn"), teacher_of("swin"), **options))
        for options in ({"exit_loss_weight": 0.0}, {"stages": []}, {})
    ]
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert any(not torch.allclose(grad, found[1][name]) for name, grad in found[2].items())
    module = module_of(tiny_family("cnn"), teacher_of("swin"), stages=[])
    assert not module.projectors and module.student_stages() == ()
    assert set(module.loss_terms(*images())) == {"task_loss", "kd_loss"}


def test_each_exit_has_its_exponent_and_the_final_logits_the_last() -> None:
    options = {"stages": [4, 2], "exponent": [1.1, 1.3, 1.7], "temperature": 2.0}
    module = module_of(tiny_family("cnn"), teacher_of("vit"), **options)
    assert list(module.projectors) == ["exit4", "exit2"]
    image, target = images()
    student, teachers = module.student_output(image), module.teacher_outputs(image)
    found = module.distill_loss(student=student, teachers=teachers, target=target)
    probs = average_probabilities([teachers[0].logits], temperature=2.0)

    def loss(logits: Tensor, exponent: float) -> float:
        given = {"teacher_probs": probs, "target": target, "temperature": 2.0}
        return ofa_loss(student_logits=logits, exponent=exponent, **given).item()

    exits = [exit_(f) for exit_, f in zip(module.projectors.values(), student.features, strict=True)]
    assert [feature.shape[1] for feature in student.features] == [64, 16]
    assert found["exit4_loss"].item() == pytest.approx(loss(exits[0], 1.1), rel=1e-5)
    assert found["exit2_loss"].item() == pytest.approx(loss(exits[1], 1.3), rel=1e-5)
    assert found["kd_loss"].item() == pytest.approx(loss(student.logits, 1.7), rel=1e-5)
    assert OFAKD.label_temperature(module.options) == 2.0


def test_only_exits_from_maps_are_as_wide_as_the_teacher() -> None:
    teacher = tiny_family("swin", embed_dim=32)
    wide = module_of(tiny_family("cnn"), tiny_family("vit"), teacher)
    assert {exit_.head.in_features for exit_ in wide.projectors.values()} == {128}
    own = module_of(tiny_family("cnn"), teacher_of("swin"))
    assert {exit_.head.in_features for exit_ in own.projectors.values()} == {64}
    tokens = module_of(tiny_family("vit"), teacher)
    assert {exit_.head.in_features for exit_ in tokens.projectors.values()} == {16}


def test_teachers_are_run_plainly() -> None:
    module = module_of(tiny_family("cnn"), teacher_of("vit"))
    (output,) = module.teacher_outputs(images()[0])
    assert output.features == () and not output.logits.requires_grad and not module.teachers[0].training


def test_stored_probabilities_stand_for_the_teacher() -> None:
    module = module_of(tiny_family("cnn"), teacher_of("vit"), temperature=2.0, exponent=1.4)
    image, target = images()
    probs = module.soft_label(module.teacher_outputs(image))
    state = torch.get_rng_state()
    live = module.loss_terms(image, target)
    torch.set_rng_state(state)
    stored = module.loss_terms(image, target, teacher_probs=probs)
    for name in ("kd_loss", "exit_loss"):
        torch.testing.assert_close(stored[name], live[name])
    assert OFAKD.can_store_labels(module.options)


def test_the_class_token_is_read_where_it_is_asked_for() -> None:
    module = module_of(tiny_family("vit"), teacher_of("cnn"), readout="class_token")
    image, _ = images()
    output = module.student_output(image)
    assert isinstance(output, FeatureOutput) and len(output.prefix_tokens) == 4
    logits = module.exit_logits(output)
    moved = FeatureOutput(
        output.logits, output.features, prefix_tokens=tuple(1.0 - each for each in output.prefix_tokens)
    )
    assert not any(torch.allclose(a, b) for a, b in zip(logits, module.exit_logits(moved), strict=True))
    averaged = module_of(tiny_family("vit"), teacher_of("cnn"))
    again = zip(averaged.exit_logits(output), averaged.exit_logits(moved), strict=True)
    assert all(torch.equal(a, b) for a, b in again), "the mean is over the grid alone"


def test_exits_start_from_the_seed_alone() -> None:
    states, generators = [], []
    for noise in (1, 2):
        student, teacher = tiny_family("cnn"), teacher_of("vit")
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        module = module_of(student, teacher)
        generators.append(torch.equal(before, torch.get_rng_state()))
        states.append(module.projectors.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(generators), "building exits draws nothing from the run's generator"
    other = module_of(tiny_family("cnn"), teacher_of("vit"), training={"seed": 2}).projectors.state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in states[0].items())


# What is refused ------------------------------------------------------------------------------------------------------


def problems(student: Network, **options) -> list[str]:
    found = OFAKD.check(student=student, teachers=(), config=None, options=build_options(OFAKDOptions, options))
    return [f"{problem.key}: {problem.message} {problem.hint}" for problem in found]


def test_a_fitting_request_passes() -> None:
    assert problems(tiny_family("cnn")) == []
    assert problems(tiny_family("cnn"), stages=[3, 4], exponent=[1, 1, 2]) == []
    assert problems(tiny_family("vit"), readout="class_token", exponent=[1, 1, 1, 1, 2]) == []


def test_a_stage_that_the_student_lacks_is_named() -> None:
    (text,) = problems(tiny_family("cnn"), stages=[1, 3])
    assert text.startswith("options.stages: 'cifar_resnet8' has no stage 1") and "2 (layer1)" in text


def test_the_number_of_exponents_must_fit_the_students_exits() -> None:
    (text,) = problems(tiny_family("cnn"), exponent=[1, 1, 1, 1, 1.5])
    assert text.startswith("options.exponent: 5 values of exponent for 3 exits") and "2, 3, 4" in text


@pytest.mark.parametrize("kind", ["cnn", "swin", "vit_no_class_token", "mixer"])
def test_a_class_token_must_be_there_to_be_read(kind: str) -> None:
    (text,) = problems(tiny_family(kind), readout="class_token")
    assert text.startswith("options.readout:") and "carry no class token" in text


def test_a_student_without_stages_is_refused_unless_there_are_no_exits() -> None:
    flat = bare(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)))
    (text,) = problems(flat)
    assert "student.name: 'bare' shows no feature maps" in text and "options.stages=[]" in text
    assert problems(flat, stages=[]) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stages": [5]}, "options.stages"),
        ({"stages": [2, 2]}, "name a stage twice"),
        ({"stages": [2], "exponent": [1, 1, 1]}, "3 values of exponent for 1 exit: give one, or 2"),
        ({"temperature": 0}, "greater than 0"),
        ({"exponent": [1.0, -1.0]}, "options.exponent.1"),
        ({"exponent": []}, "options.exponent"),
        ({"exponent": "high"}, "options.exponent"),
        ({"kd_loss_weight": 0, "exit_loss_weight": 0}, "the teacher would teach nothing"),
        ({"kd_loss_weight": 0, "stages": []}, "the teacher would teach nothing"),
        ({"readout": "max"}, "options.readout"),
    ],
)
def test_wrong_options(options: dict, reason: str) -> None:
    from visionkd.config.load import options_problems

    found = options_problems(OFAKDOptions, options)
    assert any(reason in f"{problem.key}: {problem.message}" for problem in found), found


def test_an_output_without_features_is_not_silently_taken() -> None:
    module = module_of(tiny_family("cnn"), teacher_of("vit"))
    with pytest.raises(ValueError):
        module.exit_logits(Output(logits=torch.zeros(4, NUM_CLASSES)))
