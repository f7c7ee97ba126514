"""Does loading images keep up with a small student? Images a second of the loader, of training, and of both at once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from _bench.setting import Setting
from visionkd.config.schema import NetworkConfig, TrainConfig
from visionkd.data.loader import TrainLoader, train_loader
from visionkd.data.open import open_data
from visionkd.data.transforms import TrainTransform
from visionkd.methods._base import Budget
from visionkd.methods._supervised import Supervised, SupervisedOptions
from visionkd.models.factory import create_network
from visionkd.tasks.classification import ClassificationTask
from visionkd.workflows._training import resolve_training

_CLASSES = 10
_EPOCHS = 20  # of the run that this stands for; 'auto' caches nothing for very short ones
_WARMUP = 3
_CONTRAST, _GRAIN = 55.0, 8.0  # grey levels; gives files of the size of photographs


@dataclass(frozen=True)
class Case:
    """One kind of data and the small student that it has to feed.

    Attributes:
        img_size: Height and width of the training views in pixels.
        stored_px: Height and width of the image files in pixels.
        cache: ``auto``, or ``none`` where a few images stand for a data set that does not fit into memory.
        student: timm name.
        batch_size: Images per step.
        batches: Batches in an epoch, which is one slice of a round.
    """

    img_size: int
    stored_px: tuple[int, int]
    cache: str
    student: str
    batch_size: int
    batches: int


CASES = (
    Case(32, (32, 32), "auto", "cifar_resnet8", batch_size=128, batches=30),
    Case(224, (375, 500), "none", "mobilenetv3_small_050", batch_size=32, batches=12),
    Case(224, (375, 500), "none", "resnet18", batch_size=32, batches=4),
)


@dataclass(frozen=True)
class PipelineResult:
    """Images a second, medians over rounds.

    Attributes:
        case: What was measured.
        workers: Loader processes.
        cached: Whether the decoded images lay in memory.
        pipeline: The loader alone.
        training: Training steps alone, on one batch at hand.
        together: Training on what the loader delivers.
    """

    case: Case
    workers: int
    cached: bool
    pipeline: float
    training: float
    together: float

    @property
    def limit(self) -> str:
        """What holds training back."""
        return "data pipeline" if self.pipeline < self.training else "training"


def measure_pipeline(
    case: Case,
    setting: Setting,
    *,
    rounds: int,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PipelineResult:
    """Time the loader, training and both, on generated JPEG files, in interleaved rounds of an epoch each.

    Args:
        case: What to measure.
        setting: Precision and memory format.
        rounds: Number of rounds.
        workers: Loader processes; None takes as many as a run would.
        progress: Called with rounds done and rounds in all.
    """
    with tempfile.TemporaryDirectory(prefix="bench_training_") as folder:
        write_images(Path(folder), count=case.batch_size * case.batches, size=case.stored_px)
        loader = _loader(folder, case, setting, workers)
        step = _training_step(case, setting)
        at_hand = list(loader)[0]  # the first epoch starts the workers and is not timed
        for number in range(_WARMUP):
            step(at_hand, number)

        def pipeline() -> int:
            return sum(len(batch["image"]) for batch in loader)

        def training() -> int:
            for number in range(case.batches):
                step(at_hand, number)
            return case.batches * case.batch_size

        def together() -> int:
            return sum(step(batch, number) for number, batch in enumerate(loader))

        rates: dict[Callable[[], int], list[float]] = {pipeline: [], training: [], together: []}
        for done in range(rounds):
            for work, found in rates.items():
                loader.set_epoch(loader.batch_sampler.epoch + 1)
                start = time.perf_counter()
                images = work()
                found.append(images / (time.perf_counter() - start))
            progress(done + 1, rounds)
        return PipelineResult(
            case, loader.num_workers, loader.cached, *(median(rates[work]) for work in (pipeline, training, together))
        )


def _config(case: Case, setting: Setting) -> TrainConfig:
    config = TrainConfig(model=NetworkConfig(name=case.student, pretrained=False, img_size=case.img_size))
    config.training.epochs, config.training.batch_size = _EPOCHS, case.batch_size
    config.training.precision = setting.precision  # type: ignore[assignment]
    config.training.channels_last = setting.channels_last
    resolve_training(config, img_size=case.img_size)
    return config


def _loader(folder: str, case: Case, setting: Setting, workers: int | None) -> TrainLoader:
    config = _config(case, setting)
    data = open_data(folder, seed=0, img_size=case.img_size)
    transform = TrainTransform(config.augment, img_size=case.img_size)
    return train_loader(
        data.splits["train"], transform, batch_size=case.batch_size, seed=0, cache=case.cache, epochs=_EPOCHS,
        workers=config.data.workers if workers is None else workers,
    )  # fmt: skip


def _training_step(case: Case, setting: Setting) -> Callable[[dict[str, torch.Tensor], int], int]:
    """Return what makes one supervised step of visionkd's training module: the fastest training there is to feed."""
    config = _config(case, setting)
    torch.manual_seed(0)
    module = Supervised(
        student=create_network(config.model, num_classes=_CLASSES, in_training=True),
        task=ClassificationTask(num_classes=_CLASSES),
        config=config,
        options=SupervisedOptions(),
        budget=Budget(steps_per_epoch=case.batches, epochs=_EPOCHS),
    ).train()
    optimizer = module.configure_optimizers()["optimizer"]

    def step(batch: dict[str, torch.Tensor], number: int) -> int:
        ready = module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
        with setting.autocast():
            loss = module.training_step(ready, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(batch["image"])

    return step


def write_images(folder: Path, *, count: int, size: tuple[int, int]) -> None:
    """Write ``train`` and ``val`` folders of classes with JPEG files as large, on disk and in pixels, as photographs.

    Args:
        folder: Where.
        count: Training images; as many others as there are classes are for validation.
        size: Height and width in pixels.
    """
    random = np.random.default_rng(0)
    height, width = size
    for split, images in (("train", count), ("val", _CLASSES)):
        for name in range(_CLASSES):
            (folder / split / f"class{name}").mkdir(parents=True)
        for number in range(images):
            coarse = Image.fromarray(_pixels(128 + _CONTRAST * random.standard_normal((8, 8, 3))))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
            grain = _GRAIN * random.standard_normal((height, width, 1), dtype=np.float32)
            file = folder / split / f"class{number % _CLASSES}" / f"{number:05d}.jpg"
            Image.fromarray(_pixels(smooth + grain)).save(file, quality=90)


def _pixels(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)
