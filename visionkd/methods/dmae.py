"""DMAE: a masked autoencoder that also learns to have its teacher's features, on the few patches that both see.

    L = L_rec + alpha * sum_b mean | P_b(S_b) / |P_b(S_b)| - T_b / |T_b| |

``S_b`` and ``T_b`` are outputs of aligned encoder blocks on the visible patches and the class token (before any final
norm), ``P_b`` a linear projection, norms run over channels. ``L_rec`` is the masked autoencoder's own loss. The teacher
is frozen and runs no further than its last aligned block; it needs neither decoder nor labels.

Bai, Wang, Xiao, Wei, Wang, Yuille, Zhou and Xie, "Masked Autoencoders Enable Efficient Knowledge Distillers",
CVPR 2023, arXiv 2208.12256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from visionkd.config.schema import NonNegative, RunConfig
from visionkd.errors import Problem
from visionkd.losses.masked import alignment_loss
from visionkd.methods._masked import MaskedModule, MaskedOptions, masked_problems
from visionkd.methods._masked_teacher import MaskedTeacher, match_grid, pair_problems, three_quarters
from visionkd.models.masked import Masking, plain_problem
from visionkd.models.network import Network

Blocks = tuple[Annotated[int, Field(ge=0)], ...]


@dataclass(frozen=True)
class DMAEOptions(MaskedOptions):
    """Options of ``dmae``.

    Attributes:
        mask_ratio: Share of the patches that is removed, up to 0.98 of 196; a fraction of a patch is removed too.
        visible_patches: Patches to keep, in place of the ratio.
        decoder_width: Channels of the student's decoder.
        decoder_depth: Its blocks.
        decoder_heads: Its attention heads.
        positions: ``sincos`` gives an untrained student the fixed table and never trains it, ``learned`` trains it.
        normalize_pixels: Reconstruct each patch without its mean and spread.
        student_blocks: Aligned blocks of the student, counted from 0; None takes three quarters of its depth.
        teacher_blocks: Those of the teacher, one for each of the student's.
        projection: ``linear``, a hidden layer more (``mlp``), or ``none``, which compares features as they are.
        distance: ``l1``, or squared ``l2``.
        alignment_weight: alpha.
    """

    normalize_pixels: bool = False
    student_blocks: Blocks | None = None
    teacher_blocks: Blocks | None = None
    projection: Literal["linear", "mlp", "none"] = "linear"
    distance: Literal["l1", "l2"] = "l1"
    alignment_weight: NonNegative = 1.0

    def aligned(self, student: Network, teacher: Network) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the aligned blocks of both."""
        depths = [len(network.net.blocks) for network in (student, teacher)]
        given = (self.student_blocks, self.teacher_blocks)
        own, theirs = (
            (three_quarters(depth),) if blocks is None else blocks for blocks, depth in zip(given, depths, strict=True)
        )
        return own, theirs


class DMAE(MaskedModule):
    """Reconstruction and feature alignment on visible patches."""

    Options: ClassVar[type] = DMAEOptions
    options: DMAEOptions

    def __init__(self, *, student: Network, teachers: Sequence[Network], options: DMAEOptions, **rest: Any) -> None:
        own, theirs = options.aligned(student, teachers[0])
        given = {"student_blocks": own, "teacher_blocks": theirs, "teacher_width": teachers[0].net.embed_dim}
        self.__dict__.update(given)  # before the base, which asks for the modules first
        super().__init__(student=student, teachers=teachers, options=options, **rest)

    def build_parts(self) -> dict[str, nn.Module]:
        heads = [self._projection() for _ in self.student_blocks]
        return {**super().build_parts(), **({} if None in heads else {"projections": nn.ModuleList(heads)})}

    def _projection(self) -> nn.Module | None:
        width_in, width_out = self.student.net.embed_dim, self.teacher_width
        if self.options.projection == "none":
            return None
        if self.options.projection == "linear":
            return nn.Linear(width_in, width_out)
        return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))

    def prepare_teacher(self, teacher: Network) -> Any:
        return MaskedTeacher(teacher, blocks=self.teacher_blocks).eval()

    def masked_terms(self, image: Tensor, found: Masking) -> dict[str, Tensor]:
        (theirs,) = self.teacher_features(image, found)
        reconstruction, own = self.reconstruction(image, found, blocks=self.student_blocks)
        heads = self.projectors["projections"] if "projections" in self.projectors else None
        alignment = reconstruction.new_zeros(())
        for number, (student, teacher) in enumerate(zip(own, theirs, strict=True)):
            alignment = alignment + alignment_loss(
                student_feature=student if heads is None else heads[number](student), teacher_feature=teacher,
                distance=self.options.distance, normalize=heads is not None,
            )  # fmt: skip
        return {"reconstruction_loss": reconstruction, "alignment_loss": alignment}

    def loss_weights(self) -> Mapping[str, float]:
        return {"reconstruction_loss": 1.0, "alignment_loss": self.options.alignment_weight}

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: DMAEOptions
    ) -> list[Problem]:
        problems = masked_problems(student, config, options)
        if len(teachers) != 1:
            problems.append(Problem("--teacher", f"dmae learns from one teacher, and {len(teachers)} are given"))
        problems += pair_problems(student, teachers[0])
        if any(plain_problem(network.net) for network in (student, teachers[0])):
            return problems
        return problems + _block_problems(student, teachers[0], options)

    @classmethod
    def settle(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: DMAEOptions
    ) -> list[str]:
        said = super().settle(student=student, teachers=teachers, config=config, options=options)
        own, theirs = options.aligned(student, teachers[0])
        depths = [len(network.net.blocks) for network in (student, teachers[0])]
        return [
            *said,
            *match_grid(student, teachers[0]),
            f"Aligned blocks, counted from 0: {_named(own)} of the student's {depths[0]}, {_named(theirs)} of the"
            f" teacher's {depths[1]}, of which {max(theirs) + 1} run",
        ]


def _block_problems(student: Network, teacher: Network, options: DMAEOptions) -> list[Problem]:
    own, theirs = options.aligned(student, teacher)
    problems = []
    for role, network, blocks in (("student", student, own), ("teacher", teacher, theirs)):
        depth = len(network.net.blocks)
        outside = [block for block in blocks if block >= depth]
        key = f"options.{role}_blocks"
        if outside:
            text = f"'{network.architecture}' has no block {outside[0]}"
            problems.append(Problem(key, text, f"Its {depth} blocks are counted from 0 to {depth - 1}."))
        elif not blocks or len(set(blocks)) != len(blocks):
            problems.append(Problem(key, "names no block, or one twice", "Leave it out to take three quarters."))
    if len(own) != len(theirs):
        text = f"{len(theirs)} blocks for {len(own)} of the student's"
        problems.append(Problem("options.teacher_blocks", text, "Give as many."))
    widths = (student.net.embed_dim, teacher.net.embed_dim)
    if options.projection == "none" and widths[0] != widths[1]:
        text = f"'none' compares features of the same width, and these are {widths[0]} and {widths[1]} wide"
        problems.append(Problem("options.projection", text, "Take linear."))
    return problems


def _named(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))


METHOD = DMAE
