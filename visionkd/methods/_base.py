"""The Lightning module behind every method, and behind supervised training; :mod:`._hooks` lists what they override."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from visionkd.config.schema import RunConfig
from visionkd.data.mixing import batch_mixer
from visionkd.errors import DataError
from visionkd.losses.distillation import average_probabilities
from visionkd.methods._dense import sized
from visionkd.methods._hooks import Hooks
from visionkd.methods._optimizer import Budget, build_optimizer, clips_scaled_gradients
from visionkd.methods._stored import StoredTeachers
from visionkd.methods._sums import RunningMeans
from visionkd.methods._teachers import FrozenTeachers
from visionkd.models.factory import Network
from visionkd.models.features import extract
from visionkd.tasks.base import Task
from visionkd.types import Output

_MEMORY_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


class DistillationModule(Hooks, lightning.LightningModule):
    """Student, optimiser, averaged weights and metrics; a method adds modules and named loss terms.

    The teachers are no submodules: they are frozen, always in eval mode, never in a checkpoint, and no wrapper (DDP,
    FSDP) sees them. All randomness of a step is drawn from a seed made of the run's seed, the step and the rank, so a
    resumed run continues as if it had not been stopped.

    Args:
        student: Network to train.
        teachers: Networks to learn from; none for supervised training.
        task: Supplies supervised loss and metrics.
        config: Settings of the run.
        options: The method's frozen options.
        budget: Length of the training.
    """

    def __init__(
        self,
        *,
        student: Network,
        teachers: Sequence[Network] = (),
        task: Task,
        config: RunConfig,
        options: Any = None,
        budget: Budget,
    ) -> None:
        super().__init__()
        self.memory_format = _MEMORY_FORMATS[config.training.channels_last]
        if student.packed is not None:
            student.quantization = student.packed = None  # weights that train do not keep to their levels
        self.student = student.to(memory_format=self.memory_format)
        self.task, self.config, self.options, self.budget = task, config, options, budget
        self.projectors = self.build_modules()
        decay = config.training.ema_decay
        self.ema = None
        if decay is not None:
            self.ema = AveragedModel(
                student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
            ).requires_grad_(False)
        given = [teacher.precision for teacher in getattr(config, "teachers", ())][: len(teachers)]
        self.frozen = FrozenTeachers(
            [self.prepare_teacher(teacher) for teacher in teachers],
            precisions=[precision or config.training.precision for precision in given],
            memory_format=self.memory_format,
            compiled=config.training.compile,
            stages=tuple(self.teacher_stages()),
        )
        stages = tuple(self.student_stages())
        forward: Callable[[Tensor], Output] = partial(extract, student, indices=stages) if stages else student
        # past nn.Module.__setattr__, which would register the student a second time
        self.__dict__["_student_forward"] = torch.compile(forward) if config.training.compile else forward
        self._mixer = batch_mixer(config.augment, num_classes=student.num_classes)
        self._train_means = RunningMeans()
        #: Stands for the teachers where their answers are kept on disk.
        self.stored: StoredTeachers | None = None
        self._val_metrics = task.metrics()
        self._val_loss: list[Tensor] = []
        #: Epoch and batch to go on from, as of the last checkpoint written, and as of the one that was loaded.
        self.position = self.resume_position = (0, 0)
        #: Told the epoch and batch that a loaded checkpoint goes on from, before any batch is drawn.
        self.on_position: Callable[[int, int], object] | None = None
        self.epoch_metrics: dict[str, float] = {}
        #: Indices of images of the current batch that could not be read (and were replaced), -1 elsewhere.
        self.unreadable: Tensor | None = None

    # A step -----------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = dict(batch)
        self.unreadable = batch.pop("unreadable", None)  # stays on the CPU, where reading it costs nothing
        return self.stored.look_up(batch) if self.stored is not None and self.training else batch

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        if device.type == "cpu":
            return batch
        keys = batch.pop("stored_keys", None)  # tells the CPU what is missing
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), "stored_keys": keys}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        image = batch["image"]
        if image.dtype == torch.uint8:
            image = image.to(torch.float32, memory_format=self.memory_format).div_(255.0)
        return {**batch, "image": image}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._seed_step(batch_idx)
        return self.total(self.loss_terms(*self.mixed(batch)))

    def mixed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return images, targets and stored probabilities of a batch, mixed where mixup or CutMix is on."""
        image, target, probs = batch["image"], batch["target"], None
        if self.stored is not None:
            probs = self.stored.probabilities(batch, lambda: self.label_to_store(image))
        if self._mixer is None:
            return image, target, probs
        return self._mixer(image, target, probs)

    def loss_terms(self, image: Tensor, target: Tensor, teacher_probs: Tensor | None = None) -> dict[str, Tensor]:
        """Run the networks and return all terms, unweighted.

        Args:
            image: B x 3 x H x W in [0, 1].
            target: Class indices, B, or probabilities, B x C.
            teacher_probs: B x C, where a store stands for the teachers.
        """
        teachers = self.teacher_outputs(image) if teacher_probs is None else (Output(probs=teacher_probs),)
        student = self.student_output(image, target) if self.student.needs_targets else self.student_output(image)
        terms: dict[str, Tensor] = {}
        if self.loss_weights()["task_loss"]:
            terms["task_loss"] = self.task.loss(student, target)
        if teachers:
            terms.update(self.distill_loss(student=student, teachers=teachers, target=target))
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms, and count all of them for the logs."""
        weights = self.loss_weights()
        loss = torch.stack([term * weights[name] for name, term in terms.items()]).sum()
        self._train_means.add({"loss": loss, **terms})
        return loss

    def student_output(self, image: Tensor, target: Any = None) -> Output:
        """Run the student on images in [0, 1], B x 3 x H x W; one that computes its own losses is shown the target."""
        return self._student_forward(image) if target is None else self._student_forward(image, target=target)

    def teacher_outputs(self, image: Tensor) -> tuple[Output, ...]:
        """Run every teacher on images in [0, 1], B x 3 x H x W, without gradient and in its own precision."""
        with torch.no_grad():
            return self.frozen.run(image)

    @property
    def teachers(self) -> tuple[Network, ...]:
        """The networks to learn from."""
        return self.frozen.networks

    def soft_label(self, teachers: tuple[Output, ...]) -> Tensor:
        """Return the teachers' probabilities, averaged: B x C in float32, without gradient."""
        if teachers[0].probs is not None:
            return teachers[0].probs
        return average_probabilities([t.logits for t in teachers], temperature=self.teacher_temperature)

    def label_to_store(self, image: Tensor) -> Tensor:
        """Return what a label store keeps of images in [0, 1]: their :meth:`soft_label`, maps at the store's size."""
        assert self.stored is not None
        outputs, grid = self.teacher_outputs(image), self.stored.grid
        if grid is not None:
            outputs = tuple(replace(each, logits=sized(each.logits, grid[1:])) for each in outputs)
        return self.soft_label(outputs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def _seed_step(self, batch_idx: int) -> None:
        # a tuple of integers has the same hash in every process; torch.manual_seed would cost a millisecond
        step = self.current_epoch * self.budget.steps_per_epoch * self.config.training.accumulate + batch_idx
        seed = hash((self.config.training.seed, step, self.global_rank)) & (2**63 - 1)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    # Evaluation -------------------------------------------------------------------------------------------------------

    @property
    def deployed_student(self) -> Network:
        """The network that is evaluated and packaged: the averaged one where there is one."""
        return self.student if self.ema is None else self.ema.module

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch["image"].shape[0] == 0:
            return
        output = self.task.answer(self.deployed_student, batch["image"])
        self.task.update(self._val_metrics, output, batch["target"])
        count = batch["image"].shape[0]
        # a detector has no losses in eval mode
        loss = batch["image"].new_tensor(torch.nan) if output.boxes else self.task.loss(output, batch["target"])
        self._val_loss.append(torch.stack([loss * count, loss.new_tensor(float(count))]))

    def on_validation_epoch_end(self) -> None:
        # a rank whose share is empty or unreadable has nothing to add
        own = torch.stack(self._val_loss).sum(0) if self._val_loss else torch.zeros(2, device=self.device)
        totals = self.all_gather(own).view(-1, 2).sum(0)
        if not totals[1]:
            raise DataError("No validation image can be read.", hint="List them with 'visionkd data check DATA'.")
        found = {f"val/{name}": 100.0 * float(value) for name, value in self._val_metrics.compute().items()}
        if not self.student.needs_targets:
            found["val/loss"] = float(totals[0] / totals[1])
        self._val_metrics.reset()
        self._val_loss.clear()
        self.epoch_metrics.update(found)
        self.log_dict(found, rank_zero_only=True)

    def take_train_metrics(self) -> dict[str, float]:
        """Return the means of the training metrics since the last call and start again; this waits for the device."""
        return self._train_means.take(self.all_gather)

    # Optimiser --------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        return build_optimizer(
            self.student.net,
            self.projectors,
            config=self.config,
            budget=self.budget,
            projector_lr_ratio=self.projector_lr_ratio,
        )

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if gradient_clip_val is None:
            return
        if clips_scaled_gradients(self.config) or self.config.compute.strategy == "fsdp":  # FSDP has norms of its own
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:  # Lightning refuses fused optimisers under any autocast
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    # Devices and checkpoints ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = self.position

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.position = self.resume_position = tuple(checkpoint["position"])
        if self.on_position is not None:
            self.on_position(*self.position)
