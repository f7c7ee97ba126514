"""DisWOT: both distances, on maps and on gradients of the classifier, and the score of a whole student."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from _reference.base import Case, Check, Comparison
from visionkd.losses.distillation import kd_loss
from visionkd.losses.diswot import relation_distance, semantic_distance
from visionkd.models.cifar_resnet import Block, CifarResNet
from visionkd.models.network import Network
from visionkd.search._passes import Batch, initialised, run
from visionkd.search.scores import make_scorer
from visionkd.types import InputSpec


def _gradient(case: Case, student: Tensor, loss: Tensor) -> Iterator[Comparison]:
    yield Comparison("loss", loss.reshape(case.arrays["loss"].shape), case.arrays["loss"])
    if case.has("grad_student"):
        loss.backward()
        yield Comparison("grad_student", student.grad, case.arrays["grad_student"])


def _relation(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student", requires_grad=True)
    yield from _gradient(case, student, relation_distance(student_map=student, teacher_map=case.tensor("teacher")))


def _semantic(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student", requires_grad=True)
    yield from _gradient(case, student, semantic_distance(student_map=student, teacher_map=case.tensor("teacher")))


def _relation_of_a_sample(case: Case) -> Iterator[Comparison]:
    """What the released script computes: one vector's entries stand for the samples. Only to be recognised."""
    student, teacher = (case.tensor(name)[0].unsqueeze(1) for name in ("student", "teacher"))
    found = relation_distance(student_map=student, teacher_map=teacher)
    yield Comparison("loss", found.reshape(case.arrays["loss"].shape), case.arrays["loss"])
    right = relation_distance(student_map=case.tensor("student"), teacher_map=case.tensor("teacher"))
    differs = not torch.isclose(right, found, rtol=case.rtol, atol=case.atol)
    yield Comparison("differs_from_the_relation_of_samples", differs, True)


def _kd(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student_logits", requires_grad=True)
    loss = kd_loss(
        student_logits=student, teacher_logits=case.tensor("teacher_logits"), temperature=float(case.hyper["T"])
    )
    yield from _gradient(case, student, loss)


def _network(case: Case, prefix: str) -> Network:
    """Return the authors' ResNet, which is ours but for its widths and its blocks per stage."""
    state = case.tensors(f"{prefix}.")
    num_classes, last = state["fc.weight"].shape
    net = CifarResNet(8, num_classes=num_classes)
    width = state["conv1.weight"].shape[0]
    net.conv1, net.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
    for number, stride in ((1, 1), (2, 2), (3, 2)):
        blocks = {int(name.split(".")[1]) for name in state if name.startswith(f"layer{number}.")}
        stage = []
        for index in range(len(blocks)):
            made = state[f"layer{number}.{index}.conv1.weight"].shape[0]
            stage.append(Block(width, made, stride if index == 0 else 1, "conv", 0.0))
            width = made
        setattr(net, f"layer{number}", nn.Sequential(*stage))
    net.fc, net.num_features = nn.Linear(last, num_classes), last
    net.load_state_dict(state)
    height, side = case.arrays["images"].shape[2:]
    spec = InputSpec(img_size=(height, side), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Network(net, architecture=prefix, source="timm", input=spec, model_args={"num_classes": num_classes})


def _end_to_end(case: Case) -> Iterator[Comparison]:
    networks = {name: _network(case, name) for name in ("teacher", "student")}
    batch = Batch(case.tensor("images"), case.tensor("labels"), networks["student"].num_classes)
    for name, network in networks.items():
        found = run(initialised(network, batch, init="default"), batch)
        yield Comparison(f"{name}_feat", found.feature, case.arrays[f"{name}_feat"])
        yield Comparison(f"{name}_logits", found.logits, case.arrays[f"{name}_logits"])
        yield Comparison(f"{name}_fc_grad", found.grad, case.arrays[f"{name}_fc_grad"])
    scorer = make_scorer(
        "diswot",
        teacher=networks["teacher"],
        image=batch.image,
        target=batch.target,
        num_classes=batch.num_classes,
        seed=0,
    )
    result = scorer(networks["student"])
    for name, ours in (
        ("score_semantic", -result.parts["semantic"]),
        ("score_relation", -result.parts["relation"]),
        ("score", result.value),
    ):
        expected = case.arrays[name]
        yield Comparison(name, torch.tensor(ours).reshape(expected.shape), expected)


def _is(case: Case, function: str) -> bool:
    return case.produced_by.endswith(function) and case.has("student", "teacher", "loss")


CHECKS = [
    Check("DisWOT relation", lambda case: _is(case, "Similarity.similarity_loss"), _relation),
    Check("DisWOT semantics", lambda case: _is(case, "ICKDLoss.batch_loss"), _semantic),
    Check(
        "DisWOT relation as released",
        lambda case: "compute_diswot_procedure" in case.produced_by and case.has("student", "teacher", "loss"),
        _relation_of_a_sample,
    ),
    Check(
        "DisWOT KD",
        lambda case: "DistillKL" in case.produced_by and case.has("student_logits", "teacher_logits", "grad_student"),
        _kd,
    ),
    Check(
        "DisWOT score",
        lambda case: case.has("images", "labels", "score_semantic", "score_relation", "score"),
        _end_to_end,
    ),
]
