"""What every method on maps of classes promises: the contract, with tiny segmentation networks."""

from __future__ import annotations

import torch

from tests.methods.contract import NUM_CLASSES, MethodContract
from visionkd.config.schema import NetworkConfig
from visionkd.models.factory import create_network
from visionkd.tasks.segmentation import SegmentationTask

SIZE = (32, 48)


def dense_network(name: str, *, seed: int, **args):
    torch.manual_seed(seed)
    config = NetworkConfig(
        name=name, pretrained=False, img_size=SIZE, args={"channels": 8, "dropout": 0.0, **args}
    )  # fmt: skip
    return create_network(config, num_classes=NUM_CLASSES, in_training=True)


def dense_batch(*, seed: int = 0, size: int = 3) -> dict[str, torch.Tensor]:
    """Random images with labels in blocks of eight pixels, and a strip without labels, as a loader yields them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, NUM_CLASSES, (size, SIZE[0] // 8, SIZE[1] // 8), dtype=torch.uint8, generator=generator)
    target = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    target[:, :, :4] = 255
    return {
        "image": torch.randint(0, 256, (size, 3, *SIZE), dtype=torch.uint8, generator=generator),
        "target": target,
        "index": torch.arange(size),
        "unreadable": torch.full((size,), -1),
    }


class DenseContract(MethodContract):
    student_name = "fpn_cifar_resnet8"
    teacher_names = ("fcn_cifar_resnet8",)  # logits at another stride

    def network(self, name: str, *, seed: int):
        return dense_network(name, seed=seed)

    def task(self):
        return SegmentationTask(num_classes=NUM_CLASSES)

    def batch(self):
        return dense_batch()
