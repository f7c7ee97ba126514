"""LAD: label noising in both stages, the channel-wise distance, both objectives, and the two alternatives to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from _reference.base import Case, Check, Comparison
from visionkd.losses.cwd import channel_wise_loss
from visionkd.losses.dist import dist_loss
from visionkd.losses.lad import fixed_codes, label_channel, student_terms, teacher_terms, with_label
from visionkd.losses.pixel_kd import smoothed_pixel_kl_loss

#: Label of ignored pixels, and number of classes, in the authors' code, where a case leaves them out.
_IGNORE, _CLASSES = -1, 21


def _ignore(case: Case) -> int:
    return int(case.hyper.get("ignore_label", _IGNORE))


def _two_paths(case: Case) -> Iterator[Comparison]:
    image, hyper = case.tensor("image"), case.hyper
    for path in ("1", "2"):
        channel = label_channel(
            target=case.tensor("label"), codes=case.tensor(f"class_noise_{path}"),
            noise=case.tensor(f"pixel_noise_{path}"), sigma=float(hyper["pixel_sigma"]),
            gain=float(hyper["label_gain"]), ignore=_ignore(case),
        )  # fmt: skip
        yield Comparison(f"teacher_input_{path}", with_label(image, channel), case.arrays[f"teacher_input_{path}"])


def _student_time(case: Case) -> Iterator[Comparison]:
    image, hyper = case.tensor("image"), case.hyper
    channel = label_channel(
        target=case.tensor("label"), codes=fixed_codes(int(hyper.get("ignore_slot", _CLASSES))),
        noise=case.tensor("pixel_noise"), sigma=float(hyper["pixel_sigma"]), gain=float(hyper["label_gain"]),
        ignore=_ignore(case),
    )  # fmt: skip
    yield Comparison("teacher_input", with_label(image, channel), case.arrays["teacher_input"])
    yield Comparison("student_input", with_label(image, torch.zeros_like(channel)), case.arrays["student_input"])


def _zero_noise(case: Case) -> Iterator[Comparison]:
    codes = torch.zeros(int(case.hyper.get("ignore_slot", _CLASSES)) + 1)
    channel = label_channel(
        target=case.tensor("label"), codes=codes, noise=torch.zeros_like(case.tensor("image")[:, :1]),
        sigma=float(case.hyper.get("pixel_sigma", 1.0)), gain=float(case.hyper.get("label_gain", 100.0)),
        ignore=_ignore(case),
    )  # fmt: skip
    yield Comparison("teacher_input", with_label(case.tensor("image"), channel), case.arrays["teacher_input"])


def _distance(case: Case) -> Iterator[Comparison]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return channel_wise_loss(student_map=student, teacher_map=teacher, temperature=float(case.hyper["temperature"]))

    return compared(case, loss)


def _smoothed_kl(case: Case) -> Iterator[Comparison]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return smoothed_pixel_kl_loss(
            student_logits=student, teacher_logits=teacher, temperature=float(case.hyper["temperature"]),
            eps=float(case.hyper["eps"]),
        )  # fmt: skip

    return compared(case, loss)


def _dist(case: Case) -> Iterator[Comparison]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return dist_loss(
            student_logits=student, teacher_logits=teacher, inter_weight=float(case.hyper["beta"]),
            intra_weight=float(case.hyper["gamma"]), temperature=float(case.hyper.get("temperature", 1.0)),
        )  # fmt: skip

    return compared(case, loss)


def compared(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Comparison]:
    """Compare a loss of ``student`` and ``teacher`` in value and gradient; the teacher must get none."""
    student, teacher = case.tensor("student", requires_grad=True), case.tensor("teacher", requires_grad=True)
    value = loss(student, teacher)
    value.backward()
    yield Comparison("loss", value, case.arrays["loss"])
    yield Comparison("grad_student", student.grad, case.arrays["grad_student"])
    yield Comparison("the teacher has no gradient", teacher.grad is None, True)


def _teacher_objective(case: Case) -> Iterator[Comparison]:
    given = {name: case.tensor(name, requires_grad=True) for name in ("main1", "aux1", "main2", "aux2")}
    terms = teacher_terms(
        logits=(given["main1"], given["main2"]), aux=((given["aux1"],), (given["aux2"],)),
        target=case.tensor("label"), aux_weight=float(case.hyper["aux_weight"]),
        temperature=float(case.hyper["temperature"]), align_corners=True, ignore=_ignore(case),
    )  # fmt: skip
    total = terms["task_loss"] + float(case.hyper["consistency_weight"]) * terms["consistency_loss"]
    total.backward()
    yield Comparison("task_loss", terms["task_loss"], case.arrays["task_loss"])
    yield Comparison("consistency_loss", terms["consistency_loss"], case.arrays["consistency_loss"])
    yield Comparison("total", total, case.arrays["total"])
    for name, tensor in given.items():
        yield Comparison(f"grad_{name}", tensor.grad, case.arrays[f"grad_{name}"])


def _student_objective(case: Case) -> Iterator[Comparison]:
    given = {name: case.tensor(name, requires_grad=True) for name in ("main", "aux", "teacher")}
    terms = student_terms(
        student_logits=given["main"], student_aux=(given["aux"],), teacher_logits=given["teacher"],
        target=case.tensor("label"), aux_weight=float(case.hyper["aux_weight"]),
        temperature=float(case.hyper["temperature"]), align_corners=True, ignore=_ignore(case),
    )  # fmt: skip
    task = float(case.hyper.get("task_weight", 1.0)) * terms["task_loss"]
    total = task + float(case.hyper["kd_weight"]) * terms["distill_loss"]
    total.backward()
    yield Comparison("task_loss", terms["task_loss"], case.arrays["task_loss"])
    yield Comparison("kd_loss", terms["distill_loss"], case.arrays["kd_loss"])
    yield Comparison("total", total, case.arrays["total"])
    for name in ("main", "aux"):
        yield Comparison(f"grad_{name}", given[name].grad, case.arrays[f"grad_{name}"])
    yield Comparison("the teacher has no gradient", given["teacher"].grad is None, True)


def _trainer(case: Case) -> bool:
    return "train_baseline.py" in case.produced_by


def _without_noise(case: Case) -> bool:
    return _trainer(case) and case.has("image", "label", "teacher_input") and not case.has("pixel_noise")


def _pair(case: Case) -> bool:
    return _trainer(case) and case.has("student", "teacher", "loss", "grad_student")


CHECKS = [
    Check("LAD noising, two paths", lambda c: _trainer(c) and c.has("class_noise_1", "pixel_noise_2"), _two_paths),
    Check("LAD noising, fixed codes", lambda c: _trainer(c) and c.has("student_input", "pixel_noise"), _student_time),
    Check("LAD noising, none", _without_noise, _zero_noise),
    Check("LAD distance", lambda c: _pair(c) and "CriterionCWD" in c.produced_by, _distance),
    # one line of the vectors names both: their settings tell them apart
    Check("LAD per-pixel KL", lambda c: _pair(c) and {"temperature", "eps", "reduction"} <= set(c.hyper), _smoothed_kl),
    Check("DIST", lambda c: _pair(c) and {"beta", "gamma"} <= set(c.hyper), _dist),
    Check("LAD teacher", lambda c: _trainer(c) and c.has("main1", "main2", "consistency_loss"), _teacher_objective),
    Check("LAD student", lambda c: _trainer(c) and c.has("main", "teacher", "kd_loss"), _student_objective),
]
