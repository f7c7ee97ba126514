"""SSLD: distillation from soft labels alone, so that images without labels serve as well as those with them.

    L = 1/2 [ KL(p_t || p_s) + KL(p_s || p_t) ],    p = softmax(z)

which the paper calls JS divergence; it is the symmetric KL divergence, and not the one through the mixture. With
``divergence: soft_ce`` it becomes the cross-entropy ``-sum_c p_t log p_s``, as in the authors' later recipes.

Stage 1 trains on labelled and unlabelled images together. Stage 2, where ``finetune_epochs`` asks for it, goes on with
the same loss on the images of the labelled data set alone, at a hundredth of the learning rate.

Cui, Guo, Du, He, Li, Wu, Liu, Wen, Huang, Hu, Yu, Ding and Ma, "Beyond Self-Supervision: A Simple Yet Effective Network
Distillation Alternative to Improve Backbones", 2021, arXiv 2103.05959.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionkd.config.schema import RunConfig
from visionkd.losses.distillation import soft_cross_entropy
from visionkd.losses.symmetric_kl import symmetric_kl_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._stage import TrainingStage
from visionkd.models.network import Network
from visionkd.types import Output


@dataclass(frozen=True)
class SSLDOptions:
    """Options of ``ssld``.

    Attributes:
        divergence: ``symmetric_kl``, the paper's, or ``soft_ce``, that of the authors' later recipes.
        teacher_mode: ``eval``, or the authors' ``train``: the teacher's batch norms take the statistics of the batch.
            Its labels then depend on the batch, so no label store can hold them.
        finetune_epochs: Epochs of stage 2, on the labelled data set's images alone; 0 leaves it out.
        finetune_lr_ratio: Learning rate of stage 2 as a share of stage 1's.
    """

    divergence: Literal["symmetric_kl", "soft_ce"] = "symmetric_kl"
    teacher_mode: Literal["eval", "train"] = "eval"
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01


class SSLD(DistillationModule):
    """Symmetric KL divergence from the teachers' averaged probabilities."""

    uses_labels: ClassVar[bool] = False
    Options: ClassVar[type] = SSLDOptions
    options: SSLDOptions

    def prepare_teacher(self, teacher: Network) -> Network:
        if self.options.teacher_mode == "eval":
            return super().prepare_teacher(teacher)
        # a copy, because its running statistics drift; the teacher itself is compared and described afterwards
        drifting = copy.deepcopy(teacher).eval()
        for module in _batch_norms(drifting):
            module.training = True  # of the norm alone: train() would switch on dropout that a norm carries
        return drifting

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        assert student.logits is not None
        loss = symmetric_kl_loss if self.options.divergence == "symmetric_kl" else soft_cross_entropy
        return {"ssld_loss": loss(student_logits=student.logits, teacher_probs=self.soft_label(teachers))}

    def loss_weights(self) -> Mapping[str, float]:
        return {"task_loss": 0.0, "ssld_loss": 1.0}

    @classmethod
    def can_store_labels(cls, options: SSLDOptions) -> bool:
        return options.teacher_mode == "eval"

    @classmethod
    def stages(cls, config: RunConfig, options: SSLDOptions) -> tuple[TrainingStage, ...]:
        first = TrainingStage("distill", "Distil")
        if not options.finetune_epochs:
            return (first,)
        again = TrainingStage(
            "finetune",
            "Distil once more, at a low rate",
            epochs=options.finetune_epochs,
            lr_ratio=options.finetune_lr_ratio,
            labeled_only=True,
        )
        return (first, again)

    @classmethod
    def warnings(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: SSLDOptions
    ) -> list[str]:
        found = []
        if options.teacher_mode == "train":
            without = [teacher.architecture for teacher in teachers if not _batch_norms(teacher)]
            if without:
                found.append(f"teacher_mode: train changes nothing for {', '.join(without)}, which has no batch norm")
        if options.finetune_epochs and config.data.unlabeled is None:
            found.append(
                "finetune_epochs is there to come back from unlabelled images, and there are none (--unlabeled DIR):"
                f" {options.finetune_epochs} more epochs on the same images at a low learning rate follow"
            )
        return found


def _batch_norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


METHOD = SSLD
