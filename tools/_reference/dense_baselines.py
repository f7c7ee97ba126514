"""The dense baselines: CWD, per-pixel distillation in three reductions, pair-wise distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from torch import Tensor

from _reference.base import Case, Check, Comparison
from _reference.lad import compared
from visionkd.losses.cwd import channel_wise_loss
from visionkd.losses.pairwise import pairwise_loss
from visionkd.losses.pixel_kd import Reduction, pixel_kd_loss

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def _channel(case: Case) -> Iterator[Comparison]:
    temperature = float(case.hyper["temperature"])
    return compared(case, lambda s, t: channel_wise_loss(student_map=s, teacher_map=t, temperature=temperature))


def _pixel_loss(case: Case, reduction: Reduction) -> Callable[[Tensor, Tensor], Tensor]:
    temperature = float(case.hyper["temperature"])
    return lambda s, t: pixel_kd_loss(student_logits=s, teacher_logits=t, temperature=temperature, reduction=reduction)


def _over_classes(case: Case) -> Iterator[Comparison]:
    # normalised over classes at every pixel, CWD is the batch mean of the per-pixel divergence
    return compared(case, _pixel_loss(case, "kl_batchmean"))


def _pixel(case: Case) -> Iterator[Comparison]:
    """One line of the vectors names all authors and the settings are the same: the case's name says which it is.

    Where it does not, the case is that reduction whose value it has; its gradient then still has to agree.
    """
    named = [name for name in REDUCTIONS if case.id.startswith(name)]
    if not named:
        found = {
            name: float(_pixel_loss(case, name)(case.tensor("student"), case.tensor("teacher"))) for name in REDUCTIONS
        }
        named = sorted(REDUCTIONS, key=lambda name: abs(found[name] - float(case.arrays["loss"])))
    return compared(case, _pixel_loss(case, named[0]))


def _pairwise(case: Case) -> Iterator[Comparison]:
    scale = float(case.hyper["scale"])
    return compared(case, lambda s, t: pairwise_loss(student_map=s, teacher_map=t, scale=scale))


def _norm(kind: str) -> Callable[[Case], bool]:
    return lambda case: "CriterionCWD" in case.produced_by and case.hyper.get("norm_type") == kind


def _kd_file(case: Case) -> bool:
    return "CriterionPixelWise" in case.produced_by and case.has("student", "teacher", "loss", "grad_student")


CHECKS = [
    Check("CWD", _norm("channel"), _channel),
    Check("CWD, normalised over classes", _norm("spatial"), _over_classes),
    Check("per-pixel distillation", lambda c: _kd_file(c) and "scale" not in c.hyper, _pixel),
    Check("pair-wise distillation", lambda c: _kd_file(c) and "scale" in c.hyper, _pairwise),
]
