"""The schema of a zoo card, ``zoo/<task>/<name>.yaml``. No torch: a device reads cards too.

A card says what a model is, where it came from, what was measured of it, and where its files are, each with its
SHA-256. It is data from elsewhere: unknown keys are refused, no path leaves its folder, and no key runs code.

A model has one or more *artifacts*, the same model in different forms. Each is named and has one of four formats:

- ``package``: a directory with ``model.safetensors`` and ``model.json``, as ``visionkd`` writes it. Needs torch.
- ``onnx``: one ``.onnx`` file that visionkd exported, in float or INT8. Needs no torch.
- ``checkpoint``: a weight file that others published; it is read with ``weights_only`` and packaged at the first pull.
- ``published``: weights that timm or torchvision fetch into a cache of their own, by their name.

``zoo:NAME`` stands for the first artifact that can be used, ``zoo:NAME@ARTIFACT`` for a certain one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from visionkd.hub.card_files import (
    Amount,
    Artifact,
    CardFile,
    CheckpointArtifact,
    Count,
    HttpsSource,
    HubSource,
    OnnxArtifact,
    PackageArtifact,
    PublishedArtifact,
    PythonPackageSource,
    RepositorySource,
    Slug,
    Source,
    StrictCard,
    Text,
    Url,
)
from visionkd.types import InputSpec, TaskName

__all__ = [
    "CARD_FORMAT",
    "Architecture",
    "Artifact",
    "Card",
    "CardFile",
    "CheckpointArtifact",
    "HttpsSource",
    "HubSource",
    "Latency",
    "Measurement",
    "OnnxArtifact",
    "PackageArtifact",
    "Preprocessing",
    "PublishedArtifact",
    "PythonPackageSource",
    "RepositorySource",
    "Source",
    "Training",
]

CARD_FORMAT = 1
# What is said of the model --------------------------------------------------------------------------------------------


class Architecture(StrictCard):
    """What to build: a timm or torchvision name without tag, or a name of visionkd, with constructor arguments."""

    name: str
    library: str = "timm"
    args: dict[str, Any] = {}


class Preprocessing(StrictCard):
    """What the network takes: height and width, statistics of images in [0, 1], resizing at evaluation."""

    img_size: tuple[Count, Count]
    mean: tuple[float, ...]
    std: tuple[Amount, ...]
    interpolation: Literal["bilinear", "bicubic", "nearest"]
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)]

    def spec(self) -> InputSpec:
        """Return it as the type that networks and sessions use."""
        return InputSpec(**self.model_dump())


class Measurement(StrictCard):
    """Metrics of one artifact on one split.

    Attributes:
        artifact: Which artifact; None says it of the model as published elsewhere.
        data: Data set, such as ``imagenet1k``, ``cifar10``, ``imagenet_samples``.
        split: Split of it, such as ``val`` or ``test``.
        images: How many images were measured on; None where the publisher does not say.
        by: ``published`` by others, or measured ``here``.
        how: Where it is published, or the command that measured it.
        values: Metric by name in percent: ``top1``, ``top5``, ``miou``, ``pixel_acc``, ``ap``, ...
    """

    artifact: Slug | None = None
    data: str
    split: str
    images: Count | None = None
    by: Literal["published", "here"]
    how: str
    values: Annotated[dict[Slug, float], Field(min_length=1)]


class Latency(StrictCard):
    """One timing, with what it depends on; names and units are those of ``visionkd bench``."""

    artifact: Slug
    backend: Literal["torch", "onnxruntime", "tensorrt"]
    device: str
    threads: Count = 1
    batch_size: Count = 1
    img_size: tuple[Count, Count]
    latency_ms: Amount
    versions: dict[str, Text] = {}


class Training(StrictCard):
    """How the model came about.

    Attributes:
        method: ``supervised``, or the method of ``visionkd distill`` that trained it, or what its paper calls it.
        teacher: The teacher, as a ``zoo:`` name or a name of timm or torchvision.
        recipe: Recipe of ``configs/``, such as ``classification/cifar10_kd``.
        command: The one command that makes it again.
        commit: Commit of this repository that made it.
        seed: Seed of the run.
        machine: What it was trained on.
    """

    method: str
    teacher: str | None = None
    recipe: str | None = None
    command: str | None = None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}(-dirty)?$")] | None = None
    seed: int | None = None
    machine: str | None = None


class Card(StrictCard):
    """One model.

    Attributes:
        format: Version of this schema.
        name: What ``zoo:`` takes, and its file's name. Own models: ``<architecture>.<method>_<teacher>_<data>``.
        title: One line on what it is.
        task: Task that its outputs serve.
        origin: ``own``: trained by this project, and ``training.command`` makes it again; ``upstream``: by others.
        publisher: Who published the weights, for ``upstream``.
        url: Page of the publisher.
        paper: Address of the paper.
        licence: SPDX identifier of the weights' licence in lower case, such as ``apache-2.0``; ``unknown`` is allowed
            and shown.
        licence_note: What a user has to know of it: non-commercial data, a licence of the code alone, and so on.
        data: Data set that it was trained on, such as ``imagenet1k``, ``cifar10``; pre-training data go into ``title``.
        num_classes: Number of outputs; 0 for an encoder without a classifier.
        classes: ``imagenet1k`` for the 1000 classes in their usual order, a list of names, or None where the files name
            them.
        architecture: What to build.
        preprocessing: What it takes.
        params_m: Parameters in millions.
        macs_g: Multiply-accumulates of one image at its size, in 10^9.
        training: How it came about.
        artifacts: Its forms by name, the one that ``zoo:NAME`` stands for first. Usual names: ``weights``, ``onnx``,
            ``int8`` (INT8 for processors), ``int8-tensorrt``.
        metrics: What was measured.
        latencies: What was timed.
        good_for: What it is good for.
        bad_for: What it is bad for.
        notes: Anything else that a user has to know.
    """

    format: Literal[1]
    name: Slug
    title: Annotated[str, Field(max_length=200)]
    task: TaskName
    origin: Literal["own", "upstream"]
    publisher: str | None = None
    url: Url | None = None
    paper: Url | None = None
    licence: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]
    licence_note: str | None = None
    data: str
    num_classes: Annotated[int, Field(ge=0)]
    classes: Literal["imagenet1k"] | tuple[Text, ...] | None = None
    architecture: Architecture
    preprocessing: Preprocessing
    params_m: Amount
    macs_g: Amount | None = None
    training: Training
    artifacts: Annotated[dict[Slug, Artifact], Field(min_length=1)]
    metrics: tuple[Measurement, ...] = ()
    latencies: tuple[Latency, ...] = ()
    good_for: Annotated[tuple[str, ...], Field(min_length=1)]
    bad_for: Annotated[tuple[str, ...], Field(min_length=1)]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Card:
        for section in ("metrics", "latencies"):
            for row in getattr(self, section):
                if row.artifact is not None and row.artifact not in self.artifacts:
                    raise ValueError(f"{section} name the artifact '{row.artifact}', which the card has not")
        if isinstance(self.classes, tuple) and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names in 'classes' for num_classes {self.num_classes}")
        if self.classes == "imagenet1k" and self.num_classes != 1000:
            raise ValueError("classes imagenet1k are 1000")
        if self.origin == "own" and self.training.command is None:
            raise ValueError("a model of our own needs training.command, which makes it again")
        if self.origin == "upstream" and self.publisher is None:
            raise ValueError("an upstream model needs its publisher")
        return self

    def metric(self, name: str, *, artifact: str | None = None) -> float | None:
        """Return the first value of a metric, of ``artifact`` if given, else of any; None without one."""
        rows = [row for row in self.metrics if artifact is None or row.artifact == artifact]
        return next((row.values[name] for row in rows if name in row.values), None)

    def size_bytes(self, artifact: str) -> int | None:
        """Return the bytes to fetch for an artifact, None where its publisher does not say."""
        found = self.artifacts[artifact]
        return found.size_bytes if isinstance(found, PublishedArtifact) else sum(f.size_bytes for f in found.files)
