"""The Lightning module behind every method, and behind supervised training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from visionkd.config.schema import RunConfig
from visionkd.data.mixing import batch_mixer
from visionkd.errors import DataError
from visionkd.methods._optimizer import Budget, build_optimizer, clips_scaled_gradients
from visionkd.models.factory import Network
from visionkd.models.fold import fold_batch_norm
from visionkd.tasks.base import Task
from visionkd.types import Output

_MEMORY_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


class DistillationModule(lightning.LightningModule):
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

    #: Tasks that the method supports.
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    #: What it needs of each teacher: ``probabilities``, ``features``, ``gradients``.
    needs: ClassVar[frozenset[str]] = frozenset({"probabilities"})
    #: Its frozen options dataclass.
    Options: ClassVar[type]

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
        self.student = student.to(memory_format=self.memory_format)
        self.task, self.config, self.options, self.budget = task, config, options, budget
        self.projectors = self.build_modules()
        decay = config.training.ema_decay
        self.ema = None
        if decay is not None:
            self.ema = AveragedModel(
                student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
            ).requires_grad_(False)
        teachers = [fold_batch_norm(teacher.eval()) for teacher in teachers]
        for teacher in teachers:
            teacher.requires_grad_(False).eval().to(memory_format=self.memory_format)
        hidden = self.__dict__  # past nn.Module.__setattr__, which would register them as submodules
        hidden["teachers"] = tuple(teachers)
        given = [teacher.precision for teacher in getattr(config, "teachers", ())][: len(teachers)]
        hidden["teacher_precisions"] = tuple(precision or config.training.precision for precision in given)
        hidden["_student_forward"] = torch.compile(student) if config.training.compile else student
        hidden["_teacher_forwards"] = [torch.compile(t) if config.training.compile else t for t in teachers]
        self._mixer = batch_mixer(config.augment, num_classes=student.num_classes)
        self._train_sums: dict[str, Tensor] = {}
        self._train_count = 0
        self._val_metrics = task.metrics()
        self._val_loss: list[Tensor] = []
        #: Epoch and batch to go on from, as of the last checkpoint written, and as of the one that was loaded.
        self.position = self.resume_position = (0, 0)
        #: Told the epoch and batch that a loaded checkpoint goes on from, before any batch is drawn.
        self.on_position: Callable[[int, int], object] | None = None
        self.epoch_metrics: dict[str, float] = {}
        #: Indices of images of the current batch that could not be read (and were replaced), -1 elsewhere.
        self.unreadable: Tensor | None = None

    # What a method overrides ------------------------------------------------------------------------------------------

    def build_modules(self) -> nn.Module:
        """Return what trains beside the student and is dropped at the end; empty by default."""
        return nn.ModuleDict()

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        """Return named, unweighted scalars; their names appear in the logs as ``train/<name>``."""
        raise NotImplementedError

    def loss_weights(self) -> Mapping[str, float]:
        """Return the weight of each term of :meth:`distill_loss`, and of ``task_loss``."""
        return {"task_loss": 1.0}

    # A step -----------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = dict(batch)
        self.unreadable = batch.pop("unreadable", None)  # stays on the CPU, where reading it costs nothing
        return batch

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        image = batch["image"]
        if image.dtype == torch.uint8:
            image = image.to(torch.float32, memory_format=self.memory_format).div_(255.0)
        return {**batch, "image": image}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._seed_step(batch_idx)
        image, target = batch["image"], batch["target"]
        if self._mixer is not None:
            image, target = self._mixer(image, target)
        teachers = self.teacher_outputs(image)
        student = self._student_forward(image)
        weights = self.loss_weights()
        terms: dict[str, Tensor] = {}
        if weights["task_loss"]:
            terms["task_loss"] = self.task.loss(student, target)
        if teachers:
            terms.update(self.distill_loss(student=student, teachers=teachers, target=target))
        loss = torch.stack([term * weights[name] for name, term in terms.items()]).sum()
        self._count({"loss": loss, **terms})
        return loss

    def teacher_outputs(self, image: Tensor) -> tuple[Output, ...]:
        """Run every teacher on images in [0, 1], B x 3 x H x W, without gradient and in its own precision."""
        outputs = []
        for forward, precision in zip(self._teacher_forwards, self.teacher_precisions, strict=True):
            dtype = _AUTOCAST_DTYPES.get(precision)
            autocast = torch.autocast(image.device.type, dtype=dtype, enabled=dtype is not None)
            with torch.no_grad(), autocast:
                outputs.append(forward(image))
        return tuple(outputs)

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
        output = self.deployed_student(batch["image"])
        self._val_metrics.update(self.task.predictions(output), batch["target"])
        count = batch["image"].shape[0]
        loss = self.task.loss(output, batch["target"])
        self._val_loss.append(torch.stack([loss * count, loss.new_tensor(float(count))]))

    def on_validation_epoch_end(self) -> None:
        # a rank whose share is empty or unreadable has nothing to add
        own = torch.stack(self._val_loss).sum(0) if self._val_loss else torch.zeros(2, device=self.device)
        totals = self.all_gather(own).view(-1, 2).sum(0)
        if not totals[1]:
            raise DataError("No validation image can be read.", hint="List them with 'visionkd data check DATA'.")
        found = {f"val/{name}": 100.0 * float(value) for name, value in self._val_metrics.compute().items()}
        found["val/loss"] = float(totals[0] / totals[1])
        self._val_metrics.reset()
        self._val_loss.clear()
        self.epoch_metrics.update(found)
        self.log_dict(found, rank_zero_only=True)

    # Metrics of training: summed on the device, read once in a while --------------------------------------------------

    def _count(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach()
            self._train_sums[name] = self._train_sums[name] + value if name in self._train_sums else value.clone()
        self._train_count += 1

    def take_train_metrics(self) -> dict[str, float]:
        """Return the means since the last call and start again; this waits for the device."""
        if not self._train_count:
            return {}
        means = torch.stack([value.float() for value in self._train_sums.values()]) / self._train_count
        means = self.all_gather(means).view(-1, len(means)).mean(0)  # of all ranks, so that all of them see a NaN
        found = {f"train/{name}": value for name, value in zip(self._train_sums, means.tolist(), strict=True)}
        self._train_sums.clear()
        self._train_count = 0
        return found

    # Optimiser --------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        return build_optimizer(self.student.net, self.projectors, config=self.config, budget=self.budget)

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

    def on_fit_start(self) -> None:
        for teacher in self.teachers:
            teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = self.position

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.position = self.resume_position = tuple(checkpoint["position"])
        if self.on_position is not None:
            self.on_position(*self.position)
