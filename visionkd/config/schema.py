"""Every setting of a run. Unknown keys are refused; the comments of ``configs/`` explain what values trade.

``DistillConfig`` is what ``visionkd distill`` runs, ``TrainConfig`` what ``visionkd train`` runs. ``None`` means
"decide for me"; a run writes the decided value into its ``config.yaml``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from visionkd.config.detection import DetectionConfig
from visionkd.config.int8 import Int8RunConfig
from visionkd.config.segmentation import SegmentationConfig

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
# YAML reads 32 as a number
Precision = Annotated[
    Literal["32", "bf16", "16"], BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)
]
# YAML reads on and off as truth values
OnOff = BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value)


def _size(value: Any) -> Any:
    """Return a size as a whole number or as a tuple of two, whatever it was written as; other values are refused."""
    sides = value if isinstance(value, (list, tuple)) else (value,)
    if value is None:
        return None
    if len(sides) not in (1, 2) or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError("takes a whole number from 1 up, or for pixels and boxes two: height and width")
    return sides[0] if len(sides) == 1 else tuple(sides)


# A number, or height and width; one message for both.
ImgSize = Annotated[int | tuple[int, int] | None, BeforeValidator(_size)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class NetworkConfig(Strict):
    """One network.

    Attributes:
        name: timm or torchvision name, alias, run directory, packaged model or ``ARCHITECTURE@FILE``; for segmentation
            also ``HEAD_BACKBONE``, such as ``deeplabv3plus_mobilenetv3_large_100``, for detection
            ``DETECTOR_BACKBONE``, such as ``fcos_mobilenetv3_large_100``.
        pretrained: Start from the published weights.
        img_size: Input size in pixels, for pixels and boxes also height and width; None takes the size the network was
            trained with.
        backbone: MODEL whose weights the backbone of a network for pixels or boxes begins with; None takes published
            ones.
        args: Further arguments for the network's constructor, such as ``drop_path_rate``.
    """

    name: str
    pretrained: bool = True
    img_size: ImgSize = None
    backbone: str | None = None
    args: dict[str, Any] = {}


class TeacherConfig(NetworkConfig):
    """A teacher; ``precision`` None takes the run's."""

    precision: Precision | None = None


class ShapesConfig(Strict):
    """The embedded data set.

    Attributes:
        num_train: Scenes to train on.
        num_val: Scenes to validate on.
        size: Their side in pixels; None takes the student's input.
        seed: Chooses them.
        vocabulary: What boxes are called: by their ``shapes``, or by ``combinations`` of colour and shape.
    """

    num_train: Positive = 2000
    num_val: Positive = 400
    size: Annotated[int, Field(ge=32, le=640)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    vocabulary: Literal["shapes", "combinations"] = "shapes"


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
        unlabeled: Directory of images to train on beside the labelled ones, for methods that use no labels.
        unlabeled_per_class: Keep so many unlabelled images of each class, those that the teacher is surest of.
        near_duplicates: What to do with unlabelled images that show what a validation image or a labelled one shows.
        classes: Class names of maps, in the order of their values; None reads ``classes.txt``, or counts the values.
            Of boxes the classes to keep, in this order; None keeps all.
        novel: Classes whose boxes are left out of training and kept in validation, where they are measured apart.
        ignore: Values in maps that stand for no class, besides 255.
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
    unlabeled: str | None = None
    unlabeled_per_class: Positive | None = None
    near_duplicates: Literal["remove", "keep"] = "remove"
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    novel: tuple[str, ...] = ()
    ignore: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()
    shapes: ShapesConfig = ShapesConfig()


class HardAugmentConfig(Strict):
    """HARD's learned augmentation: an augmentor that seeks images on which student and teacher disagree.

    Attributes:
        augmentors: Applied one after the other: ``affine`` (a learned distribution of matrices), ``color``, ``mix``
            (learned weights of existing augmentations), ``vdvae`` (edits in the latents of a small autoencoder).
        affine: ``full`` matrices, or only their ``translation``, or only their ``linear`` part.
        batch: ``split`` augments a part of each batch's images, ``both`` shows every image clean and augmented, which
            costs twice as much.
        share: Part of the student's loss that comes from augmented images, and of a split batch that is augmented.
        disagreement_weight: lambda_s: how much the augmentor wants student and teacher to disagree.
        consistency_weight: lambda_t: how much it wants the teacher's answer to stay what it was.
        upper: The augmentor's turn begins when the student agrees with the teacher on augmented images at least so
            often, as a share of how often it does on clean ones.
        lower: It ends when the student agrees less often than so.
        decay: Of the running averages of both agreements.
        max_steps: Most steps of one turn of the augmentor.
        max_step_share: Most steps of the augmentor as a share of all; the rest are the student's.
        warmup: Share of the training, at its beginning, in which nothing is augmented.
        cooldown: Share of the training, at its end, in which the augmentor no longer learns.
        lr: Learning rate of the augmentor (Adam).
        std_lr: That of the logarithms of its standard deviations; higher, since they have further to go.
        clip_grad_norm: Largest norm of its gradient.
        std: Standard deviations that the learned distributions of ``affine`` and ``color`` begin with.
        max_std: Largest standard deviation they may learn.
        max_shift: Largest shift of an image, where 2 is its whole width or height.
        vae_steps: Steps in which the autoencoder of ``vdvae`` is trained, at the beginning of the run.
        vae_file: Autoencoder of an earlier run (``augmentations/vdvae.safetensors``) to take instead.
        vae_blocks: First of its six decoder blocks whose posterior is edited, and the first one beyond these.
    """

    augmentors: Annotated[tuple[Literal["affine", "color", "mix", "vdvae"], ...], Field(min_length=1)] = (
        "affine",
        "color",
    )
    affine: Literal["full", "translation", "linear"] = "full"
    batch: Literal["split", "both"] = "split"
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    disagreement_weight: NonNegative = 1.0
    consistency_weight: NonNegative = 1.0
    upper: Annotated[float, Field(gt=0.0)] = 0.8
    lower: Annotated[float, Field(ge=0.0)] = 0.6
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    max_steps: Positive = 50
    max_step_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.15
    warmup: Fraction = 0.1
    cooldown: Fraction = 0.1
    lr: Annotated[float, Field(gt=0.0)] = 0.001
    std_lr: Annotated[float, Field(gt=0.0)] = 0.03
    clip_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    std: Annotated[float, Field(gt=0.0)] = 0.05
    max_std: Annotated[float, Field(gt=0.0)] = 0.3
    max_shift: Annotated[float, Field(gt=0.0, le=2.0)] = 0.5
    vae_steps: Positive = 300
    vae_file: str | None = None
    vae_blocks: tuple[Annotated[int, Field(ge=0, le=6)], Annotated[int, Field(ge=0, le=6)]] = (2, 6)

    @model_validator(mode="after")
    def _in_order(self) -> HardAugmentConfig:
        if self.lower >= self.upper:
            raise ValueError(f"lower ({self.lower:g}) must lie below upper ({self.upper:g}), or turns would flicker")
        if self.warmup + self.cooldown >= 1.0:
            raise ValueError("warmup and cooldown leave the augmentor no time to learn")
        if self.std > self.max_std:
            raise ValueError(f"std ({self.std:g}) is above max_std ({self.max_std:g})")
        if self.vae_blocks[0] >= self.vae_blocks[1]:
            raise ValueError("vae_blocks takes the first block and the one beyond the last, in this order")
        return self


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
        learned: ``hard`` trains an augmentor against the student, beside the views above.
        hard: Its settings.
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
    learned: Literal["hard"] | None = None
    hard: HardAugmentConfig = HardAugmentConfig()

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
        layer_decay: Share of its rate that each layer of the network gives to the one before it; None trains all of
            them at the same rate.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] | None = None
    weight_decay: NonNegative | None = None
    decay_norm_and_bias: bool = False
    momentum: Fraction = 0.9
    nesterov: bool = True
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None


class ScheduleConfig(Strict):
    """Learning-rate schedule, stepped after each optimiser step.

    Attributes:
        milestones: Epochs after which ``step`` multiplies the rate by ``gamma``.
        power: Exponent of the share of steps that are left, for ``poly``: 0.9 is usual in segmentation.
    """

    name: Literal["cosine", "constant", "step", "poly"] = "cosine"
    warmup_epochs: NonNegative = 1.0
    min_lr_ratio: Fraction = 0.0
    milestones: tuple[Positive, ...] = ()
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    power: Annotated[float, Field(gt=0.0, le=10.0)] = 0.9

    @model_validator(mode="after")
    def _milestones_for_step(self) -> ScheduleConfig:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError("milestones go with the schedule 'step', which needs them")
        return self


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


class LabelStoreConfig(Strict):
    """Teachers' probabilities that are kept on disk, so that a teacher sees each view of an image once.

    Attributes:
        mode: ``on`` or ``off``; ``auto`` keeps them where the method allows it and this run gets something out of it.
        views: Different views of each image, taken in turn; None decides from the number of epochs.
        view_seed: Seed of the views. Runs with the same one share a store, whatever their own seeds are.
        storage: ``full`` keeps all classes exactly, ``top_k`` the most probable ones in half precision; ``auto`` keeps
            all of up to 100 classes.
        top_k: Classes that ``top_k`` keeps.
        rest: What becomes of the other classes' probability: spread over them, or none of it (``renormalize``).
        views_per_image: Views that are taken from each image loaded; more than one saves decoding.
        ahead: Fill the store before the training, rather than during its first passes.
        path: Directory of the store; None takes one in the cache directory that belongs to what is stored.
    """

    mode: Annotated[Literal["auto", "on", "off"], OnOff] = "auto"
    views: Positive | None = None
    view_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    storage: Literal["auto", "full", "top_k"] = "auto"
    top_k: Positive = 10
    rest: Literal["uniform", "renormalize"] = "uniform"
    views_per_image: Positive = 1
    ahead: bool = False
    path: str | None = None


class LossConfig(Strict):
    """One method's part in a combination: the weight of its terms and its options."""

    weight: NonNegative = 1.0
    options: dict[str, Any] = {}


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
    segmentation: SegmentationConfig = SegmentationConfig()
    detection: DetectionConfig = DetectionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    compute: ComputeConfig = ComputeConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()


class TrainConfig(RunConfig):
    """Training of one network without a teacher.

    Attributes:
        objective: ``supervised`` learns the labels, ``mae`` pre-trains a vision transformer as a masked autoencoder and
            needs none, ``contrastive`` learns images and their captions, ``linear_probe`` fits a classifier on features
            that stay what they are.
        init: MODEL whose weights the network begins with, apart from its classifier.
        options: The objective's own options; those of ``mae`` are in :mod:`visionkd.methods._mae`, those of
            ``contrastive`` in :mod:`visionkd.methods._contrastive`.
    """

    model: NetworkConfig
    objective: Literal["supervised", "mae", "contrastive", "linear_probe"] = "supervised"
    init: str | None = None
    options: dict[str, Any] = {}


class DistillConfig(RunConfig):
    """Distillation of one or more teachers into a student.

    Attributes:
        method: File name in ``visionkd/methods``, or ``auto``.
        options: The method's own options, checked against its frozen dataclass.
        losses: Methods whose terms are added up, with weights, in place of one method; ``task_loss`` weighs the labels.
        int8: What becomes of the student behind its training, for devices that compute in INT8.
    """

    student: NetworkConfig
    teachers: Annotated[list[TeacherConfig], Field(min_length=1)]
    method: str = "auto"
    options: dict[str, Any] = {}
    losses: dict[str, LossConfig] = {}
    fit_teacher: FitTeacherConfig = FitTeacherConfig()
    label_store: LabelStoreConfig = LabelStoreConfig()
    int8: Int8RunConfig = Int8RunConfig()
