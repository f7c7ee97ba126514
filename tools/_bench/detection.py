"""What a detector's training step costs: visionkd's beside the loop of torchvision's own training script.

That loop is handed images in [0, 1] and boxes, as its loader delivers them, and torchvision's transform normalises and
batches them; the images have the size that it wants, so nothing is resized. visionkd starts from bytes. Both train
copies of the same detector from the same weights with the same fused SGD.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from _bench.contenders import NAIVE, ONLINE, Contender
from _bench.rounds import SAME_LOSS
from _bench.setting import SGD, Setting, Step
from visionkd.config.schema import NetworkConfig, TrainConfig
from visionkd.errors import Problem, RequestError, WorkError
from visionkd.methods._optimizer import Budget
from visionkd.methods._supervised import Supervised, SupervisedOptions
from visionkd.models.detection.names import is_detector
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.factory import create_network, resolve_name
from visionkd.tasks.detection import DetectionTask

REFERENCE, REFERENCE_LAST = NAIVE, "reference_channels_last"
_SEED, _NUM_CLASSES, _BOXES = 0, 3, 8


@dataclass(frozen=True)
class Shape:
    """A detector and its batch.

    Attributes:
        model: Its name.
        img_size: Height and width in pixels.
        batch_size: Images per step.
        args: Arguments of the network.
    """

    model: str
    img_size: tuple[int, int]
    batch_size: int
    args: dict[str, Any]


class DetectorMaterial:
    """A detector and one fixed batch; every contender trains its own copy.

    Attributes:
        pixels: uint8, B x 3 x H x W: what visionkd's loader delivers.
        target: For each image its boxes and labels.
    """

    def __init__(self, shape: Shape, setting: Setting) -> None:
        self.pair, self.setting = shape, setting
        resolved = resolve_name(shape.model)
        if not is_detector(resolved.library, resolved.architecture):
            raise RequestError(Problem("--model", f"'{shape.model}' is no detector", "Take DETECTOR_BACKBONE."))
        torch.manual_seed(_SEED)
        config = NetworkConfig(name=shape.model, pretrained=False, img_size=shape.img_size, args=shape.args)
        network = create_network(config, num_classes=_NUM_CLASSES, in_training=True)
        assert isinstance(network, DetectionNetwork)
        self.network = network
        height, width = shape.img_size
        self.pixels = torch.randint(0, 256, (shape.batch_size, 3, height, width), dtype=torch.uint8)
        self.target = [self._boxes(height, width) for _ in range(shape.batch_size)]

    @staticmethod
    def _boxes(height: int, width: int) -> dict[str, Tensor]:
        sides = torch.tensor([width, height], dtype=torch.float32)
        size = (0.1 + 0.3 * torch.rand(_BOXES, 2)) * sides
        start = torch.rand(_BOXES, 2) * (sides - size)
        return {
            "boxes": torch.cat([start, start + size], 1), "labels": torch.randint(0, _NUM_CLASSES, (_BOXES,)),
            "crowd": torch.zeros(_BOXES, dtype=torch.bool),
        }  # fmt: skip

    def reference(self, memory_format: torch.memory_format) -> Step:
        """The step of torchvision's script, on the detector with torchvision's own transform."""
        net, sides, spec = copy.deepcopy(self.network.net), self.pair.img_size, self.network.input
        net.transform = GeneralizedRCNNTransform(
            min(sides), max(sides), list(spec.mean), list(spec.std), size_divisible=1  # or it would pad them further
        )
        net = net.to(memory_format=memory_format).train()
        images = [each.float() / 255.0 for each in self.pixels]
        targets = [self.network.wanted(each) for each in self.target]
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], **SGD)

        def step() -> Tensor:
            given = [{name: value.clone() for name, value in each.items()} for each in targets]  # as from a loader
            with self.setting.autocast():
                losses: dict[str, Tensor] = net(list(images), given)
                loss = torch.stack(list(losses.values())).sum()
            if not math.isfinite(loss.item()):  # as the script does
                raise FloatingPointError(f"the loss is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return step

    # What the rounds ask of a material --------------------------------------------------------------------------------

    def batch(self) -> dict[str, Any]:
        """What visionkd's training loader delivers."""
        count = len(self.target)
        return {
            "image": self.pixels, "target": self.target, "index": torch.arange(count),
            "unreadable": torch.full((count,), -1),
        }  # fmt: skip

    def config(self) -> TrainConfig:
        """The run of visionkd that does the same work."""
        config = TrainConfig(model=NetworkConfig(name=self.pair.model, pretrained=False), task="detection")
        optimizer = config.optimizer
        optimizer.name, optimizer.lr, optimizer.weight_decay = "sgd", SGD["lr"], SGD["weight_decay"]
        optimizer.momentum, optimizer.nesterov = SGD["momentum"], SGD["nesterov"]
        optimizer.decay_norm_and_bias = True  # one group of parameters, as the other has
        config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
        config.training.batch_size = self.pair.batch_size
        config.training.precision = self.setting.precision  # type: ignore[assignment]
        config.training.channels_last = self.setting.channels_last
        config.compute.accelerator, config.compute.devices = "cpu", 1
        return config

    def module(self, config: TrainConfig, *, steps: int) -> Supervised:
        """visionkd's own training module."""
        return Supervised(
            student=copy.deepcopy(self.network), task=DetectionTask(num_classes=_NUM_CLASSES), config=config,
            options=SupervisedOptions(), budget=Budget(steps_per_epoch=steps, epochs=1),
        )  # fmt: skip


def check_loss(material: DetectorMaterial) -> None:
    """Refuse to compare unequal work; two-stage detectors draw at random what they look at, and are not checked.

    Raises:
        WorkError: If visionkd's training module computes another loss than torchvision's loop.
    """
    if material.network.two_stage:
        return
    with material.setting.autocast():
        module = material.module(material.config(), steps=1).train()
        image = module.on_after_batch_transfer(material.batch(), 0)["image"]
        own = module.loss_terms(image, material.target)["task_loss"].item()
    other = material.reference(material.setting.memory_format)().item()
    if abs(own - other) > SAME_LOSS[material.setting.precision] * abs(other):
        raise WorkError(f"visionkd computes another loss than torchvision's loop: {own:.6g}, not {other:.6g}.")


def contenders(material: DetectorMaterial) -> list[Contender]:
    """Return torchvision's loop, the same with channels last, and visionkd's Trainer."""
    same = not material.network.two_stage
    return [
        Contender(
            REFERENCE, "torchvision's loop", lambda given: given.reference(torch.contiguous_format), distils=same
        ),
        Contender(
            REFERENCE_LAST, "the same, channels last", lambda given: given.reference(torch.channels_last), distils=same
        ),
        Contender(ONLINE, "visionkd train", None, distils=same),
    ]  # fmt: skip
