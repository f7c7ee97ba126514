"""Whose turn it is in the game between student and augmentor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from visionkd.config.schema import HardAugmentConfig

READ_EVERY = 5  # optimiser steps between two looks at the agreement, each of which waits for the device
_SETTLE = 10  # steps of a turn before the first look: the running average should be about this turn


class Turns:
    """Turns with hysteresis: the student's ends above ``upper``, the augmentor's below ``lower`` or at its cap.

    Everything is counted in optimiser steps and decided from numbers that all ranks share, so all of them agree. The
    augmentor has no turn in the warm-up and in the cool-down, and no new one while it has had more than its share of
    the steps.

    Args:
        config: Thresholds, cap, shares.
        total: Optimiser steps of the training.
    """

    def __init__(self, config: HardAugmentConfig, total: int) -> None:
        self.config = config
        self.total = total
        self.first, self.last = math.ceil(config.warmup * total), math.floor((1.0 - config.cooldown) * total)
        self.step = 0
        self.augmentor = False
        self.in_turn = 0
        self.augmentor_steps = 0
        #: Held back by something else than the warm-up, such as an autoencoder that is not trained yet.
        self.waiting = False
        #: Turns that ended: whose it was, its last step, and the share of the clean agreement at its end.
        self.ended: list[tuple[str, int, float]] = []

    @property
    def augments(self) -> bool:
        """Whether the student sees augmented images."""
        return not self.waiting and self.step >= self.first

    def after_step(self, read: Callable[[], tuple[float, float]]) -> None:
        """Count an optimiser step, and change turns where it is time.

        Args:
            read: Gives the running averages of the agreement on augmented and on clean images; called now and then.
        """
        counted = self.augments
        self.step += 1
        if not counted:
            return
        self.in_turn += 1
        self.augmentor_steps += self.augmentor
        capped = self.augmentor and (self.in_turn >= self.config.max_steps or self.step >= self.last)
        if not capped and (self.in_turn < _SETTLE or self.in_turn % READ_EVERY):
            return
        if not self.augmentor and not self._may_begin():
            return
        augmented, clean = read()
        share = augmented / max(clean, 1e-6)
        ends = share <= self.config.lower if self.augmentor else share >= self.config.upper
        if ends or capped:
            self.ended.append(("augmentor" if self.augmentor else "student", self.step, round(share, 4)))
            self.augmentor = not self.augmentor
            self.in_turn = 0

    def _may_begin(self) -> bool:
        """Whether the augmentor may have a turn; one that has begun is not cut short for its share."""
        return self.step < self.last and self.augmentor_steps < self.config.max_step_share * (self.step - self.first)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "augmentor": self.augmentor,
            "in_turn": self.in_turn,
            "augmentor_steps": self.augmentor_steps,
            "waiting": self.waiting,
            "ended": [list(turn) for turn in self.ended],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("step", "augmentor", "in_turn", "augmentor_steps", "waiting"):
            setattr(self, name, state[name])
        self.ended = [tuple(turn) for turn in state["ended"]]
