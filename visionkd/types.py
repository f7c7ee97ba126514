"""Plain types that every part of the project shares. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TaskName = Literal["classification", "segmentation", "detection"]
#: Value of pixels without a label in a map of class indices.
IGNORE = 255
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSpec:
    """What a network was trained to see.

    Attributes:
        img_size: Height and width in pixels.
        mean: Mean of each RGB channel of images in [0, 1].
        std: Standard deviation of each RGB channel of images in [0, 1].
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``, as used for resizing at evaluation.
        crop_pct: Share of the resized image that the centre crop keeps at evaluation.
    """

    img_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 0.875

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputSpec:
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("img_size", "mean", "std"):
            if name in known:
                known[name] = tuple(known[name])
        return cls(**known)


@dataclass
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: N x 4, left, top, right, bottom in pixels of the image that was given.
        scores: N, from 0 to 1, highest first.
        labels: N, class indices.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass
class Output:
    """What a network answers.

    Attributes:
        logits: Before softmax; B x C for classification, B x C x h x w at the network's own stride for segmentation.
        features: Maps, B x C x H x W each, from the shallowest stage to the deepest.
        tokens: B x N x D for a transformer, prefix tokens included.
        probs: B x C class probabilities, where a label store stands for the teachers and there are no logits.
        aux: Logits of auxiliary heads, like ``logits``; empty in eval mode.
        boxes: What a detector found, for each image; empty in train mode.
        losses: A detector's own losses by name, scalars; empty in eval mode.
    """

    logits: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    tokens: Tensor | None = None
    probs: Tensor | None = None
    aux: tuple[Tensor, ...] = ()
    boxes: tuple[Detections, ...] = ()
    losses: Mapping[str, Tensor] = field(default_factory=dict)


class Source(Protocol):
    """The samples of one split. No torch: a device without it evaluates through this protocol too."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image:
        """Decode sample ``index`` as RGB with its orientation applied; raises UnreadableImageError."""

    def target(self, index: int) -> Any:
        """Class index for classification, cheap; a map of them, uint8 H x W with 255 ignored, for segmentation; for
        detection ``boxes`` (N x 4 of float32: left, top, right, bottom in pixels), ``labels`` and ``crowd``."""

    def name(self, index: int) -> str:
        """Path of the sample, relative to the data, for messages."""


@dataclass(frozen=True)
class DataSet:
    """Data as opened from a DATA argument.

    Attributes:
        name: Short name for messages and reports.
        task: Task that the layout decides.
        classes: Class names in index order.
        splits: ``train`` and ``val`` where present, and whatever else was found (``test``).
        fingerprint: SHA-256 over the list of samples; changes when samples are added, removed or replaced.
        messages: Choices made on the user's behalf, to be said aloud.
        note: What the targets of the validation split are, where they are not labels.
        novel: Classes whose boxes only the validation split has.
    """

    name: str
    task: TaskName
    classes: tuple[str, ...]
    splits: Mapping[str, Source]
    fingerprint: str
    messages: tuple[str, ...] = ()
    note: str = ""
    novel: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """One progress report.

    Attributes:
        stage: Name of the stage, such as ``distill``.
        epoch: Epoch, counted from 1; 0 where the stage has no epochs.
        epochs: Number of epochs.
        step: Steps done in this epoch.
        steps: Steps in this epoch.
        images_per_s: Images a second since the last report.
        eta_s: Seconds until the stage is done, if known.
        metrics: Latest values by name, such as ``val/top1``.
    """

    stage: str
    step: int
    steps: int
    epoch: int = 0
    epochs: int = 0
    images_per_s: float | None = None
    eta_s: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Listener:
    """What a workflow tells its caller while it works. This one keeps silent; the CLI prints."""

    def message(self, text: str, *, level: Literal["info", "warning"] = "info") -> None:
        """A sentence for the user."""

    def stage(self, name: str, title: str, number: int, total: int) -> None:
        """A stage begins; ``number`` counts from 1."""

    def progress(self, progress: Progress) -> None:
        """Work went on."""

    def epoch_end(self, progress: Progress) -> None:
        """An epoch ended, with its final metrics."""


@dataclass(frozen=True)
class MetricRow:
    """One line of a result table: a model and its measured values, by name with the unit in the name."""

    model: str
    values: Mapping[str, float | str | None]
