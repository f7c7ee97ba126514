"""``distill --int8``: the distilled student is calibrated, trains on with its quantisers on, and is exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from visionkd.config.schema import DistillConfig
from visionkd.errors import Problem, RequestError
from visionkd.hub.package import save_package
from visionkd.methods._supervised import Supervised
from visionkd.methods.kd import KD, KDOptions
from visionkd.models.network import Network
from visionkd.tasks.make import task_of
from visionkd.types import DataSet, Listener, TaskName
from visionkd.workflows._int8 import calibrate_once, fit_int8
from visionkd.workflows._labels import labels_for
from visionkd.workflows._networks import load_network
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._stages import FLOAT, Stages
from visionkd.workflows._training import budget_text

_EPOCHS_SHARE = 0.1
#: Of the last learning rate to the first, in the training with quantisers on.
_MIN_LR_RATIO = 0.01


class Int8Tail:
    """What follows the training where the student is to compute in INT8.

    The teacher teaches by ``kd``, whatever the method before it was: a quantised network gives logits only. A
    detector learns from its boxes.

    Args:
        config: Settings of the run, resolved.
        img_size: Size of the views.
        uses_labels: Whether the method before it looked at labels.
        task: Task of the run.
    """

    def __init__(
        self, config: DistillConfig, *, img_size: tuple[int, int], uses_labels: bool, task: TaskName = "classification"
    ) -> None:
        self.int8, self.img_size = config.int8, img_size
        own = config.options if config.method == "kd" and not config.losses else {}
        self.options = KDOptions(**{**KD.task_defaults.get(task, {}), **own})
        if not uses_labels:
            self.options = replace(self.options, task_loss_weight=0.0, distill_loss_weight=1.0)
        self.config = self._settings(config)

    def _settings(self, config: DistillConfig) -> DistillConfig:
        changed = config.model_copy(deep=True)
        epochs = self.int8.epochs
        changed.training.epochs = epochs or max(1, round(_EPOCHS_SHARE * config.training.epochs))
        assert changed.optimizer.lr is not None
        changed.optimizer.lr *= self.int8.lr_ratio
        changed.schedule.warmup_epochs, changed.schedule.min_lr_ratio = 0.0, _MIN_LR_RATIO
        changed.augment.learned = None
        if config.method != "kd" or config.losses:
            changed.label_store.mode = "off"  # its labels are of another temperature, and would be looked up once each
        return changed

    @property
    def stages(self) -> list[str]:
        """Names of the stages before the student is packaged."""
        return ["calibrate"] if self.int8.epochs == 0 else ["calibrate", "qat"]

    def run(
        self,
        student: Network,
        *,
        teachers: Sequence[Network],
        data: DataSet,
        run: RunDirectory,
        listener: Listener,
        stages: Stages,
    ) -> tuple[Network, Network]:
        """Return the student in INT8, and in float as it was; the latter is packaged in ``float/`` of the run."""
        kept = run.path / FLOAT
        if run.writes and not kept.is_dir():
            save_package(student.cpu(), kept, task=data.task, classes=data.classes, metrics={}, origin={})
        run.wait_for_path(kept)
        plain = load_network(str(kept))
        # of a method whose teacher is shown the labels
        if not teachers and self.int8.epochs != 0 and data.task != "detection":
            listener.message("The float student teaches its INT8 form: the teacher of the method is shown the labels")
            teachers = [load_network(str(kept))]
        network = calibrate_once(
            plain, self.int8, data=data, config=self.config, run=run, listener=listener, stages=stages
        )
        if self.int8.epochs != 0:
            network = self._train(network, teachers, data=data, run=run, listener=listener, stages=stages)
        return network, plain

    def _train(
        self,
        network: Network,
        teachers: Sequence[Network],
        *,
        data: DataSet,
        run: RunDirectory,
        listener: Listener,
        stages: Stages,
    ) -> Network:
        config = self.config
        with stages.stage("qat", f"Train {network.architecture} with its quantisers on") as todo:
            if not todo and run.model.is_dir():
                return load_network(str(run.model))
            network = network.train().requires_grad_(True)
            settings: dict[str, Any] = {
                "student": network, "int8": self.int8, "data": data, "config": config, "img_size": self.img_size,
                "run": run, "stage": "qat", "listener": listener,
            }  # fmt: skip
            if network.task == "detection":  # the answers of a detector are boxes, which kd says nothing about
                listener.message(f"Quantisation-aware training on the boxes: {budget_text(config, data)}")
                alone = partial(Supervised, student=network, task=task_of(data, config), config=config)
                return fit_int8(lambda budget: alone(budget=budget), **settings)
            listener.message(f"Quantisation-aware training by kd: {budget_text(config, data)}")
            labels = labels_for(
                config, data=data, teachers=teachers, temperature=KD.label_temperature(self.options),
                img_size=self.img_size, student=network, listener=listener,
            )  # fmt: skip
            build = partial(
                KD, student=network, teachers=teachers, config=config, options=self.options,
                task=task_of(data, config),
            )  # fmt: skip
            return fit_int8(
                lambda budget: build(budget=budget), labels=labels, views=config.label_store, **settings
            )  # fmt: skip


def check_int8(config: DistillConfig, student: Network) -> None:
    """Refuse what does not go with INT8, before anything is trained.

    Raises:
        RequestError: If the method or the student is quantised otherwise.
    """
    if config.method == "quantized" or "quantized" in config.losses:
        raise RequestError(
            Problem("--int8", "does not go with --method quantized, which quantises weights alone", "Leave one out.")
        )
    if student.quantization is not None:
        raise RequestError(
            Problem(
                "--int8", "the student is quantised already", "Train it on with: visionkd quantize MODEL --epochs N"
            )
        )
