"""What masked pre-training and its distillation share: which patches are kept, the decoder, and validation by the loss.

The student is a plain vision transformer of timm; it is packaged as it is, without a classifier. Its decoder trains
beside it and is kept in the package, since a later distillation may learn from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem
from visionkd.losses.masked import masked_pixel_loss, normalized_patches, patchify
from visionkd.methods._base import DistillationModule
from visionkd.methods._reconstructions import IMAGES, write_reconstructions
from visionkd.models.masked import (
    Encoded,
    Masking,
    encode,
    final_norm,
    initialize_encoder,
    kept_patches,
    masking,
    plain_problem,
    set_sincos_positions,
    take,
)
from visionkd.models.masked_decoder import DecoderSpec, SavedDecoder, new_decoder
from visionkd.models.network import Network
from visionkd.tasks.pretraining import Pretraining


@dataclass(frozen=True)
class MaskedOptions:
    """Options of every masked objective.

    Attributes:
        mask_ratio: Share of the patches that is removed; a fraction of a patch is removed too.
        visible_patches: Patches to keep, in place of the ratio.
        decoder_width: Channels of the student's decoder.
        decoder_depth: Its blocks.
        decoder_heads: Its attention heads.
        positions: ``sincos`` gives an untrained student the fixed table and never trains it, ``learned`` trains it.
    """

    mask_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.75
    visible_patches: Annotated[int, Field(ge=1)] | None = None
    decoder_width: Annotated[int, Field(ge=4)] = 512
    decoder_depth: Annotated[int, Field(ge=1)] = 8
    decoder_heads: Annotated[int, Field(ge=1)] = 16
    positions: Literal["sincos", "learned"] = "sincos"


class MaskedModule(DistillationModule):
    """Trains an encoder on visible patches; a method adds :meth:`masked_terms`."""

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    uses_labels: ClassVar[bool] = False
    #: Whether the student's decoder predicts pixels.
    predicts_pixels: ClassVar[bool] = True
    Options: ClassVar[type] = MaskedOptions
    options: Any

    def __init__(self, *, student: Network, config: RunConfig, options: Any, task: Any = None, **rest: Any) -> None:
        prepare_encoder(student, options, seed=config.training.seed)
        # averaged weights would be those of an encoder that its decoder does not know
        training = config.training.model_copy(update={"ema_decay": None})
        super().__init__(
            student=student, config=config.model_copy(update={"training": training}), options=options,
            task=Pretraining(), **rest,
        )  # fmt: skip
        self.keep = kept(options, student.net.patch_embed.num_patches)

    def build_modules(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.training.seed)
            return nn.ModuleDict(self.build_parts())

    def build_parts(self) -> dict[str, nn.Module]:
        """Return what trains beside the encoder; randomness comes from the run's seed."""
        return {"decoder": new_decoder(self.student.net, self.decoder_spec(), predicts=self.predicts_pixels)}

    def decoder_spec(self) -> DecoderSpec:
        """Return the size of the student's decoder."""
        options = self.options
        normalized = getattr(options, "normalize_pixels", None)
        return DecoderSpec(
            options.decoder_width, options.decoder_depth, options.decoder_heads, normalize_pixels=normalized
        )

    # A step -----------------------------------------------------------------------------------------------------------

    def loss_terms(self, image: Tensor, target: Any = None, teacher_probs: Tensor | None = None) -> dict[str, Tensor]:
        noise = torch.rand(len(image), self.student.net.patch_embed.num_patches, device=image.device)
        return self.masked_terms(image, masking(noise, self.keep))

    def masked_terms(self, image: Tensor, found: Masking) -> dict[str, Tensor]:
        """Return all terms, unweighted, for images in [0, 1] and the patches that are kept of them."""
        raise NotImplementedError

    def encoded(self, image: Tensor, found: Masking) -> Encoded:
        """Run the student's encoder on the kept patches of images in [0, 1]."""
        return encode(self.student.net, self.student.prepare(image), found.ids_keep)

    def reconstruction(
        self, image: Tensor, found: Masking, *, blocks: Sequence[int] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss on removed pixels, and the outputs of the encoder's ``blocks``."""
        prepared, net, decoder = self.student.prepare(image), self.student.net, self.projectors["decoder"]
        encoded = encode(net, prepared, found.ids_keep, blocks=blocks)
        # kept patches are not asked about, so they are not predicted either
        pred = decoder.predict(decoder(encoded.tokens, found.ids_restore), found.ids_removed)
        target = take(patchify(prepared, net.patch_embed.patch_size), found.ids_removed)
        if self.options.normalize_pixels:
            target = normalized_patches(target.float())
        removed = pred.new_ones(pred.shape[:2])
        return masked_pixel_loss(student_pred=pred, target=target, mask=removed), encoded.features

    def teacher_features(self, image: Tensor, found: Masking) -> tuple[tuple[Tensor, ...], ...]:
        """Return each teacher's features of the kept patches, without gradient and in its own precision."""
        with torch.no_grad():
            return self.frozen.run(image, extra=(found.ids_keep, found.ids_restore))  # type: ignore[return-value]

    # Evaluation -------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        if not len(image):
            return
        # the same patches are removed each time, so that losses compare
        noise = torch.rand(
            len(image), self.student.net.patch_embed.num_patches, generator=torch.Generator().manual_seed(batch_idx)
        )
        found = masking(noise.to(image.device), self.keep)
        terms, weights = self.masked_terms(image, found), self.loss_weights()
        loss = torch.stack([term.float() * weights[name] for name, term in terms.items()]).sum()
        self._val_loss.append(torch.stack([loss * len(image), loss.new_tensor(float(len(image)))]))
        if batch_idx == 0 and self.predicts_pixels and self.global_rank == 0:
            self._write_pictures(image[:IMAGES], found)

    def _write_pictures(self, image: Tensor, found: Masking) -> None:
        directory = getattr(self.trainer, "default_root_dir", None)
        if directory is None:
            return
        parts = (found.ids_keep, found.ids_removed, found.ids_restore, found.mask)
        few = Masking(*(part[: len(image)] for part in parts))
        net, decoder = self.student.net, self.projectors["decoder"]
        prepared = self.student.prepare(image)
        pred = decoder.predict(decoder(encode(net, prepared, few.ids_keep).tokens, few.ids_restore)).float()
        if self.options.normalize_pixels:  # it predicts what is left of a patch without its mean and spread
            variance, mean = torch.var_mean(patchify(prepared, net.patch_embed.patch_size), dim=-1, keepdim=True)
            pred = pred * (variance + 1e-6).sqrt() + mean
        write_reconstructions(
            Path(directory), network=self.student, prepared=prepared, pred=pred, mask=few.mask,
            epoch=self.current_epoch + 1, kept=self.keep, normalized=self.options.normalize_pixels,
        )  # fmt: skip

    @property
    def deployed_student(self) -> Network:
        """The encoder, with the decoder that goes into its package."""
        self.student.masked_decoder = self.saved_decoder()
        return self.student

    def saved_decoder(self) -> SavedDecoder | None:
        """Return the decoder to keep beside the encoder."""
        return self.projectors["decoder"].saved() if self.predicts_pixels else None

    # What it says about itself ----------------------------------------------------------------------------------------

    @classmethod
    def pretrains(cls, options: Any) -> bool:
        return True

    @classmethod
    def asks(cls, teacher: Network, options: Any) -> bool:
        return False

    @classmethod
    def check(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[Problem]:
        return masked_problems(student, config, options)

    @classmethod
    def settle(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[str]:
        student.reset_classifier(0)
        return [kept_text(student, options)]


def kept(options: Any, num_patches: int) -> int:
    """Return how many patches are kept."""
    return options.visible_patches or kept_patches(num_patches, options.mask_ratio)


def kept_text(student: Network, options: Any) -> str:
    """Say how many patches the encoder sees."""
    total = student.net.patch_embed.num_patches
    count = kept(options, total)
    return f"{count} of {total} patches of each image are kept ({100 * (1 - count / total):.1f} % are removed)"


def prepare_encoder(student: Network, options: Any, *, seed: int) -> None:
    """Give an untrained student the weights and positions that masked training begins with; train what it uses."""
    net: Any = student.net
    if not student.trained:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            initialize_encoder(net)
        if options.positions == "sincos":
            set_sincos_positions(net)
    net.requires_grad_(False)
    parts = (net.patch_embed, net.cls_token, net.reg_token, net.norm_pre, net.blocks, final_norm(net))
    for part in parts:
        if part is not None:
            part.requires_grad_(True)
    net.pos_embed.requires_grad_(options.positions == "learned")


def masked_problems(student: Network, config: RunConfig, options: Any) -> list[Problem]:
    """Return what of a masked objective cannot be done."""
    found = []
    reason = plain_problem(student.net)
    if reason is not None:
        key = "--student" if hasattr(config, "student") else "--model"
        hint = "Take one such as vit_small_patch16_224 or vit_ti."
        return [Problem(key, f"'{student.architecture}' {reason}", hint)]
    net: Any = student.net
    total, patch, size = net.patch_embed.num_patches, net.patch_embed.patch_size, student.input.img_size
    if any(side % step for side, step in zip(size, patch, strict=True)):
        text = f"{size[0]} x {size[1]} pixels are not whole patches of {patch[0]} x {patch[1]}"
        found.append(Problem("img_size", text, "Take a multiple of the patch."))
    count = kept(options, total)
    if not 1 <= count < total:
        key = "mask_ratio" if options.visible_patches is None else "visible_patches"
        what = "no patch" if count < 1 else "every patch"
        hint = f"Of {total} patches, keep 1 to {total - 1}: mask_ratio from {1 / total:.4g} to {1 - 1 / total:.4g}."
        found.append(Problem(f"options.{key}", f"{getattr(options, key)} keeps {what} of {total}", hint))
    if options.decoder_width % 4 or options.decoder_width % options.decoder_heads:
        text = f"{options.decoder_width} is not a multiple of 4 and of decoder_heads ({options.decoder_heads})"
        found.append(Problem("options.decoder_width", text))
    found += [
        Problem(key, "mixes images, and a masked objective has no labels to mix with them", "Leave it at 0.")
        for key, value in (
            ("augment.mixup_alpha", config.augment.mixup_alpha),
            ("augment.cutmix_alpha", config.augment.cutmix_alpha),
        )
        if value
    ]
    if config.data.unlabeled_per_class is not None:
        text = "chooses by a teacher's answers, and nobody is asked here"
        found.append(Problem("data.unlabeled_per_class", text, "Leave it out: every image is taken."))
    if config.training.keep == "best":
        found.append(Problem("training.keep", "'best' goes by accuracy, which pre-training has none of", "Take last."))
    if config.export.formats:
        text = "an encoder without a classifier is not exported"
        found.append(Problem("--export", text, "Fine-tune it first: visionkd train --init RUN."))
    if config.compute.strategy == "fsdp":
        found.append(Problem("compute.strategy", "fsdp does not go with a masked objective", "Take ddp."))
    return found
