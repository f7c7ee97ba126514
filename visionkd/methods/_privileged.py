"""The teacher of LAD in its own training: two recodings of the labels a step, and what it does with wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionkd.losses.lad import fixed_codes, label_channel, teacher_terms, with_label
from visionkd.methods._base import DistillationModule
from visionkd.methods._dense import stacked_labels
from visionkd.types import IGNORE


class PrivilegedTeacher(DistillationModule):
    """Trains a network on images with a label channel (:mod:`visionkd.models.label_input`), by the labels.

    Its validation shows it the labels too, in the numbers that it sees while it teaches, and its figures are privileged
    ones. The last one says what they rest on: ``miou_other_label`` is measured with another image's labels, and
    ``miou_no_label`` with a channel that is the same everywhere. A teacher that is right with its labels and lost
    without them only copies, and has nothing to teach.
    """

    tasks: ClassVar[frozenset[str]] = frozenset({"segmentation"})
    needs: ClassVar[frozenset[str]] = frozenset()
    options: Any

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._diagnostics = nn.ModuleDict({name: self.task.metrics() for name in ("other_label", "no_label")})
        self._last: Tensor | None = None

    def loss_terms(self, image: Tensor, target: Tensor, teacher_probs: Tensor | None = None) -> dict[str, Tensor]:
        first, second = (self.student_output(with_label(image, self.recoded(target))) for _ in range(2))
        assert first.logits is not None and second.logits is not None
        terms = teacher_terms(
            logits=(first.logits, second.logits), aux=(first.aux, second.aux), target=target,
            aux_weight=self.options.teacher_aux_weight, temperature=self.options.temperature,
        )  # fmt: skip
        return dict(terms)

    def recoded(self, target: Tensor) -> Tensor:
        """Return a label channel of new random numbers, B x 1 x H x W, for labels B x H x W."""
        codes = torch.randn(len(target), self.student.num_classes + 1, device=target.device)
        noise = torch.randn(len(target), 1, *target.shape[1:], device=target.device)
        return label_channel(
            target=target, codes=self.options.class_sigma * codes, noise=noise, sigma=self.options.teacher_sigma,
            gain=self.options.gain,
        )  # fmt: skip

    def loss_weights(self) -> Mapping[str, float]:
        return {"task_loss": 1.0, "consistency_loss": self.options.consistency_weight}

    # Evaluation -------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        if not len(image):
            return
        labels = stacked_labels(batch["target"], image.shape[2:])
        channel = self._fixed(labels)
        super().validation_step({**batch, "image": with_label(image, channel)}, batch_idx)
        if self.current_epoch + 1 < self.budget.epochs:
            return
        # each image gets the labels of the one before it; the first one of all gets those of its batch's last
        last = channel[-1:] if self._last is None else self._last
        shown = {
            "other_label": torch.cat([last, channel[:-1]]),
            "no_label": self._fixed(torch.full_like(labels, IGNORE)),
        }
        self._last = channel[-1:]
        for name, wrong in shown.items():
            output = self.deployed_student(with_label(image, wrong))
            self.task.update(self._diagnostics[name], output, batch["target"])

    def _fixed(self, labels: Tensor) -> Tensor:
        codes = fixed_codes(self.student.num_classes).to(labels.device)
        return label_channel(target=labels, codes=codes, gain=self.options.gain)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._last = None
        if self.current_epoch + 1 < self.budget.epochs:
            return
        main, found = self.task.main_metric, {}
        for name, metrics in self._diagnostics.items():
            found[f"val/{main}_{name}"] = 100.0 * float(metrics.compute()[main])
            metrics.reset()
        self.epoch_metrics.update(found)
        self.log_dict(found, rank_zero_only=True)
