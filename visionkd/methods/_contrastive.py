"""An image-text encoder: the objective ``contrastive`` of ``visionkd train``. Not a distillation method.

    L = (CE(s i t^T) + CE(s t i^T)) / 2

over the images i and captions t of a batch, of length 1; s is learned. Captions that are equal share their images. Each
process contrasts its own share of a batch.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem
from visionkd.losses.contrastive import contrastive_loss
from visionkd.methods._base import DistillationModule
from visionkd.models.network import Network
from visionkd.models.text_encoder import ImageTextHead, TextSpec, Tokenizer
from visionkd.tasks.image_text import ImageText
from visionkd.types import Output


@dataclass(frozen=True)
class ContrastiveOptions:
    """Options of the objective ``contrastive``.

    Attributes:
        dim: Length of the embeddings of images and texts.
        text_width: Channels of the text encoder.
        text_depth: Its blocks.
        text_heads: Its attention heads.
        context: Most words of a caption; longer ones are cut.
        temperature: What cosines are divided by at the beginning.
    """

    dim: Annotated[int, Field(ge=2)] = 128
    text_width: Annotated[int, Field(ge=2)] = 128
    text_depth: Annotated[int, Field(ge=1)] = 2
    text_heads: Annotated[int, Field(ge=1)] = 4
    context: Annotated[int, Field(ge=2)] = 64
    temperature: Annotated[float, Field(ge=0.01, le=1.0)] = 0.07


@dataclass(frozen=True, eq=False)
class Captions:
    """The captions of a run as numbers of words.

    Attributes:
        spec: Size and words of the text encoder that reads them.
        train: N x A x L, A captions of each training image; those of images with fewer are repeated.
        val: M x L, the first caption of each validation image.
        classes: K x L, the names of the data's classes as texts; None where it has none that can be read.
    """

    spec: TextSpec
    train: Tensor
    val: Tensor
    classes: Tensor | None


def tokenize_captions(
    train: Sequence[tuple[str, ...]],
    val: Sequence[tuple[str, ...]],
    classes: Sequence[str],
    options: ContrastiveOptions,
) -> Captions:
    """Collect the words of the training captions, and turn all captions and class names into numbers.

    Words that only validation captions have are left out of these.
    """
    words = Tokenizer.words(text for texts in train for text in texts)
    spec = TextSpec(
        words, options.dim, width=options.text_width, depth=options.text_depth, heads=options.text_heads,
        context=options.context,
    )  # fmt: skip
    tokenizer, most = Tokenizer(words, options.context), max(len(texts) for texts in train)
    repeated = [texts[number % len(texts)] for texts in train for number in range(most)]
    tokens = tokenizer(repeated).to(torch.int32).view(len(train), most, -1)
    named = [f"a {name}" if "a" in tokenizer.numbers else name for name in classes]
    readable = bool(named) and not any(tokenizer.unknown(name) for name in named)
    return Captions(
        spec, tokens, tokenizer([texts[0] for texts in val], skip_unknown=True), tokenizer(named) if readable else None
    )


class Contrastive(DistillationModule):
    """Brings images and their captions together.

    Args:
        student: Image encoder without a classifier.
        config: Settings of the run.
        options: Of the objective.
        captions: Of both splits.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    uses_labels: ClassVar[bool] = False
    Options: ClassVar[type] = ContrastiveOptions
    options: ContrastiveOptions

    def __init__(
        self, *, student: Network, config: RunConfig, options: ContrastiveOptions, captions: Captions, **rest: Any
    ) -> None:
        self.__dict__["captions"] = captions
        task = ImageText(0 if captions.classes is None else len(captions.classes))
        super().__init__(student=student, config=config, options=options, task=task, **rest)
        for name in ("train", "val", "classes"):
            self.register_buffer(f"_{name}_tokens", getattr(captions, name), persistent=False)
        self._of_classes: Tensor | None = None

    def build_modules(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.training.seed)
            width = self.student.embedding_dim
            return nn.ModuleDict(
                {"texts": ImageTextHead(self.captions.spec, width=width, temperature=self.options.temperature)}
            )

    @property
    def head(self) -> ImageTextHead:
        """What trains beside the image encoder."""
        return self.projectors["texts"]

    def encode_images(self, image: Tensor) -> Tensor:
        """Return embeddings of length 1, B x dim, of images in [0, 1]."""
        return F.normalize(self.head.projection(self.student.embed(image)).float(), dim=-1)

    # A step -----------------------------------------------------------------------------------------------------------

    def mixed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, None]:
        return batch["image"], batch["index"], None

    def loss_terms(self, image: Tensor, target: Tensor, teacher_probs: Tensor | None = None) -> dict[str, Tensor]:
        """``target`` holds the indices of the samples, whose captions lie beside."""
        chosen = torch.randint(self._train_tokens.shape[1], target.shape, device=target.device)
        return {"contrastive_loss": self.contrast(image, self._train_tokens[target, chosen])}

    def contrast(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Return the loss of images in [0, 1] and the captions of each, B x L."""
        same = (tokens[:, None] == tokens[None]).all(-1)
        return contrastive_loss(
            image_embedding=self.encode_images(image), text_embedding=self.head.text(tokens), scale=self.head.scale,
            same=same,
        )  # fmt: skip

    def loss_weights(self) -> Mapping[str, float]:
        return {"contrastive_loss": 1.0}

    # Evaluation -------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._of_classes = None if self._classes_tokens is None else self.head.text(self._classes_tokens)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        if not len(image):
            return
        loss = self.contrast(image, self._val_tokens[batch["index"]])
        self._val_loss.append(torch.stack([loss * len(image), loss.new_tensor(float(len(image)))]))
        if self._of_classes is not None:
            logits = self.encode_images(image) @ self._of_classes.T
            self.task.update(self._val_metrics, Output(logits=logits), batch["target"])

    @property
    def deployed_student(self) -> Network:
        """The image encoder, with the texts that go into its package."""
        self.student.image_text = self.head.saved()
        return self.student

    # What it says about itself ----------------------------------------------------------------------------------------

    @classmethod
    def pretrains(cls, options: Any) -> bool:
        return True

    @classmethod
    def check(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[Problem]:
        refused = {
            "augment.mixup_alpha": (bool(config.augment.mixup_alpha), "mixes images, and captions do not mix"),
            "augment.cutmix_alpha": (bool(config.augment.cutmix_alpha), "mixes images, and captions do not mix"),
            "training.label_smoothing": (bool(config.training.label_smoothing), "smooths labels, and there are none"),
            "training.ema_decay": (
                config.training.ema_decay is not None,
                "averages an image encoder, which its text encoder would not know",
            ),
            "training.keep": (config.training.keep == "best", "'best' needs a figure that every data set has"),
            "training.compile": (config.training.compile, "is not supported by this objective"),
            "compute.strategy": (config.compute.strategy == "fsdp", "fsdp does not go with this objective; take ddp"),
            "--export": (bool(config.export.formats), "an encoder without a classifier is not exported"),
            "data.unlabeled": (config.data.unlabeled is not None, "takes images without captions; give one --data"),
        }
        found = [Problem(key, said) for key, (wrong, said) in refused.items() if wrong]
        if student.source != "timm":
            said = f"'{student.architecture}' is not one of timm's"
            found.append(Problem("--model", said, "Take one such as vit_ti."))
        if options.text_width % options.text_heads:
            said = f"{options.text_width} is not a multiple of text_heads ({options.text_heads})"
            found.append(Problem("options.text_width", said))
        return found
