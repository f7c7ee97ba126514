"""What OADP adds to a detector's training step, where the embeddings of its regions are cached.

The plain loop trains the same open-vocabulary detector on boxes alone and is handed images in [0, 1]; visionkd starts
from bytes, reads the regions of each image from a cache on disk and learns from all levels of the pyramid.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from _bench.contenders import NAIVE, ONLINE, Contender
from _bench.detection import DetectorMaterial, Shape
from _bench.setting import SGD, Setting, Step
from visionkd.config.schema import DistillConfig, NetworkConfig, TeacherConfig
from visionkd.methods._oadp_regions import CachedRegions
from visionkd.methods._optimizer import Budget
from visionkd.methods.oadp import OADP, OADPOptions
from visionkd.models.detection.open_heads import OpenVocabulary
from visionkd.models.detection.open_network import open_vocabulary
from visionkd.tasks.detection import DetectionTask
from visionkd.teachers.embedding_cache import EmbeddingCache, ImageRegions, open_cache
from visionkd.teachers.regions import block_boxes

_DIM = 512
#: Two of the three classes have boxes.
_BASE = (True, True, False)


class OpenMaterial(DetectorMaterial):
    """An open-vocabulary detector, one fixed batch, and the cached regions of its images, in ``folder``."""

    def __init__(self, shape: Shape, options: OADPOptions, setting: Setting, folder: Path) -> None:
        super().__init__(shape, setting)
        spec = OpenVocabulary(
            dim=_DIM, base=_BASE, head_convs=options.head_convs, head_dim=options.head_dim, proposals=options.boxes,
            rois=options.rois,
        )  # fmt: skip
        names = [str(number) for number in range(len(_BASE))]
        texts = F.normalize(torch.randn(len(_BASE), _DIM), dim=1)
        self.network = open_vocabulary(self.network, spec, names=names, texts=texts)
        for target in self.target:
            target["labels"].clamp_(max=sum(_BASE) - 1)
        self.options = options
        self.cache = self._filled(folder)

    def _filled(self, folder: Path) -> EmbeddingCache:
        count = len(self.target)
        cache = open_cache({}, num_samples=count, dim=_DIM, directory=folder)
        blocks = block_boxes(self.pair.img_size)
        for shard in range(cache.num_shards):
            cache.write(shard, [self._regions(blocks) for _ in cache.images_of(shard)])
        return cache

    def _regions(self, blocks: Tensor) -> ImageRegions:
        objects, (height, width) = self.options.proposals_per_image, self.pair.img_size
        boxes = torch.cat([self._boxes(height, width)["boxes"] for _ in range(-(-objects // 8))])[:objects]
        whole, *rest = (torch.randn(number, _DIM) for number in (1, len(blocks), objects))
        return ImageRegions(whole[0], blocks, rest[0], boxes, rest[1], torch.rand(objects))

    def batch(self) -> dict[str, Any]:
        count = len(self.target)
        geometry = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(count, 4)  # views show whole pictures as they are
        return super().batch() | {"geometry": geometry, "view": torch.zeros(count, dtype=torch.int64)}

    def plain(self) -> Step:
        """The step of a plain loop on boxes alone."""
        net = copy.deepcopy(self.network).to(memory_format=self.setting.memory_format).train()
        for part in (net.second_stage.object_head, net.second_stage.object_embed):
            part.requires_grad_(False)
        image = self.pixels.to(torch.float32, memory_format=self.setting.memory_format) / 255.0
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], **SGD)

        def step() -> Tensor:
            with self.setting.autocast():
                losses: dict[str, Tensor] = net(image, self.target).losses
                loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return step

    def config(self) -> DistillConfig:  # type: ignore[override]
        plain = super().config()
        network = NetworkConfig(name=self.pair.model, pretrained=False)
        config = DistillConfig(student=network, teachers=[TeacherConfig(name="encoder")], method="oadp")
        for name in ("task", "optimizer", "schedule", "training", "compute"):
            setattr(config, name, getattr(plain, name))
        return config

    def module(self, config: Any, *, steps: int) -> Any:
        """visionkd's own training module."""
        return OADP(
            student=copy.deepcopy(self.network), teachers=(), task=DetectionTask(num_classes=len(_BASE)), config=config,
            options=self.options, regions=CachedRegions(self.cache, torch.arange(len(self.target))),
            budget=Budget(steps_per_epoch=steps, epochs=1),
        )  # fmt: skip


def contenders() -> list[Contender]:
    """Return the plain loop and visionkd's Trainer; two-stage detectors draw at random, so losses are not compared."""
    return [
        Contender(NAIVE, "boxes alone, plain loop", lambda given: given.plain(), distils=False),
        Contender(ONLINE, "visionkd distill, oadp", None, distils=False),
    ]
