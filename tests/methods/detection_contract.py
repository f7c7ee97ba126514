"""What every method on detectors promises: the contract, with tiny detectors."""

from __future__ import annotations

from typing import Any

import torch

from tests.methods.contract import NUM_CLASSES, MethodContract
from visionkd.config.schema import NetworkConfig
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.factory import create_network
from visionkd.tasks.detection import DetectionTask

SIZE = (48, 64)
CLASSES = tuple(f"class{number}" for number in range(NUM_CLASSES))
#: Few boxes are looked at, or a step would take a second.
_FEW = {"pre_nms": 40, "post_nms": 20, "sampled": 16}


def detector(name: str, *, seed: int, classes: tuple[str, ...] = CLASSES, **args: Any) -> DetectionNetwork:
    torch.manual_seed(seed)
    heads = {"head_dim": 16} if name.startswith("fasterrcnn") else {"head_convs": 1}
    config = NetworkConfig(name=name, pretrained=False, img_size=SIZE, args={"channels": 8, **heads, **args})
    network = create_network(config, classes=classes, in_training=True)
    assert isinstance(network, DetectionNetwork)
    if network.two_stage:
        rpn, heads = network.net.rpn, network.net.roi_heads
        for mode in ("training", "testing"):
            rpn._pre_nms_top_n[mode], rpn._post_nms_top_n[mode] = _FEW["pre_nms"], _FEW["post_nms"]
        rpn.fg_bg_sampler.batch_size_per_image = heads.fg_bg_sampler.batch_size_per_image = _FEW["sampled"]
    return network


def boxes_batch(*, seed: int = 0) -> dict[str, Any]:
    """Random images as a loader yields them: one with two boxes, one with a crowd beside a box, one with none."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        ([[4.0, 4, 30, 40], [33, 10, 60, 44]], [0, 2], [False, False]),
        ([[8.0, 2, 40, 30], [0, 0, 64, 48]], [1, 3], [False, True]),
        ([], [], []),
    ]
    target = [
        {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64),
         "crowd": torch.tensor(crowd, dtype=torch.bool)}
        for boxes, labels, crowd in rows
    ]  # fmt: skip
    return {
        "image": torch.randint(0, 256, (len(rows), 3, *SIZE), dtype=torch.uint8, generator=generator),
        "target": target,
        "index": torch.arange(len(rows)),
        "unreadable": torch.full((len(rows),), -1),
    }


class DetectionContract(MethodContract):
    student_name = "fcos_test_resnet"
    teacher_names = ("fcos_test_efficientnet",)
    lr = 0.02  # the second stage diverges at the rate of classifiers

    def network(self, name: str, *, seed: int):
        return detector(name, seed=seed)

    def task(self):
        return DetectionTask(num_classes=NUM_CLASSES)

    def batch(self):
        return boxes_batch()
