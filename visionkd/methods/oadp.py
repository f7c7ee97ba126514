"""OADP: a detector that learns boxes of base classes alone, and of an image-text encoder what all else looks like.

    L = L_det + w_O L_O + w_B (L_B + L_R + ASL_B) + w_G (L_G + ASL_G)

L_det are the detector's own losses, with the classes' texts as its classifier. L_O, L_B and L_G bring its embeddings of
proposals, of the blocks of a pyramid over the image and of the whole image to those of the encoder, L_R the relations
between blocks, and ASL names the base classes that a block or an image shows. What the encoder says of an image is
computed once; see :mod:`visionkd.losses.oadp` for the terms and their weights in time.

Wang, Liu, Du, Ding, Liao, Qi, Chen and Liu, "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection",
CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionkd.config.schema import Fraction, NonNegative, Positive, RunConfig
from visionkd.errors import Problem
from visionkd.losses.oadp import WEIGHTS, Weight, asymmetric_loss, embedding_loss, global_loss, relation_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._oadp_heads import labels_shown, region_heads
from visionkd.methods._oadp_regions import CachedRegions
from visionkd.methods._stage import TrainingStage
from visionkd.models.detection.open_heads import base_first
from visionkd.models.detection.open_network import OpenVocabularyDetector, kind_problem
from visionkd.models.network import Network
from visionkd.teachers.regions import block_labels

Above = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
#: The stage that trains on base boxes alone, whose proposals the encoder is shown.
BASE = "base"


@dataclass(frozen=True)
class OADPOptions:
    """Options of ``oadp``; the values are the authors' for COCO, apart from what is said of ``templates`` and
    ``base_epochs``.

    Attributes:
        object_loss_weight: ``w_O``, of the mean absolute difference on proposals.
        block_loss_weight: Of that on blocks.
        block_relation_loss_weight: Of the relations between blocks.
        block_label_loss_weight: Of the classes that blocks show.
        global_loss_weight: Of the squared difference on whole images, which is a sum over the batch of a device.
        global_label_loss_weight: Of the classes that images show.
        warmup_scale: Factor of the steps in which the weights grow; they were chosen for 40,000 steps.
        loss_schedule: ``released`` leaves the weights of both label losses at what they are in the first step, as the
            released code does by mistake.
        block_box: ``released`` takes the box of an image's first block as the released code writes it, which is wrong
            for all images that are not square.
        calibration: Share of the head that learned from boxes in the score of a base class, and of the other head in
            that of a novel class; null leaves the other head out.
        novel_calibration: Share of the head that learned from boxes in the score of a novel class; null takes
            ``1 - calibration``.
        pseudo_labels: Learn boxes of novel classes that the encoder finds among the proposals.
        pseudo_scale: Factor of the cosines in the softmax that names a proposal.
        pseudo_class_power: Exponent of the probability of its class.
        pseudo_objectness_power: Exponent of its objectness.
        pseudo_nms_iou: Overlap above which the lower of two pseudo boxes of a class is dropped.
        pseudo_min_score: Pseudo boxes need more than this.
        templates: What class names are put into; null takes "a {}", and a few phrases about photographs for encoders of
            open_clip.
        temperature: What cosines of boxes and texts are divided by in training.
        eval_temperature: That at inference.
        label_scale: Factor of the cosines with texts in the label losses.
        label_bias: Taken off those logits.
        head_convs: Convolutions of the heads that look at a box.
        head_dim: Width of the layer behind them.
        boxes: Boxes that the second stage looks at in an image, in training and at inference.
        rois: Of these, how many it learns from.
        proposals: Two-stage detector, trained on base boxes alone, whose first stage says what the encoder is shown;
            null trains the student on base boxes first, and takes it.
        base_epochs: Epochs of that training; null takes a quarter of the run's.
        proposals_per_image: Most of them in an image.
        min_objectness: Proposals below are left out.
        objects_per_image: Proposals of an image that a step learns from, drawn at random; null takes all.
        crop: ``adaptive`` cuts a square of ``area_ratio`` areas of its proposal, ``constant`` one of ``crop_side``
            pixels.
        area_ratio: See ``crop``.
        crop_side: See ``crop``.
        crop_cover: Make no crop shorter than its proposal.
        upsample: How many times more patches along a side the encoder gets of such a crop.
        embeddings: Directory of the embeddings; null takes one in the cache that belongs to what they follow from.
    """

    object_loss_weight: NonNegative = WEIGHTS["object_loss"].gain
    block_loss_weight: NonNegative = WEIGHTS["block_loss"].gain
    block_relation_loss_weight: NonNegative = WEIGHTS["block_relation_loss"].gain
    block_label_loss_weight: NonNegative = WEIGHTS["block_label_loss"].gain
    global_loss_weight: NonNegative = WEIGHTS["global_loss"].gain
    global_label_loss_weight: NonNegative = WEIGHTS["global_label_loss"].gain
    warmup_scale: Above = 1.0
    loss_schedule: Literal["intended", "released"] = "intended"
    block_box: Literal["corrected", "released"] = "corrected"
    calibration: Fraction | None = 2 / 3
    novel_calibration: Fraction | None = None
    pseudo_labels: bool = False
    pseudo_scale: Above = 20.0
    pseudo_class_power: NonNegative = 0.306
    pseudo_objectness_power: NonNegative = 0.758
    pseudo_nms_iou: Fraction = 0.497
    pseudo_min_score: Fraction = 0.5
    templates: tuple[str, ...] | None = None
    temperature: Above = 0.007
    eval_temperature: Above = 0.01
    label_scale: Above = 20.0
    label_bias: float = 4.0
    head_convs: Annotated[int, Field(ge=0, le=8)] = 4
    head_dim: Positive = 1024
    boxes: tuple[Positive, Positive] = (1000, 1000)
    rois: Positive = 512
    proposals: str | None = None
    base_epochs: Positive | None = None
    proposals_per_image: Positive = 100
    min_objectness: Fraction = 0.0
    objects_per_image: Positive | None = None
    crop: Literal["adaptive", "constant"] = "adaptive"
    area_ratio: Above = 8.0
    crop_side: Above | None = None
    crop_cover: bool = False
    upsample: Annotated[int, Field(ge=1, le=4)] = 2
    embeddings: str | None = None

    def weights(self) -> dict[str, Weight]:
        """Return the weights of the terms that count, by their names."""
        found = {}
        for name, usual in WEIGHTS.items():
            gain = getattr(self, f"{name}_weight")
            if gain:
                steps = max(1, round(usual.warmup_steps * self.warmup_scale))
                found[name] = Weight(gain, steps, stuck=usual.stuck)
        return found

    @property
    def distills(self) -> bool:
        """Whether the encoder has to see the training images."""
        return bool(self.weights()) or self.pseudo_labels


class OADP(DistillationModule):
    """Trains an :class:`visionkd.models.detection.open_network.OpenVocabularyDetector`.

    Args:
        student: The detector.
        options: Of the method.
        regions: Stands for the encoder; None where nothing is distilled.
        rest: As for the base.
    """

    tasks: ClassVar[frozenset[str]] = frozenset({"detection"})
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    takes_encoder: ClassVar[bool] = True
    default_weight_decay: ClassVar[float | None] = 2.5e-5
    Options: ClassVar[type] = OADPOptions
    options: OADPOptions
    student: OpenVocabularyDetector

    def __init__(
        self,
        *,
        student: OpenVocabularyDetector,
        options: OADPOptions,
        regions: CachedRegions | None = None,
        **rest: Any,
    ) -> None:
        self.__dict__["terms"] = weights = self.active(options)
        self.__dict__["regions"] = regions
        learns_objects = "object_loss" in weights
        # before the base copies the student: an averaged one is to answer in the same way
        student.calibrate(options.calibration if learns_objects else None, options.novel_calibration)
        student.learn_novel(self.learns_novel(options))
        heads = student.second_stage
        for part in (heads.object_head, heads.object_embed):
            part.requires_grad_(learns_objects)
        super().__init__(student=student, options=options, **rest)
        #: Step of the optimiser, counted from 1.
        self._step_number = 1

    @classmethod
    def active(cls, options: OADPOptions) -> dict[str, Weight]:
        """Return the weights of the terms that this training has beside the detector's own losses."""
        return options.weights()

    @classmethod
    def learns_novel(cls, options: OADPOptions) -> bool:
        """Whether there are boxes of novel classes."""
        return options.pseudo_labels

    def build_modules(self) -> nn.Module:
        block = any(name.startswith("block") for name in self.terms)
        whole = any(name.startswith("global") for name in self.terms)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.training.seed)
            return region_heads(
                self.student, block=block, whole=whole, label_scale=self.options.label_scale,
                label_bias=self.options.label_bias, learn_novel=self.learns_novel(self.options),
            )  # fmt: skip

    # A step -----------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return self.regions.look_up(batch) if self.regions is not None and self.training else batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._seed_step(batch_idx)
        done = batch_idx // self.config.training.accumulate
        self._step_number = self.current_epoch * self.budget.steps_per_epoch + done + 1
        return self.total(self.region_terms(batch))

    def region_terms(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the detector and return all terms, unweighted, for a batch with ``regions``."""
        target, regions = batch["target"], batch.get("regions")
        output, maps = self.student.learn(batch["image"], target)
        terms = {"task_loss": self.task.loss(output, target)}
        if regions is None:
            return terms
        if "object_loss" in self.terms:
            found = self.student.second_stage.object_embeddings(maps, regions["object_boxes"])
            terms["object_loss"] = embedding_loss(student_embedding=found, teacher_embedding=regions["objects"])
        if "block" in self.projectors:
            terms |= self._block_terms(maps, regions, target)
        if "whole" in self.projectors:
            terms |= self._whole_terms(maps, regions, target)
        return {name: value for name, value in terms.items() if name == "task_loss" or name in self.terms}

    def _block_terms(
        self, maps: Mapping[str, Tensor], regions: Mapping[str, Any], target: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        found = self.projectors["block"](maps, regions["block_boxes"])
        given = {"student_embedding": found, "teacher_embedding": regions["blocks"]}
        terms = {"block_loss": embedding_loss(**given), "block_relation_loss": relation_loss(**given)}
        if "block_label_loss" in self.terms:
            shown = [
                block_labels(blocks, own["boxes"], own["labels"], self.student.num_classes)
                for blocks, own in zip(regions["block_boxes"], target, strict=True)
            ]
            terms["block_label_loss"] = self._label_loss(found, torch.cat(shown))
        return terms

    def _whole_terms(
        self, maps: Mapping[str, Tensor], regions: Mapping[str, Any], target: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        found = self.projectors["whole"](maps)
        terms = {"global_loss": global_loss(student_embedding=found, teacher_embedding=regions["whole"])}
        if "global_label_loss" in self.terms:
            shown = torch.stack([labels_shown(own["labels"], self.student.num_classes) for own in target])
            terms["global_label_loss"] = self._label_loss(found, shown)
        return terms

    def _label_loss(self, embedding: Tensor, shown: Tensor) -> Tensor:
        logits = self.projectors["labels"](embedding)  # base classes first
        return asymmetric_loss(student_logits=logits, target=shown[:, base_first(self.student.base)])

    def loss_weights(self) -> Mapping[str, float]:
        released = self.options.loss_schedule == "released"
        weights = {name: weight.at(self._step_number, released=released) for name, weight in self.terms.items()}
        return {"task_loss": 1.0, **weights}

    # What the method says about itself --------------------------------------------------------------------------------

    @classmethod
    def stages(cls, config: RunConfig, options: OADPOptions) -> tuple[TrainingStage, ...]:
        last = TrainingStage("distill", "Distil" if options.distills else "Train on base boxes")
        if options.proposals is not None or not options.distills:
            return (last,)
        epochs = options.base_epochs or max(1, config.training.epochs // 4)
        return TrainingStage(BASE, "Learn base boxes", epochs=epochs, kind=BASE), last

    @classmethod
    def module_of(cls, training: TrainingStage, options: OADPOptions) -> type[Any]:
        return BaseBoxes if training.kind == BASE else cls

    @classmethod
    def can_store_labels(cls, options: OADPOptions) -> bool:
        return False  # the encoder's embeddings have a cache of their own

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: OADPOptions
    ) -> list[Problem]:
        problems = []
        if problem := kind_problem(student):
            problems.append(Problem("--student", problem, "Take one such as fasterrcnn_resnet50."))
        if options.crop == "constant" and options.crop_side is None:
            problems.append(Problem("options.crop_side", "is missing, and crops are to be constant", "Give pixels."))
        whole = "embeddings are of whole images, and a view would show a part"
        refused = {
            "detection.scale": (options.distills and config.detection.scale[1] > 1, whole, "Leave it at most at 1."),
            "detection.iou_crop": (options.distills and config.detection.iou_crop > 0, whole, "Leave it at 0."),
            "training.compile": (config.training.compile, "is not supported by oadp", "Leave it out."),
            "compute.strategy": (config.compute.strategy == "fsdp", "oadp does not go with fsdp", "Take ddp."),
        }
        problems += [Problem(key, said, hint) for key, (wrong, said, hint) in refused.items() if wrong]
        return problems

    @classmethod
    def settle(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: OADPOptions
    ) -> list[str]:
        if options.loss_schedule == "released" or options.block_box == "released":
            return ["Mistakes of the released code are repeated, as the options ask for"]
        return []


class BaseBoxes(OADP):
    """The training before: base boxes alone, for proposals that no box of a novel class had a part in."""

    @classmethod
    def active(cls, options: OADPOptions) -> dict[str, Weight]:
        return {}

    @classmethod
    def learns_novel(cls, options: OADPOptions) -> bool:
        return False


METHOD = OADP
