"""OFA-KD: the loss of one exit, the exits themselves, and the loss of a whole step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from _reference.base import Case, Check, Comparison
from visionkd.losses.distillation import average_probabilities
from visionkd.losses.ofa import ofa_loss
from visionkd.methods.ofa_kd import make_exit, ofa_terms
from visionkd.models.features import Stage
from visionkd.models.projectors import MapExit
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import Output


def _exponents(case: Case, count: int) -> list[float]:
    given = case.hyper["eps"]
    values = [float(value) for value in given] if isinstance(given, (list, tuple)) else [float(given)]
    return values * count if len(values) == 1 else values


def _label(case: Case) -> Tensor:
    return next(case.tensor(name) for name in ("label", "soft_label", "target_mask") if case.has(name))


def _loss(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student_logits", requires_grad=True)
    temperature = float(case.hyper.get("temperature", 1.0))
    loss = ofa_loss(
        student_logits=student,
        teacher_probs=average_probabilities([case.tensor("teacher_logits")], temperature=temperature),
        target=_label(case),
        exponent=_exponents(case, 1)[0],
        temperature=temperature,
    )
    loss.backward()
    # where the authors' expression has no number, the files hold the stable value beside it
    stable = "loss" not in case.arrays
    names = ("stable_loss_f64", "stable_grad_student_logits_f64") if stable else ("loss", "grad_student_logits")
    yield Comparison(names[0], loss, case.arrays[names[0]])
    yield Comparison(names[1], student.grad, case.arrays[names[1]])


def _exit(
    shape: tuple[int, ...],
    *,
    number: int,
    student_width: int,
    teacher_width: int,
    num_classes: int,
    prefix: int,
    parameters: Mapping[str, Tensor],
) -> nn.Module:
    """Return our exit for features of the given shape (channels, height, width; or tokens, channels)."""
    is_map = len(shape) == 3
    side = 0 if is_map else math.isqrt(shape[0] - prefix)
    stage = Stage(
        index=number - 1,
        name="feature",
        channels=shape[0] if is_map else shape[1],
        stride=1,
        grid=(shape[1], shape[2]) if is_map else (side, side),
        layout="map" if is_map else "tokens",
    )
    made = make_exit(
        stage,
        number=number,
        student_width=student_width,
        teacher_width=teacher_width,
        num_classes=num_classes,
        class_token=prefix > 0,
    )
    missing, unexpected = made.load_state_dict(_renamed(made, parameters), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), (missing, unexpected)
    return made


def _renamed(made: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the authors' parameters our names: theirs are places in a sequence, and the last one is the classifier."""
    last = max(int(name.partition(".")[0]) for name in parameters)
    renamed = {}
    for name, value in parameters.items():
        place, _, rest = name.partition(".")
        if int(place) == last:
            ours = f"head.{rest}"
        elif isinstance(made, MapExit):
            ours = f"blocks.{place}.{rest.removeprefix('op.')}"
        elif rest.startswith("fn."):
            ours = f"merging.{rest.removeprefix('fn.')}"
        else:
            ours = f"blocks.{rest}"
        renamed[ours] = value
    return renamed


def _run(made: nn.Module, feature: Tensor, prefix: int) -> Tensor:
    if feature.ndim == 4:
        return made(feature)
    side = math.isqrt(feature.shape[1] - prefix)
    grid = feature[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return made(grid, prefix_tokens=feature[:, :prefix] if prefix else None)


def _projector(case: Case) -> Iterator[Comparison]:
    hyper = case.hyper
    prefix = int(hyper.get("student_num_tokens", 0))
    made = _exit(
        tuple(case.arrays["feature"].shape[1:]),
        number=int(hyper["stage"]),
        student_width=int(hyper["student_feature_dim"]),
        teacher_width=int(hyper["teacher_feature_dim"]),
        num_classes=int(hyper["classes"]),
        prefix=prefix,
        parameters=case.tensors("param:"),
    )
    with torch.no_grad():
        yield Comparison("logits_eval", _run(made.eval(), case.tensor("feature"), prefix), case.arrays["logits_eval"])
    feature = case.tensor("feature", requires_grad=True)
    logits = _run(made.train(), feature, prefix)
    weights = torch.arange(1, logits.numel() + 1, dtype=logits.dtype) / logits.numel()
    (weights * logits.flatten()).sum().backward()
    yield Comparison("logits_train", logits, case.arrays["logits_train"])
    yield Comparison("grad_feature_train", feature.grad, case.arrays["grad_feature_train"])


def _step(case: Case) -> Iterator[Comparison]:
    hyper = case.hyper
    stages = [int(number) for number in hyper["stages"]]
    indices = {int(number): int(index) for number, index in hyper["feature_index_of_stage"].items()}
    student = case.tensor("student_logits", requires_grad=True)
    features = {
        number: case.tensor(f"feature_{indices[number]}", requires_grad=True) for number in stages if number in indices
    }
    prefix = int(hyper.get("student_num_tokens", 0))
    exits = []
    for number in stages:
        made = _exit(
            tuple(features[number].shape[1:]),
            number=number,
            student_width=int(hyper["student_feature_dim"]),
            teacher_width=int(hyper["teacher_feature_dim"]),
            num_classes=student.shape[1],
            prefix=prefix,
            parameters=case.tensors(f"param:{number}."),
        )
        exits.append(_run(made.train(), features[number], prefix))
    temperature, label = float(hyper.get("temperature", 1.0)), case.tensor("label")
    kd_loss, exit_losses = ofa_terms(
        student_logits=student,
        student_exits=exits,
        teacher_probs=average_probabilities([case.tensor("teacher_logits")], temperature=temperature),
        target=label,
        exponents=_exponents(case, len(stages) + 1),
        temperature=temperature,
    )
    smoothing = float(hyper.get("label_smoothing", 0.0))
    task_loss = ClassificationTask(num_classes=student.shape[1], label_smoothing=smoothing).loss(Output(student), label)
    weighted = {
        "loss_gt": hyper["gt_loss_weight"] * task_loss,
        "loss_kd": hyper["kd_loss_weight"] * kd_loss,
        "loss_ofa": hyper["ofa_loss_weight"] * sum(exit_losses, torch.zeros(())),
    }
    weighted["loss_total"] = sum(weighted.values(), torch.zeros(()))
    weighted["loss_total"].backward()
    for name, value in weighted.items():
        yield Comparison(name, value, case.arrays[name])
    yield Comparison("grad_student_logits", student.grad, case.arrays["grad_student_logits"])
    for number, feature in features.items():
        name = f"grad_feature_{indices[number]}"
        if case.has(name):
            yield Comparison(name, feature.grad, case.arrays[name])


def _is_loss(case: Case) -> bool:
    found = case.has("loss", "grad_student_logits") or case.has("stable_loss_f64", "stable_grad_student_logits_f64")
    return found and "eps" in case.hyper and case.has("student_logits", "teacher_logits", "target_mask")


def _is_exit(case: Case) -> bool:
    return case.has("feature", "logits_eval", "grad_feature_train") and "student_feature_dim" in case.hyper


CHECKS = [
    Check("OFA-KD loss", _is_loss, _loss),
    Check("OFA-KD exit", _is_exit, _projector),
    Check("OFA-KD step", lambda case: case.has("loss_ofa", "loss_kd", "loss_gt"), _step),
]
