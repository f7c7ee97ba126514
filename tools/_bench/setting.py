"""What is measured: a teacher, a student, images, and the settings that all contenders share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionkd.config.schema import DistillConfig, NetworkConfig, TeacherConfig
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.methods._base import Budget
from visionkd.methods.kd import KD, KDOptions
from visionkd.models.factory import Network, create_network
from visionkd.tasks.classification import ClassificationTask

TEMPERATURE, TASK_WEIGHT, DISTILL_WEIGHT = 4.0, 0.1, 0.9
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "fused": True}
_SEED = 0


@dataclass(frozen=True)
class Pair:
    """A teacher and a student.

    Attributes:
        name: Name on the command line.
        teacher: timm name.
        student: timm name.
        img_size: Height and width in pixels.
        batch_size: Images per step.
        num_classes: Outputs of both.
        steps: Steps of each contender in a round, unless asked otherwise: about a second's worth.
    """

    name: str
    teacher: str
    student: str
    img_size: int
    batch_size: int
    num_classes: int
    steps: int


PAIRS = {
    pair.name: pair
    for pair in (
        Pair("resnet50_resnet18", "resnet50", "resnet18", img_size=128, batch_size=16, num_classes=1000, steps=2),
        Pair("cifar", "cifar_resnet20", "cifar_resnet8", img_size=32, batch_size=128, num_classes=10, steps=10),
    )
}


def find_pair(text: str) -> Pair:
    """Return the pair of that name, or the one that TEACHER:STUDENT:PX:BATCH describes."""
    if text in PAIRS:
        return PAIRS[text]
    parts = text.split(":")
    if len(parts) != 4 or not (parts[2].isdigit() and parts[3].isdigit()):
        near = did_you_mean(text, PAIRS)
        allowed = f"It is one of {', '.join(PAIRS)}, or TEACHER:STUDENT:PX:BATCH."
        raise RequestError(Problem("--pair", f"'{text}' is not known", f"{near} {allowed}".strip()))
    return Pair(text, parts[0], parts[1], img_size=int(parts[2]), batch_size=int(parts[3]), num_classes=100, steps=5)


@dataclass(frozen=True)
class Setting:
    """Precision and memory format of every contender.

    Attributes:
        precision: ``32``, or ``bf16`` for autocast of both networks.
        channels_last: Memory format of weights and images.
    """

    precision: str = "32"
    channels_last: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            yield


class Material:
    """Networks and one fixed batch of a pair; every contender trains its own copy of the student.

    Attributes:
        pixels: uint8, B x 3 x H x W, contiguous: what visionkd's loader delivers.
        image: The same, normalised float32 in the common memory format: what all others are handed, so that no
            contender but visionkd pays for conversion and normalisation.
        target: Class indices, B.
    """

    def __init__(self, pair: Pair, setting: Setting) -> None:
        self.pair, self.setting = pair, setting
        torch.manual_seed(_SEED)
        self.teacher = self._network(pair.teacher, in_training=False)
        self.student = self._network(pair.student, in_training=True)
        _share_statistics(self.student, self.teacher)
        size, count = pair.img_size, pair.batch_size
        self.pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        self.target = torch.randint(0, pair.num_classes, (count,))
        with torch.no_grad():
            scaled = self.pixels.to(torch.float32, memory_format=setting.memory_format) / 255.0
            self.image = self.student.normalize(scaled)

    def _network(self, name: str, *, in_training: bool) -> Network:
        config = NetworkConfig(name=name, pretrained=False, img_size=self.pair.img_size)
        network = create_network(config, num_classes=self.pair.num_classes, in_training=True)
        return network.train(in_training).requires_grad_(in_training).to(memory_format=self.setting.memory_format)

    def new_student(self) -> nn.Module:
        """A copy of the bare student, in train mode."""
        return copy.deepcopy(self.student.net)

    def batch(self) -> dict[str, Tensor]:
        """What visionkd's training loader delivers."""
        count = len(self.target)
        return {
            "image": self.pixels,
            "target": self.target,
            "index": torch.arange(count),
            "unreadable": torch.full((count,), -1),
        }

    def config(self) -> DistillConfig:
        """The run of visionkd that does the same work."""
        pair = self.pair
        config = DistillConfig(
            student=NetworkConfig(name=pair.student, pretrained=False, img_size=pair.img_size),
            teachers=[TeacherConfig(name=pair.teacher, pretrained=False, img_size=pair.img_size)],
            method="kd",
        )
        optimizer = config.optimizer
        optimizer.name, optimizer.lr, optimizer.weight_decay = "sgd", SGD["lr"], SGD["weight_decay"]
        optimizer.momentum, optimizer.nesterov = SGD["momentum"], SGD["nesterov"]
        optimizer.decay_norm_and_bias = True  # one group of parameters, as the others have
        config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
        config.training.batch_size = pair.batch_size
        config.training.precision = self.setting.precision  # type: ignore[assignment]
        config.training.channels_last = self.setting.channels_last
        config.compute.accelerator, config.compute.devices = "cpu", 1
        return config

    def module(self, config: DistillConfig, *, steps: int) -> KD:
        """visionkd's own training module."""
        return KD(
            student=copy.deepcopy(self.student),
            teachers=[self.teacher],
            task=ClassificationTask(num_classes=self.pair.num_classes),
            config=config,
            options=KDOptions(TEMPERATURE, task_loss_weight=TASK_WEIGHT, distill_loss_weight=DISTILL_WEIGHT),
            budget=Budget(steps_per_epoch=steps, epochs=1),
        )


def _share_statistics(source: Network, other: Network) -> None:
    """Give ``other`` the input statistics of ``source``: one normalised batch then serves both."""
    other.normalize = copy.deepcopy(source.normalize)
    for network in (source, other):
        known = getattr(network.net, "pretrained_cfg", None)
        if isinstance(known, dict):
            network.net.pretrained_cfg = {**known, "mean": source.input.mean, "std": source.input.std}


Step = Callable[[], Tensor]
