"""Every setting of a run. Unknown keys are refused; the comments of ``configs/`` explain what values trade.

``DistillConfig`` is what ``visionkd distill`` runs, ``TrainConfig`` what ``visionkd train`` runs. ``None`` means
"decide for me"; a run writes the decided value into its ``config.yaml``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
# YAML reads 32 as a number
Precision = Annotated[
    Literal["32", "bf16", "16"], BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)
]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class NetworkConfig(Strict):
    """One network.

    Attributes:
        name: timm or torchvision name, alias, run directory, packaged model or ``ARCHITECTURE@FILE``.
        pretrained: Start from the published weights.
        img_size: Input size in pixels; None takes the size the network was trained with.
        args: Further arguments for the network's constructor, such as ``drop_path_rate``.
    """

    name: str
    pretrained: bool = True
    img_size: Positive | None = None
    args: dict[str, Any] = {}


class TeacherConfig(NetworkConfig):
    """A teacher; ``precision`` None takes the run's."""

    precision: Precision | None = None


class ShapesConfig(Strict):
    """The embedded data set: how many scenes, their size in pixels (None: the student's input), and their seed."""

    num_train: Positive = 2000
    num_val: Positive = 400
    size: Annotated[int, Field(ge=32, le=640)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0


class DataConfig(Strict):
    """Where samples come from.

    Attributes:
        path: Directory, archive or name of a known data set.
        val_fraction: Share held out of the training set where there is no validation split.
        split_seed: Draws the held-out share and the samples that limits keep; apart from the run's seed, so that
            teacher and student never see each other's validation images.
        val_split: Split to validate on; None takes ``val``, then ``test``, then a held-out share.
        workers: Loader processes per device; None decides from the processors.
        cache: Keep decoded images in memory; ``auto`` does where all of them fit in 1 GB.
        max_unreadable: Share of unreadable training images above which the run stops.
        limit_train: Use at most so many training images, spread over the classes.
        limit_val: Use at most so many validation images, spread over the classes.
    """

    path: str = "shapes"
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    split_seed: Annotated[int, Field(ge=0)] = 0
    val_split: str | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    cache: Literal["auto", "ram", "none"] = "auto"
    max_unreadable: Fraction = 0.01
    limit_train: Positive | None = None
    limit_val: Positive | None = None
    shapes: ShapesConfig = ShapesConfig()


class AugmentConfig(Strict):
    """The random view of a training image.

    Attributes:
        crop: ``resized`` draws area and aspect (photographs), ``padded`` shifts by up to ``padding`` pixels (small
            images), ``none`` only resizes; None takes ``padded`` up to 64 pixels and ``resized`` above.
        scale: Smallest and largest share of the area for ``resized``.
        padding: Pixels of padding for ``padded``; None takes an eighth of the size.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of brightness, contrast and saturation changes; 0 is off.
        randaugment_ops: RandAugment operations per image; 0 is off.
        randaugment_magnitude: Their magnitude, out of 30.
        random_erasing: Probability of erasing a rectangle.
        mixup_alpha: Beta parameter of mixup; 0 is off.
        cutmix_alpha: Beta parameter of CutMix; 0 is off. With both on, each batch takes one of the two.
    """

    crop: Literal["resized", "padded", "none"] | None = None
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    padding: Annotated[int, Field(ge=0)] | None = None
    hflip: Fraction = 0.5
    color_jitter: Fraction = 0.0
    randaugment_ops: Annotated[int, Field(ge=0, le=8)] = 0
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    random_erasing: Fraction = 0.0
    mixup_alpha: NonNegative = 0.0
    cutmix_alpha: NonNegative = 0.0

    @model_validator(mode="after")
    def _scale_in_order(self) -> AugmentConfig:
        if not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale takes the smallest and the largest share, in this order and above 0")
        return self


class OptimizerConfig(Strict):
    """Optimiser; norms and biases are left out of weight decay unless ``decay_norm_and_bias``.

    Attributes:
        lr: Peak learning rate for the whole batch; None scales the optimiser's usual rate for 256
            images: linearly with the batch for SGD, by the square root for AdamW.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] | None = None
    weight_decay: NonNegative | None = None
    decay_norm_and_bias: bool = False
    momentum: Fraction = 0.9
    nesterov: bool = True
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)


class ScheduleConfig(Strict):
    """Learning-rate schedule, stepped after each optimiser step."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NonNegative = 1.0
    min_lr_ratio: Fraction = 0.0


class TrainingConfig(Strict):
    """The budget and how it is spent.

    Attributes:
        batch_size: Images per optimiser step over all devices and accumulated batches.
        accumulate: Batches summed into one optimiser step.
        clip_grad_norm: Largest gradient norm; None does not clip.
        ema_decay: Decay of the averaged weights, which are then the ones evaluated and packaged; None is off.
        keep: Weights to evaluate and package: those of the last epoch (an honest figure, since nothing was chosen by
            the validation split) or of the best one.
        checkpoint_every_s: Seconds between checkpoints within an epoch; each epoch ends with one anyway.
        deterministic: Ask for deterministic GPU kernels, so that a resumed run is the same to the bit there too.
        log_every: Steps between two rows of training metrics.
    """

    epochs: Positive = 20
    batch_size: Positive = 64
    accumulate: Positive = 1
    clip_grad_norm: Annotated[float, Field(gt=0.0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Precision = "32"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    keep: Literal["last", "best"] = "last"
    checkpoint_every_s: NonNegative = 300.0
    log_every: Positive = 50

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self


class ComputeConfig(Strict):
    """Devices; a run on several nodes needs a run directory that all of them see."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Positive | Literal["auto"] = "auto"
    nodes: Positive = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"


class FitTeacherConfig(Strict):
    """What to do with a teacher whose classes are not the data's.

    Attributes:
        mode: ``auto`` fits a linear probe where needed, ``probe`` always, ``finetune`` trains the whole teacher first,
            ``none`` refuses a teacher that does not fit.
        epochs: Epochs of ``finetune``.
        lr: Learning rate of ``finetune``; None decides from the batch size.
        max_images: Most training images whose features the probe takes; None decides from the device.
    """

    mode: Literal["auto", "probe", "finetune", "none"] = "auto"
    epochs: Positive = 5
    lr: Annotated[float, Field(gt=0.0)] | None = None
    max_images: Positive | None = None


class ExportConfig(Strict):
    """Formats to export at the end of the run, and how many validation images each export is checked on."""

    formats: tuple[Literal["onnx"], ...] = ()
    verify_images: Positive = 256


class ReportConfig(Strict):
    """The report at the end of the run; ``baseline`` is the run directory of the same student trained alone."""

    enabled: bool = True
    baseline: str | None = None


class RunConfig(Strict):
    """What supervised training and distillation share."""

    task: Literal["auto", "classification", "segmentation", "detection"] = "auto"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    compute: ComputeConfig = ComputeConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()


class TrainConfig(RunConfig):
    """Supervised training of one network."""

    model: NetworkConfig


class DistillConfig(RunConfig):
    """Distillation of one or more teachers into a student.

    Attributes:
        method: File name in ``visionkd/methods``, or ``auto``.
        options: The method's own options, checked against its frozen dataclass.
    """

    student: NetworkConfig
    teachers: Annotated[list[TeacherConfig], Field(min_length=1)]
    method: str = "auto"
    options: dict[str, Any] = {}
    fit_teacher: FitTeacherConfig = FitTeacherConfig()
