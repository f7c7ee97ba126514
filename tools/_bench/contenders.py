"""One training step, as each contender does it.

Each maker returns a function that makes one optimiser step on the fixed batch and returns the loss, or raises
ImportError where its library is not installed. All start from the same weights and use the same fused SGD.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from _bench.setting import DISTILL_WEIGHT, SGD, TASK_WEIGHT, TEMPERATURE, Material, Step

BARE, NAIVE, ONLINE = "bare", "naive", "visionkd"


@dataclass(frozen=True)
class Contender:
    """Somebody's training step.

    Attributes:
        name: Short name, for machines.
        title: What it is.
        make: Prepares it; None for the one that a Lightning Trainer drives (see rounds.py).
        package: Distribution that it needs and whose version is told, if not one of the project's own.
        distils: Whether its loss is the distillation loss of all others.
    """

    name: str
    title: str
    make: Callable[[Material], Step] | None
    package: str | None = None
    distils: bool = True

    @property
    def version(self) -> str | None:
        """Version of the package; None where it is not installed, or none is needed."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None


def bare(material: Material) -> Step:
    student, image, target = material.new_student(), material.image, material.target
    optimizer = torch.optim.SGD(student.parameters(), **SGD)

    def step() -> Tensor:
        with material.setting.autocast():
            logits = student(image)
        loss = F.cross_entropy(logits.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def naive(material: Material) -> Step:
    """What a good engineer writes by hand."""
    student, teacher = material.new_student(), material.teacher.net
    image, target = material.image, material.target
    optimizer = torch.optim.SGD(student.parameters(), **SGD)

    def step() -> Tensor:
        with material.setting.autocast():
            with torch.no_grad():
                teacher_logits = teacher(image)
            logits = student(image)
        loss = _distillation_loss(logits.float(), teacher_logits.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def outputs_at_hand(material: Material) -> Step:
    """The same with the teacher's logits computed beforehand."""
    student, image, target = material.new_student(), material.image, material.target
    optimizer = torch.optim.SGD(student.parameters(), **SGD)
    with torch.no_grad(), material.setting.autocast():
        teacher_logits = material.teacher.net(image).float()

    def step() -> Tensor:
        with material.setting.autocast():
            logits = student(image)
        loss = _distillation_loss(logits.float(), teacher_logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def visionkd_loop(material: Material) -> Step:
    """visionkd's training module in the shortest loop that drives it, without Lightning's Trainer."""
    module = material.module(material.config(), steps=1_000_000)
    module.train()
    optimizers = module.configure_optimizers()
    optimizer, schedule = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    batch, count = material.batch(), 0

    def step() -> Tensor:
        nonlocal count
        ready = module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
        with material.setting.autocast():
            loss = module.training_step(ready, count)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        count += 1
        return loss.detach()

    return step


def timm_task(material: Material) -> Step:
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        material.new_student(), material.teacher.net, criterion=torch.nn.CrossEntropyLoss(), verbose=False,
        distill_loss_weight=DISTILL_WEIGHT, task_loss_weight=TASK_WEIGHT, temperature=TEMPERATURE,
    )  # fmt: skip
    task.train()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), **SGD)

    def step() -> Tensor:
        with material.setting.autocast():
            loss = task(material.image, material.target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def torchdistill_box(material: Material) -> Step:
    from torchdistill.common.constant import def_logger
    from torchdistill.core.distillation import DistillationBox

    def_logger.setLevel(logging.ERROR)
    logits = {f"{who}_module_path": "." for who in ("student", "teacher")}
    logits |= {f"{who}_module_io": "output" for who in ("student", "teacher")}
    weights = {"alpha": TASK_WEIGHT, "beta": DISTILL_WEIGHT}
    loss = {"key": "KDLoss", "kwargs": {**logits, **weights, "temperature": TEMPERATURE}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    teacher, student = material.teacher.net, material.new_student()
    box = DistillationBox(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step() -> Tensor:
        with material.setting.autocast():
            loss = box.forward_process(material.image, material.target)
        box.post_forward_process(loss)
        return loss.detach()

    return step


def model_optimizer(material: Material) -> Step:
    with _quiet():
        import modelopt.torch.distill as mtd

        # It leaves hooks on the teacher, which the other contenders use too.
        settings = {
            "teacher_model": copy.deepcopy(material.teacher.net),
            "criterion": mtd.LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean"),
            "loss_balancer": mtd.StaticLossBalancer(kd_loss_weight=DISTILL_WEIGHT),
        }
        model = mtd.convert(material.new_student(), mode=[("kd_loss", settings)])
    model.train()
    # its parameters() lists the frozen teacher's too
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)

    def step() -> Tensor:
        with material.setting.autocast():
            logits = model(material.image)
            loss = model.compute_kd_loss(student_loss=F.cross_entropy(logits, material.target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


CONTENDERS = (
    Contender(BARE, "bare student step", bare, distils=False),
    Contender("outputs_at_hand", "bare step, teacher outputs at hand", outputs_at_hand),
    Contender(NAIVE, "naive PyTorch loop", naive),
    Contender(ONLINE, "visionkd, as 'distill' trains", None),
    Contender("visionkd_loop", "visionkd's module without a Trainer", visionkd_loop),
    Contender("timm", "timm LogitDistillationTask", timm_task, package="timm"),
    Contender("torchdistill", "torchdistill DistillationBox", torchdistill_box, package="torchdistill"),
    Contender("modelopt", "NVIDIA Model Optimizer", model_optimizer, package="nvidia-modelopt"),
)


def _distillation_loss(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits / TEMPERATURE, dim=1)
    soft = F.kl_div(log_probs, F.softmax(teacher_logits / TEMPERATURE, dim=1), reduction="batchmean")
    return TASK_WEIGHT * F.cross_entropy(logits, target) + DISTILL_WEIGHT * TEMPERATURE**2 * soft


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
