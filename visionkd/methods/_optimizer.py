"""Optimiser and learning-rate schedule of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from visionkd.config.schema import OptimizerConfig, RunConfig, ScheduleConfig


@dataclass(frozen=True)
class Budget:
    """Length of a training, in optimiser steps."""

    steps_per_epoch: int
    epochs: int


def build_optimizer(
    student: nn.Module, projectors: nn.Module, *, config: RunConfig, budget: Budget, projector_lr_ratio: float = 1.0
) -> dict[str, Any]:
    """Return optimiser and schedule in the form that Lightning takes.

    Args:
        student: The bare network; it says itself which of its parameters are not to be decayed.
        projectors: What trains beside it.
        config: With the learning rate and the weight decay resolved.
        budget: Length of the training.
        projector_lr_ratio: Learning rate of what trains beside the student, as a share of the student's.
    """
    settings = config.optimizer
    assert settings.lr is not None and settings.weight_decay is not None, "the workflow resolves both"
    if settings.layer_decay is None:
        groups = _parameter_groups(student, projectors, settings.weight_decay, settings.decay_norm_and_bias)
    else:
        groups = _layer_groups(student, settings)
        beside = _parameter_groups(nn.Module(), projectors, settings.weight_decay, settings.decay_norm_and_bias)
        groups += [group for group in beside if group["params"]]
    if projector_lr_ratio != 1.0:
        groups = _with_rate(groups, projectors, settings.lr * projector_lr_ratio)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = not clips_scaled_gradients(config) and devices <= {"cpu", "cuda"}
    optimizer: torch.optim.Optimizer
    if settings.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)
    else:
        nesterov = settings.nesterov and settings.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(lr_factor, schedule=config.schedule, budget=budget))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def clips_scaled_gradients(config: RunConfig) -> bool:
    """Whether gradients are clipped under float16: a fused optimiser undoes the loss scaling too late for that."""
    return config.training.precision == "16" and config.training.clip_grad_norm is not None


def lr_factor(step: int, *, schedule: ScheduleConfig, budget: Budget) -> float:
    """Return the share of the peak learning rate at an optimiser step, counted from 0."""
    warmup = schedule.warmup_epochs * budget.steps_per_epoch
    total = budget.epochs * budget.steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        epoch = step // budget.steps_per_epoch + 1
        return schedule.gamma ** sum(epoch > milestone for milestone in schedule.milestones)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    low = schedule.min_lr_ratio
    if schedule.name == "poly":
        return low + (1.0 - low) * (1.0 - progress) ** schedule.power
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _parameter_groups(
    student: nn.Module, projectors: nn.Module, weight_decay: float, decay_all: bool
) -> list[dict[str, Any]]:
    trained = nn.ModuleDict({"student": student, "projectors": projectors})
    if decay_all:
        return [{"params": [p for p in trained.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    undecayed = getattr(student, "no_weight_decay", set)()
    names = [f"student.{name}" for name in undecayed]
    return param_groups_weight_decay(trained, weight_decay, no_weight_decay_list=names)


def _layer_groups(student: nn.Module, settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Return groups whose rates fall from layer to layer, from the classifier (the full rate) to the embedding."""
    assert settings.lr is not None and settings.layer_decay is not None
    undecayed = () if settings.decay_norm_and_bias else getattr(student, "no_weight_decay", set)()
    found = param_groups_layer_decay(
        student, settings.weight_decay, no_weight_decay_list=undecayed, layer_decay=settings.layer_decay,
        weight_decay_exclude_1d=not settings.decay_norm_and_bias,
    )  # fmt: skip
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    full = [p for name, p in named if name == "dist_token" or name.startswith("norm.")]
    groups = []
    for group in found:  # timm counts the last norm to the last block, and a new distillation token to the embedding
        rest = [p for p in group["params"] if not any(p is one for one in full)]
        groups.append({"params": rest, "weight_decay": group["weight_decay"], "lr": settings.lr * group["lr_scale"]})
    groups += [{"params": full, "weight_decay": settings.weight_decay if settings.decay_norm_and_bias else 0.0}]
    return [group for group in groups if group["params"]]


def _with_rate(groups: list[dict[str, Any]], projectors: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Split each group in two, of which the projectors' has a learning rate of its own."""
    own = {id(parameter) for parameter in projectors.parameters()}
    split = []
    for group in groups:
        parts = ([p for p in group["params"] if id(p) not in own], [p for p in group["params"] if id(p) in own])
        split += [{**group, "params": parts[0]}, {**group, "params": parts[1], "lr": lr}]
    return [group for group in split if group["params"]]


def step_together(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    *,
    clip_grad_norm: float,
    mean_of_ranks: Callable[[Tensor], Tensor],
) -> None:
    """Step parameters that no wrapper knows of: with the mean gradient of all processes, clipped; then clear it.

    Args:
        optimizer: Of these parameters.
        parameters: All have a gradient.
        clip_grad_norm: Largest norm of the mean gradient.
        mean_of_ranks: Averages a tensor over all processes.
    """
    flat = mean_of_ranks(torch.cat([p.grad.flatten() for p in parameters]))
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)
    nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
