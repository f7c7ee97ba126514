"""Quantised distillation and differentiable quantisation: a student whose weights take 2^b values.

    L = w * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - w) * CE(y, s)

``uniform``: the student runs with quantised weights Q(v). The gradient goes to the full-precision weights v, which the
optimiser updates and which are quantised anew in each step. ``differentiable``: v stays as it is, and where the levels
lie is learned. ``alternating``: an epoch of each in turn, ending with a uniform one; behind an epoch on the levels, v
becomes what they made of it. Batch norms take their statistics from the quantised network; it alone is validated and
packaged.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv 1802.05668.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem
from visionkd.losses.distillation import kd_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._optimizer import build_optimizer
from visionkd.methods._quantized_points import BATCHES, Measured, Points
from visionkd.methods._stage import TrainingStage
from visionkd.models.network import Network
from visionkd.quantization.differentiable import quantize_to_points
from visionkd.quantization.packing import quantizable_names, quantized_copy, to_levels
from visionkd.quantization.quantized_distillation import fake_quantize_uniform
from visionkd.types import Output

_KEY = "quantized"
#: Learning rate of the levels as a share of the weights', in the paper's trainings with SGD.
_POINTS_LR_RATIO = 0.001


@dataclass(frozen=True)
class QuantizedOptions:
    """Options of ``quantized``.

    Attributes:
        mode: ``uniform`` trains weights for equally distant levels, ``differentiable`` learns levels for weights that
            are trained already, ``alternating`` does both in turn.
        bits: b; a weight takes one of 2^b levels.
        bucket_size: Consecutive weights that share a range; null takes each tensor as one bucket.
        post_training: Quantise the student as it is, without any training: what the other modes are compared with.
        stochastic: Round at random in training, so that the mean is the weight (``uniform`` alone).
        backward: How the gradient passes the rounding: ``straight_through``, ``truncated`` or ``complicated``.
        quantize_first_last: Quantise the first layer and the classifier too.
        quantize_batch_norm: Quantise the scales and shifts of norms too; at few bits this does harm.
        temperature: ``T`` of the equation.
        distill_loss_weight: ``w`` of the equation; 0 learns from the labels alone, and the teacher does not run.
        kl_reduction: ``batch`` averages the divergence over images. ``elements`` averages over classes as well, as the
            released code does, which makes it C times weaker.
        allocate_points: Give tensors with large gradients more levels, at the same total.
        points_init: Where the levels begin: at ``quantiles`` of the weights, or at equal distances (``uniform``).
        points_lr_ratio: Learning rate of the levels as a share of the weights'; null takes 0.001 for SGD, 1 for AdamW.
    """

    mode: Literal["uniform", "differentiable", "alternating"] = "uniform"
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    bucket_size: Annotated[int, Field(ge=2)] | None = 256
    post_training: bool = False
    stochastic: bool = False
    backward: Literal["straight_through", "truncated", "complicated"] = "straight_through"
    quantize_first_last: bool = True
    quantize_batch_norm: bool = False
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2.0
    distill_loss_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    kl_reduction: Literal["batch", "elements"] = "batch"
    allocate_points: bool = True
    points_init: Literal["quantiles", "uniform"] = "quantiles"
    points_lr_ratio: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None


def softened_kl(
    *, student_logits: Tensor, teacher_probs: Tensor, temperature: float, reduction: Literal["batch", "elements"]
) -> Tensor:
    """Return ``T^2 * KL(p_t || softmax(z_s / T))``, averaged over images, or over images and classes.

    Args:
        student_logits: B x C.
        teacher_probs: ``softmax(z_t / T)``, B x C.
        temperature: ``T``.
        reduction: ``batch`` or ``elements``.
    """
    loss = kd_loss(student_logits=student_logits, teacher_probs=teacher_probs, temperature=temperature)
    return loss if reduction == "batch" else loss / student_logits.shape[1]


class Quantized(DistillationModule):
    """Trains full-precision weights, or levels, through the quantised network."""

    Options: ClassVar[type] = QuantizedOptions
    options: QuantizedOptions

    def build_modules(self) -> nn.Module:
        options, student = self.options, self.student
        self._names = quantizable_names(
            student, first_last=options.quantize_first_last, batch_norm=options.quantize_batch_norm
        )
        if options.mode != "uniform":
            points = Points.of(self._weights(), **self._points_settings)
            # the student's, so that they are averaged and saved with it; its package holds the levels instead
            student.add_module("points", points)
        if options.mode == "differentiable":
            student.net.requires_grad_(False)
        self._measured = Measured()
        self._points_epoch = -1  # the alternating epoch that the levels were begun in
        self._levels_epoch, self._levels = -1, torch.zeros(0, dtype=torch.int16)
        self.__dict__["_deployed"] = None
        return nn.ModuleDict()

    @property
    def _points_settings(self) -> dict[str, Any]:
        options = self.options
        return {"num_points": 2**options.bits, "bucket_size": options.bucket_size, "start": options.points_init}

    def _weights(self) -> list[Tensor]:
        return [self.student.net.get_parameter(name) for name in self._names]

    @property
    def _learns_points(self) -> bool:
        """Whether the present epoch trains the levels."""
        if self.options.mode != "alternating":
            return self.options.mode == "differentiable"
        return self.current_epoch % 2 == 1 and self.current_epoch < self.budget.epochs - 1

    # The loss ---------------------------------------------------------------------------------------------------------

    @classmethod
    def label_temperature(cls, options: QuantizedOptions) -> float:
        return options.temperature

    @classmethod
    def can_store_labels(cls, options: QuantizedOptions) -> bool:
        return options.distill_loss_weight > 0 and not options.post_training

    def teacher_outputs(self, image: Tensor) -> tuple[Output, ...]:
        return super().teacher_outputs(image) if self.options.distill_loss_weight else ()

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        assert student.logits is not None
        loss = softened_kl(
            student_logits=student.logits,
            teacher_probs=self.soft_label(teachers),
            temperature=self.options.temperature,
            reduction=self.options.kl_reduction,
        )
        return {"kd_loss": loss}

    def loss_weights(self) -> Mapping[str, float]:
        weight = self.options.distill_loss_weight
        return {"task_loss": 1.0 - weight, "kd_loss": weight}

    # A step -----------------------------------------------------------------------------------------------------------

    def student_output(self, image: Tensor) -> Output:
        return functional_call(self.student, self._used_weights(), (image,))

    def _used_weights(self) -> dict[str, Tensor]:
        """Return what takes the place of the student's parameters, by name."""
        options = self.options
        if not self._learns_points:
            given = {"num_levels": 2**options.bits, "bucket_size": options.bucket_size}
            training = {"stochastic": options.stochastic, "backward": options.backward}
            return {
                f"net.{name}": self._laid_out(fake_quantize_uniform(weight, **given, **training))
                for name, weight in zip(self._names, self._weights(), strict=True)
            }
        used = {f"net.{name}": parameter.detach() for name, parameter in self.student.net.named_parameters()}
        for name, points in zip(self._names, self.student.points, strict=True):
            quantized = quantize_to_points(used[f"net.{name}"], points, bucket_size=options.bucket_size)
            used[f"net.{name}"] = self._laid_out(quantized)
        return used

    def _laid_out(self, weight: Tensor) -> Tensor:
        """Return a weight in the memory format of the student, which buckets do not keep."""
        return weight.contiguous(memory_format=self.memory_format) if weight.ndim == 4 else weight

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._change_phase()
        if self.options.backward == "truncated":
            with torch.no_grad():
                torch._foreach_clamp_min_(self._weights(), -1.0)
                torch._foreach_clamp_max_(self._weights(), 1.0)
        if self._levels_epoch != self.current_epoch:
            self._levels_epoch, self._levels = self.current_epoch, self._level_numbers()
        if self._learns_points and self.options.allocate_points:
            self._measure(batch["image"], batch["target"])
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def _change_phase(self) -> None:
        """Begin an epoch of the alternation: with fresh levels, or with the weights that the levels made."""
        if self.options.mode != "alternating":
            return
        if self._learns_points and self._points_epoch != self.current_epoch:
            self._points_epoch, self._measured = self.current_epoch, Measured()
            self._begin_points(2**self.options.bits)
        elif not self._learns_points and self._points_epoch >= 0:
            self._points_epoch = -1
            for weight, points in zip(self._weights(), self.student.points, strict=True):
                weight.copy_(quantize_to_points(weight, points, bucket_size=self.options.bucket_size))

    def _measure(self, image: Tensor, target: Tensor) -> None:
        """In the first batches, take the gradient of the labels' loss at plain weights, to spread the levels by."""
        if self._measured.count == BATCHES:
            return
        weights = {f"net.{n}": w.detach().requires_grad_() for n, w in zip(self._names, self._weights(), strict=True)}
        was_training = self.student.training
        self.student.eval()
        loss = self.task.loss(functional_call(self.student, weights, (image,)), target)
        self.student.train(was_training)
        self._measured.add(torch.autograd.grad(loss, list(weights.values())))

    def _begin_points(self, num_points: int | Sequence[int]) -> None:
        settings = {**self._points_settings, "num_points": num_points}
        former = list(self.student.points)
        self.student.points.begin(self._weights(), **settings)
        if self.ema is not None:
            self.ema.module.points.begin(self._weights(), **settings)
        fresh = {id(old): new for old, new in zip(former, self.student.points, strict=True)}
        for group in self._points_optimizer.param_groups:
            group["params"] = [fresh.get(id(parameter), parameter) for parameter in group["params"]]
        for parameter in former:
            self._points_optimizer.state.pop(parameter, None)  # the momentum was the former levels'
        self._levels_epoch = -1

    # Optimiser --------------------------------------------------------------------------------------------------------

    @property
    def projector_lr_ratio(self) -> float:
        ratio = self.options.points_lr_ratio
        if ratio is None:
            ratio = _POINTS_LR_RATIO if self.config.optimizer.name == "sgd" else 1.0
        # never the weights' own, so that the levels are a parameter group for themselves, without weight decay
        return math.nextafter(1.0, 0.0) if ratio == 1.0 else ratio

    def configure_optimizers(self) -> dict[str, Any]:
        points = self.student.points if self.options.mode != "uniform" else nn.ModuleDict()
        made = build_optimizer(
            self.student.net, points, config=self.config, budget=self.budget,
            projector_lr_ratio=self.projector_lr_ratio,
        )  # fmt: skip
        self._points_optimizer, own = made["optimizer"], {id(parameter) for parameter in points.parameters()}
        for group in self._points_optimizer.param_groups:
            if any(id(parameter) in own for parameter in group["params"]):
                group["weight_decay"] = 0.0
        # before the averaged weights take it up
        self._points_optimizer.register_step_post_hook(lambda *_: self._after_step())
        return made

    def _after_step(self) -> None:
        if not self._learns_points:
            return
        self.student.points.sort()
        if self._measured.complete:
            self._begin_points(self._measured.allocate(2**self.options.bits))

    # Evaluation -------------------------------------------------------------------------------------------------------

    @property
    def deployed_student(self) -> Network:
        """A copy with quantised weights, of the averaged student where there is one."""
        kept = self.__dict__["_deployed"]
        return self._quantized(super().deployed_student) if kept is None else kept

    def _quantized(self, network: Network) -> Network:
        points = dict(zip(self._names, network.points, strict=True)) if self._learns_points else None
        options = self.options
        made = quantized_copy(network, self._names, bits=options.bits, bucket_size=options.bucket_size, points=points)
        if options.mode != "uniform":
            del made.points
        return made

    def on_validation_epoch_start(self) -> None:
        self.__dict__["_deployed"] = self.deployed_student  # once for all batches
        if self._levels_epoch == self.current_epoch and len(self._levels):
            changed = (self._level_numbers() != self._levels.to(self.device)).float().mean()
            self._train_means.add({"levels_changed": changed})

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.__dict__["_deployed"] = None

    @torch.no_grad()
    def _level_numbers(self) -> Tensor:
        """Return the number of every quantised weight's level, one tensor after the other."""
        weights = self._weights()
        points = list(self.student.points) if self._learns_points else [None] * len(weights)
        levels, size = 2**self.options.bits, self.options.bucket_size
        coded = [
            to_levels(w, num_levels=levels, bucket_size=size, points=p) for w, p in zip(weights, points, strict=True)
        ]
        return torch.cat([each.numbers for each in coded]).to(torch.int16)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = {
            "measured": self._measured.state_dict(),
            "points_epoch": self._points_epoch,
            "levels_epoch": self._levels_epoch,
            "levels": self._levels,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[_KEY]
        self._measured.load_state_dict(state["measured"])
        self._points_epoch = state["points_epoch"]
        self._levels_epoch, self._levels = state["levels_epoch"], state["levels"]

    # Before the training ----------------------------------------------------------------------------------------------

    @classmethod
    def stages(cls, config: RunConfig, options: QuantizedOptions) -> tuple[TrainingStage, ...]:
        if options.post_training:
            return (TrainingStage("quantize", "Quantise, without training,", epochs=0),)
        return super().stages(config, options)

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: QuantizedOptions
    ) -> list[Problem]:
        problems = []
        chosen = {"first_last": options.quantize_first_last, "batch_norm": options.quantize_batch_norm}
        if not quantizable_names(student, **chosen):
            message = "leaves no layer of this student to quantise"
            problems.append(Problem("options.quantize_first_last", message, "Set it to true."))
        if not cls.can_store_labels(options) and config.label_store.mode == "on":
            message = "the teacher does not run with these options, so there is nothing to keep"
            problems.append(Problem("label_store.mode", message, "Add --no-cache-teacher."))
        if not options.distill_loss_weight and config.augment.learned is not None:
            message = "a learned augmentation needs the teacher, which does not run at a weight of 0"
            problems.append(Problem("options.distill_loss_weight", message, "Take 0.7, or leave the augmentation out."))
        if config.compute.strategy == "fsdp":
            message = "fsdp does not go with quantised weights, whose buckets reach over its shards"
            problems.append(Problem("compute.strategy", message, "Use --strategy ddp."))
        if config.training.compile:
            message = "compiled students do not go with quantised weights"
            problems.append(Problem("training.compile", message, "Leave it out: -o training.compile=false"))
        if options.mode != "uniform" and _several_processes(config):
            if options.mode == "alternating":
                problems.append(Problem("options.mode", "alternating runs in one process", "Use --devices 1."))
            elif options.allocate_points:
                hint = "Use --devices 1, or -o options.allocate_points=false."
                problems.append(Problem("options.allocate_points", "runs in one process", hint))
        return problems

    @classmethod
    def warnings(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: QuantizedOptions
    ) -> list[str]:
        said = []
        if not student.trained and (options.mode == "differentiable" or options.post_training):
            said.append(
                "the weights are quantised as they are, and this student's are random: give a trained one, such as"
                " --student RUN"
            )
        if not options.distill_loss_weight and not options.post_training:
            said.append("distill_loss_weight is 0: the student learns from labels alone; the teacher is only compared")
        return said


def _several_processes(config: RunConfig) -> bool:
    compute = config.compute
    devices = compute.devices
    if devices == "auto":
        devices = 1 if compute.accelerator == "cpu" else torch.cuda.device_count()
    return devices > 1 or compute.nodes > 1


METHOD = Quantized
