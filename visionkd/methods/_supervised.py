"""Supervised training: the base module without a teacher. Not a distillation method, hence the underscore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visionkd.methods._base import DistillationModule


@dataclass(frozen=True)
class SupervisedOptions:
    """None."""


class Supervised(DistillationModule):
    """Trains on the task's own loss."""

    needs: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type] = SupervisedOptions
