"""FGD: the four terms of one pyramid level, their weighted sum and the gradient of the student's features."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from _reference.base import Case, Check, Comparison
from visionkd.losses.fgd import context_loss, fgd_terms
from visionkd.models.context import ContextBlock


def _block(case: Case, role: str) -> ContextBlock:
    given = case.tensors("param:")
    block = ContextBlock(case.arrays["teacher"].shape[1])
    parts = {
        "pick": f"conv_mask_{role}",
        "reduce": f"channel_add_conv_{role}.0",
        "norm": f"channel_add_conv_{role}.1",
        "expand": f"channel_add_conv_{role}.3",
    }
    named = {f"{own}.{n}": given[f"{theirs}.{n}"] for own, theirs in parts.items() for n in ("weight", "bias")}
    block.load_state_dict(named)
    return block


def _fgd(case: Case) -> Iterator[Comparison]:
    hyper = case.hyper
    student, teacher, boxes = case.tensor("student", requires_grad=True), case.tensor("teacher"), case.tensor("boxes")
    aligned, given = student, case.tensors("param:align.")
    if given:  # another number of channels than the teacher's
        aligned = F.conv2d(student, given["weight"], given.get("bias"))
    terms = fgd_terms(
        student_map=aligned, teacher_map=teacher, boxes=[boxes[boxes[:, 0] == i, 1:] for i in range(len(student))],
        image_size=(int(hyper["img_h"]), int(hyper["img_w"])), temperature=float(hyper["temp"]),
    )  # fmt: skip
    relation = context_loss(
        student_context=_block(case, "s")(aligned), teacher_context=_block(case, "t")(teacher.detach())
    )
    loss = (
        hyper["alpha_fgd"] * terms.foreground
        + hyper["beta_fgd"] * terms.background
        + hyper["gamma_fgd"] * terms.attention
        + hyper["lambda_fgd"] * relation
    )
    loss.backward()
    named = {"fg": terms.foreground, "bg": terms.background, "mask": terms.attention, "relation": relation}
    for name, value in {**named, "loss": loss}.items():
        yield Comparison(name, value, case.arrays[name])
    yield Comparison("grad_student", student.grad, case.arrays["grad_student"])


CHECKS = [Check("FGD level", lambda case: case.has("fg", "bg", "relation", "boxes"), _fgd)]
