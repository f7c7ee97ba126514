"""G2SD: a student learns a masked autoencoder's hidden features on images alone, then a task from a tuned teacher.

Generic stage, without labels. The teacher is a whole masked autoencoder, stopped behind block k of its decoder; the
student has a lighter decoder and a small head on it, and both see the same patches:

    L_G = mean smoothL1_2(MLP(D_s) - LN(D_t))      over class token, kept and removed patches, and channels

Specific stage. The student's encoder gets a distillation token and two heads, and the teacher is the same network tuned
for the task:

    L_S = 1/2 [ CE(z_cls, y) + CE(z_dist, argmax z_t) ],   answers (z_cls + z_dist) / 2

or, with ``specific_loss: nkd``, normalised distillation of ``z_cls`` alone.

Huang, Peng, Dong, Wei, Jiao and Ye, "Generic-to-Specific Distillation of Masked Autoencoders", CVPR 2023,
arXiv 2302.14771.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from timm.layers import Mlp
from torch import Tensor, nn

from visionkd.config.schema import NonNegative, RunConfig
from visionkd.errors import Problem
from visionkd.losses.masked import hidden_feature_loss
from visionkd.methods._masked import MaskedModule, MaskedOptions, kept_text, masked_problems
from visionkd.methods._masked_teacher import MaskedTeacher, match_grid, pair_problems
from visionkd.methods._specific import SpecificStage
from visionkd.methods._stage import TrainingStage
from visionkd.models.distilled import distillation_problem, with_distillation_token
from visionkd.models.masked import Masking, initialize, plain_problem
from visionkd.models.masked_decoder import NO_DECODER_HINT, no_decoder_text
from visionkd.models.network import Network

_CROPS_AND_FLIPS = {
    "augment.mixup_alpha": 0.0,
    "augment.cutmix_alpha": 0.0,
    "augment.color_jitter": 0.0,
    "augment.randaugment_ops": 0,
    "augment.random_erasing": 0.0,
    "augment.scale": (0.2, 1.0),
}


@dataclass(frozen=True)
class G2SDOptions(MaskedOptions):
    """Options of ``g2sd``.

    Attributes:
        mask_ratio: Share of the patches that is removed; a fraction of a patch is removed too.
        visible_patches: Patches to keep, in place of the ratio.
        decoder_width: Channels of the student's decoder.
        decoder_depth: Its blocks.
        decoder_heads: Its attention heads.
        positions: ``sincos`` gives an untrained student the fixed table and does not train it in the generic stage.
        stages: ``both``, or ``generic`` or ``specific`` alone.
        generic_epochs: Epochs of the generic stage; None takes those of the configuration.
        generic_lr: Its learning rate; None takes that of the configuration.
        generic_warmup_epochs: Its warm-up; None takes that of the configuration.
        teacher_decoder_block: Block of the teacher's decoder to learn from, counted from 1; None takes the middle one.
        beta: Error below which the generic loss is quadratic.
        specific_loss: ``hard`` for the teacher's class, at a distillation token, or ``nkd``, without such a token.
        nkd_alpha: Weight of what ``nkd`` says about the other classes.
        nkd_temperature: Temperature of that.
    """

    decoder_width: Annotated[int, Field(ge=4)] = 256
    decoder_depth: Annotated[int, Field(ge=1)] = 4
    decoder_heads: Annotated[int, Field(ge=1)] = 8
    stages: Literal["both", "generic", "specific"] = "both"
    generic_epochs: Annotated[int, Field(ge=1)] | None = None
    generic_lr: Annotated[float, Field(gt=0.0)] | None = None
    generic_warmup_epochs: NonNegative | None = None
    teacher_decoder_block: Annotated[int, Field(ge=1)] | None = None
    beta: Annotated[float, Field(gt=0.0)] = 2.0
    specific_loss: Literal["hard", "nkd"] = "hard"
    nkd_alpha: NonNegative = 1.0
    nkd_temperature: Annotated[float, Field(gt=0.0)] = 1.0

    def decoder_block(self, depth: int) -> int:
        """Return the block of a decoder of this depth to learn from: 4 of 8 unless another is named."""
        return self.teacher_decoder_block or max(1, depth // 2)


def generic_teacher(teachers: Sequence[Network]) -> int | None:
    """Return which teacher is the whole masked autoencoder: the first one that has its decoder."""
    return next((number for number, teacher in enumerate(teachers) if teacher.masked_decoder is not None), None)


def specific_teacher(teachers: Sequence[Network]) -> int | None:
    """Return which teacher answers for the task: the first one without a decoder."""
    return next((number for number, teacher in enumerate(teachers) if teacher.masked_decoder is None), None)


def with_one_teacher(given: dict[str, Any], number: int | None) -> dict[str, Any]:
    """Return a module's arguments with one of the teachers, in the configuration too, which knows its precision."""
    assert number is not None, "the method's check refuses a run without it"
    config = given["config"]
    listed = [config.teachers[number]] if number < len(config.teachers) else config.teachers
    return {
        **given,
        "teachers": [given["teachers"][number]],
        "config": config.model_copy(update={"teachers": listed}),
    }


class G2SD(MaskedModule):
    """The generic stage, and what the method says about itself; :class:`SpecificStage` trains the second stage."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "probabilities"})
    uses_labels: ClassVar[bool] = True
    predicts_pixels: ClassVar[bool] = False
    Options: ClassVar[type] = G2SDOptions
    options: G2SDOptions

    def __init__(self, **given: Any) -> None:
        given = with_one_teacher(given, generic_teacher(given["teachers"]))
        (teacher,) = given["teachers"]
        self.__dict__["teacher_width"] = teacher.masked_decoder.spec.width
        super().__init__(**given)

    def build_parts(self) -> dict[str, nn.Module]:
        head = Mlp(self.options.decoder_width, self.teacher_width, self.teacher_width)
        initialize(head)
        return {**super().build_parts(), "feature_head": head}

    def prepare_teacher(self, teacher: Network) -> Any:
        block = self.options.decoder_block(teacher.masked_decoder.spec.depth)
        return MaskedTeacher(teacher, decoder_block=block).eval()

    def masked_terms(self, image: Tensor, found: Masking) -> dict[str, Tensor]:
        ((hidden,),) = self.teacher_features(image, found)
        decoded = self.projectors["decoder"](self.encoded(image, found).tokens, found.ids_restore)
        pred = self.projectors["feature_head"](decoded)
        loss = hidden_feature_loss(student_pred=pred, teacher_hidden=hidden, beta=self.options.beta)
        return {"generic_loss": loss}

    def loss_weights(self) -> Mapping[str, float]:
        return {"generic_loss": 1.0}

    # What the method says about itself --------------------------------------------------------------------------------

    @classmethod
    def stages(cls, config: RunConfig, options: G2SDOptions) -> tuple[TrainingStage, ...]:
        settings = {**_CROPS_AND_FLIPS, "optimizer.betas": (0.9, 0.95), "optimizer.layer_decay": None}
        if options.generic_lr is not None:
            settings["optimizer.lr"] = options.generic_lr
        if options.generic_warmup_epochs is not None:
            settings["schedule.warmup_epochs"] = options.generic_warmup_epochs
        alone = options.stages == "generic"
        generic = TrainingStage(
            "distill" if alone else "generic", "Distil the features", epochs=options.generic_epochs, kind="generic",
            settings=settings,
        )  # fmt: skip
        specific = TrainingStage("distill", "Distil the task", kind="specific")
        return {"both": (generic, specific), "generic": (generic,), "specific": (specific,)}[options.stages]

    @classmethod
    def module_of(cls, training: TrainingStage, options: G2SDOptions) -> type[Any]:
        return SpecificStage if training.kind == "specific" else cls

    @classmethod
    def prepare_student(
        cls, student: Network, training: TrainingStage, config: RunConfig, options: G2SDOptions
    ) -> Network:
        if training.kind != "specific":
            return student
        student.requires_grad_(True)
        student.masked_decoder = None
        if options.specific_loss == "nkd":
            return student
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.training.seed)
            made = with_distillation_token(student, classes=student.classes, num_classes=student.num_classes)
        return made.train()

    @classmethod
    def pretrains(cls, options: G2SDOptions) -> bool:
        return options.stages == "generic"

    @classmethod
    def asks(cls, teacher: Network, options: G2SDOptions) -> bool:
        return options.stages != "generic" and teacher.masked_decoder is None

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: G2SDOptions
    ) -> list[Problem]:
        generic, specific = generic_teacher(teachers), specific_teacher(teachers)
        problems = []
        if options.stages != "specific":
            problems += masked_problems(student, _generic_config(config, options), options)
            if generic is None:
                problems.append(Problem("--teacher", no_decoder_text(teachers[0]), NO_DECODER_HINT))
            else:
                problems += pair_problems(student, teachers[generic]) + _block_problems(teachers[generic], options)
        if options.stages != "generic":
            if specific is None:
                text = "the specific stage learns from a teacher that is tuned for the task, and there is none"
                hint = "Give both: --teacher MAE_RUN,TUNED_RUN, or -o options.stages=generic."
                problems.append(Problem("--teacher", text, hint))
            reason = plain_problem(student.net)
            if reason is not None and options.stages == "specific":
                problems.append(Problem("--student", f"'{student.architecture}' {reason}"))
            if reason is None and options.specific_loss == "hard" and (why := distillation_problem(student)):
                problems.append(Problem("--student", f"'{student.architecture}' {why}"))
        if len(teachers) > 2:
            problems.append(Problem("--teacher", f"g2sd takes two teachers at most, and {len(teachers)} are given"))
        return problems

    @classmethod
    def settle(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: G2SDOptions
    ) -> list[str]:
        if options.stages == "specific":
            return []
        teacher = teachers[generic_teacher(teachers) or 0]
        if options.stages == "generic":
            student.reset_classifier(0)
        depth = teacher.masked_decoder.spec.depth
        block = options.decoder_block(depth)
        said = [kept_text(student, options), *match_grid(student, teacher)]
        return [*said, f"The generic teacher ends behind block {block} of {depth} of its decoder"]


def _generic_config(config: RunConfig, options: G2SDOptions) -> RunConfig:
    """Return the configuration that the checks of masked training are about."""
    if options.stages == "generic":
        return config
    keep = config.training.model_copy(update={"keep": "last"})
    plain = config.augment.model_copy(update={"mixup_alpha": 0.0, "cutmix_alpha": 0.0})
    export = config.export.model_copy(update={"formats": ()})
    return config.model_copy(update={"training": keep, "augment": plain, "export": export})


def _block_problems(teacher: Network, options: G2SDOptions) -> list[Problem]:
    depth = teacher.masked_decoder.spec.depth
    if options.decoder_block(depth) <= depth:
        return []
    text = f"the decoder of '{teacher.architecture}' has no block {options.teacher_decoder_block}"
    return [Problem("options.teacher_decoder_block", text, f"Its {depth} blocks are counted from 1.")]


METHOD = G2SD
