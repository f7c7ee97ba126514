"""What an image-text encoder gives to a run: texts for the student's classes, and embeddings of the training images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from visionkd.config.schema import DistillConfig
from visionkd.data.loader import default_workers, eval_loader
from visionkd.data.subset import SubsetSource
from visionkd.data.views import eval_view
from visionkd.errors import DataError, Problem, RequestError
from visionkd.methods._oadp_regions import CachedRegions
from visionkd.methods.oadp import BASE, OADPOptions
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.open_heads import OpenVocabulary, base_first
from visionkd.models.detection.open_network import OpenVocabularyDetector, open_vocabulary
from visionkd.models.network import Network
from visionkd.teachers.embed import RegionOptions, check_encoder, fill
from visionkd.teachers.embedding_cache import EmbeddingCache, Proposals, open_cache
from visionkd.teachers.encoders import open_encoder, usual_templates, weights_hash
from visionkd.teachers.proposals import NMS_IOU, propose
from visionkd.teachers.pseudo_labels import PseudoLabelOptions, PseudoLabels, pseudo_labels
from visionkd.types import DataSet, Listener, Progress, Source
from visionkd.workflows._networks import load_network, seed_of
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._training import torch_device

#: Stage of a run in which the encoder is shown the training images.
STAGE = "embed"


class EncoderWork:
    """The encoder of a run.

    Args:
        config: Settings of the run.
        options: Of the method.
        data: Of the run.
        listener: Is told what happens.

    Raises:
        RequestError: If there is no such encoder, or it cannot read a class name.
        DownloadError: If its weights cannot be had.
    """

    def __init__(self, config: DistillConfig, options: OADPOptions, data: DataSet, listener: Listener) -> None:
        if len(config.teachers) != 1:
            said = f"oadp takes one image-text encoder, and {len(config.teachers)} are named"
            raise RequestError(Problem("--teacher", said))
        self.config, self.options, self.data, self.listener = config, options, data, listener
        self.name = config.teachers[0].name
        self.encoder = open_encoder(self.name, upsample=options.upsample)
        check_encoder(self.encoder)
        self.templates = options.templates or usual_templates(self.name)
        self.texts = self.encoder.encode_text(data.classes, self.templates)
        self.base = tuple(name not in data.novel for name in data.classes)
        self.detector = self._detector() if options.proposals is not None and options.distills else None
        if not data.novel:
            listener.message(
                "No class is novel (data.novel names some), so nothing says how well the student finds classes that it"
                " has no boxes of", level="warning",
            )  # fmt: skip

    def _detector(self) -> DetectionNetwork:
        """Load the detector whose proposals are taken."""
        name = str(self.options.proposals)
        network = load_network(name)
        hint = "Take one such as fasterrcnn_resnet50, trained on base boxes alone."
        if not isinstance(network, DetectionNetwork) or not hasattr(network.net, "rpn"):
            raise RequestError(Problem("options.proposals", f"'{name}' has no first stage that proposes boxes", hint))
        if isinstance(network, OpenVocabularyDetector):
            known = zip(network.classes or (), network.base, strict=True)
            leaked = sorted({each for each, base in known if base} & set(self.data.novel))
            if leaked:
                said = f"'{name}' was trained on boxes of novel classes: {', '.join(leaked[:5])}"
                raise RequestError(Problem("options.proposals", said, hint))
        return network

    def student(self, network: Network) -> OpenVocabularyDetector:
        """Return the student with the texts of the data's classes."""
        options = self.options
        spec = OpenVocabulary(
            dim=self.encoder.dim, base=self.base, head_convs=options.head_convs, head_dim=options.head_dim,
            scale=1 / options.temperature, eval_scale=1 / options.eval_temperature, base_power=options.calibration,
            novel_power=options.novel_calibration, proposals=options.boxes, rois=options.rois, encoder=self.name,
            identity=self.encoder.identity, templates=self.templates,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.config.training.seed, "open vocabulary"))
            return open_vocabulary(network, spec, names=self.data.classes, texts=self.texts.cpu())

    # Embeddings -------------------------------------------------------------------------------------------------------

    def regions(self, run: RunDirectory) -> tuple[CachedRegions, DataSet]:
        """Return what stands for the encoder in training, and the data without images that have nothing to learn.

        Args:
            run: Holds the student as it was trained on base boxes, where no other detector proposes, and the embeddings
                of its proposals.
        """
        source, detector = self.data.splits["train"], self.detector
        if detector is None:  # as it was written, so that a resumed run sees the same proposals to the bit
            detector = load_network(str(run.path / "stages" / BASE))
        cache = self._cache(detector, source, run)
        if run.writes:
            self._fill(cache, detector, source)
        elif cache.missing():
            raise DataError(f"{cache.directory} is not complete", hint="It must lie where all machines see it.")
        pseudo = self._pseudo(cache, len(source)) if self.options.pseudo_labels else None
        kept = self._with_boxes(source, pseudo)
        regions = CachedRegions(
            cache, torch.tensor(kept), objects=self.options.objects_per_image,
            pseudo=None if pseudo is None else [pseudo[index] for index in kept],
            released_block=self.options.block_box == "released", seed=self.config.training.seed,
        )  # fmt: skip
        return regions, self._without(source, kept)

    def _cache(self, detector: DetectionNetwork, source: Source, run: RunDirectory) -> EmbeddingCache:
        options, directory = self.options, None
        if options.embeddings is not None:
            directory = Path(options.embeddings).expanduser()
        elif self.detector is None:
            directory = run.path / "embeddings"
        key = self._region_options.key(self.encoder) | {
            "proposals": {
                "detector": weights_hash(detector.net), "size": list(detector.input.img_size),
                "most": options.proposals_per_image, "least_objectness": options.min_objectness, "nms": NMS_IOU,
            },
            "data": self.data.fingerprint,
        }  # fmt: skip
        about = {"encoder": self.name, "proposals": options.proposals or run.path.name, "data": self.data.name}
        return open_cache(key, num_samples=len(source), dim=self.encoder.dim, directory=directory, about=about)

    @property
    def _region_options(self) -> RegionOptions:
        options = self.options
        return RegionOptions(
            mode=options.crop, area_ratio=options.area_ratio, side=options.crop_side, cover=options.crop_cover
        )

    def _fill(self, cache: EmbeddingCache, detector: DetectionNetwork, source: Source) -> None:
        with cache.building():
            missing = cache.missing()
            if not missing:
                self.listener.message(f"Embeddings: those in {cache.directory} are taken")
                return
            device = torch_device(self.config.compute)
            workers = self.config.data.workers
            detector.to(device).eval()
            wanted = set(cache.missing("proposals")) & set(missing)
            for number, shard in enumerate(sorted(wanted)):
                cache.write_proposals(shard, self._proposals(detector, source, cache.images_of(shard), device))
                self.listener.progress(Progress("proposals", number + 1, len(wanted)))
            start, total = time.perf_counter(), sum(len(cache.images_of(shard)) for shard in missing)

            def tell(done: int, images: int, regions: int) -> None:
                rate = done / (time.perf_counter() - start)
                self.listener.progress(
                    Progress(STAGE, done, images, images_per_s=rate, eta_s=(images - done) / rate)
                )

            self.encoder.to(device)
            fill(
                cache, source, self.encoder, self._region_options,
                workers=default_workers() if workers is None else workers, progress=tell,
            )  # fmt: skip
            took = time.perf_counter() - start
            self.listener.message(f"Embeddings: {total:,} images in {took:.0f} s, kept in {cache.directory}")

    def _proposals(
        self, detector: DetectionNetwork, source: Source, images: range, device: torch.device
    ) -> list[Proposals]:
        found = {index: Proposals.none() for index in images}
        part = SubsetSource(source, np.array(images, np.int64))
        view = eval_view("detection", detector.input)
        for batch in eval_loader(part, view, batch_size=8, workers=0):
            if not len(batch["index"]):
                continue
            pixels = batch["image"].to(device).float().div_(255.0)
            answers = propose(detector, pixels, most=self.options.proposals_per_image)
            for place, answer, scale, size in zip(
                batch["index"].tolist(), answers, batch["scale"].tolist(), batch["size"].tolist(), strict=True
            ):
                found[images[place]] = self._on_picture(*answer, scale=scale, size=size)
        return [found[index] for index in images]

    def _on_picture(self, boxes: Tensor, objectness: Tensor, *, scale: float, size: Sequence[int]) -> Proposals:
        kept = objectness >= self.options.min_objectness
        brought = clip_boxes_to_image(boxes[kept] / scale, tuple(size))
        return Proposals(brought.cpu(), objectness[kept].cpu())

    # Boxes that nobody drew, and images without any -------------------------------------------------------------------

    def _pseudo(self, cache: EmbeddingCache, count: int) -> list[PseudoLabels]:
        options = PseudoLabelOptions(
            scale=self.options.pseudo_scale, class_power=self.options.pseudo_class_power,
            objectness_power=self.options.pseudo_objectness_power, nms_iou=self.options.pseudo_nms_iou,
            min_score=self.options.pseudo_min_score, proposals=self.options.proposals_per_image,
        )  # fmt: skip
        order = torch.tensor(base_first(self.base))
        texts = self.texts.cpu()[order]
        found = []
        for index in range(count):
            own = cache.read(index)
            boxes = pseudo_labels(
                own.object_boxes, own.objects, own.objectness, texts, num_base=sum(self.base), options=options
            )
            found.append(replace(boxes, labels=order[boxes.labels]))
        boxes, images = sum(len(each.labels) for each in found), sum(len(each.labels) > 0 for each in found)
        classes = len({label for each in found for label in each.labels.tolist()})
        text = f"Pseudo labels: {boxes:,} boxes of {classes} of the {len(self.data.novel)} novel classes in {images:,}"
        self.listener.message(f"{text} of {count:,} images", level="info" if boxes else "warning")
        return found

    def _with_boxes(self, source: Source, pseudo: Sequence[PseudoLabels] | None) -> list[int]:
        """Return the images that have a box of a base class, or one that the encoder found."""
        if not self.data.novel:  # then an image without boxes shows background, and that alone
            return list(range(len(source)))
        return [
            index
            for index in range(len(source))
            if len(source.target(index)["labels"]) or (pseudo is not None and len(pseudo[index].labels))
        ]

    def _without(self, source: Source, kept: Sequence[int]) -> DataSet:
        if len(kept) == len(source):
            return self.data
        if not kept:
            raise DataError("No training image has a box of a base class.", hint="Name fewer classes in data.novel.")
        self.listener.message(f"{len(source) - len(kept)} training images without boxes of base classes are left out")
        part: Any = SubsetSource(source, np.array(kept, np.int64))
        return replace(self.data, splits={**self.data.splits, "train": part})

    def data_of_base(self) -> DataSet:
        """Return the data for a training without embeddings."""
        source = self.data.splits["train"]
        return self._without(source, self._with_boxes(source, None))
