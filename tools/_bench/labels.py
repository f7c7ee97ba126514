"""What a label store costs and saves: epochs on stored labels beside supervised epochs, and the filling of a store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from _bench.pipeline import write_images
from _bench.setting import Setting
from visionkd.config.schema import DistillConfig, LabelStoreConfig, NetworkConfig, TeacherConfig
from visionkd.data.loader import TrainLoader, train_loader
from visionkd.data.open import open_data
from visionkd.data.transforms import TrainTransform
from visionkd.methods._base import Budget, DistillationModule
from visionkd.methods._supervised import Supervised, SupervisedOptions
from visionkd.methods.kd import KD, KDOptions
from visionkd.models.factory import Network, create_network
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import Listener
from visionkd.workflows._labels import FillLabels, Labels, open_labels, resolve_label_store, store_key
from visionkd.workflows._training import resolve_training

_CLASSES = 10
_IMG_SIZE = 32
_BATCH = 128
_VIEWS = 12
_VIEWS_AT_A_TIME = 4  # so that starting loader processes weighs as little as in a whole data set
_EPOCHS = 100
_STUDENT, _TEACHER = "cifar_resnet8", "cifar_resnet20"


@dataclass(frozen=True)
class StoreResult:
    """Medians over interleaved rounds.

    Attributes:
        teachers: Number of teachers.
        supervised_s: Seconds of an epoch of the student alone.
        stored_s: Seconds of a distillation epoch whose labels are stored.
        online_s: Seconds of a distillation epoch in which the teachers run.
        stored_ratio: Stored to supervised epoch.
        online_ratio: Online to supervised epoch.
        fill_s: Seconds to fill four views of every image: loading, teachers, writing, merging.
        forward_s: Seconds of the teachers' forward passes over as many images at hand.
        fill_ratio: The one to the other.
        bytes_per_label: Bytes of a stored view.
    """

    teachers: int
    supervised_s: float
    stored_s: float
    online_s: float
    stored_ratio: float
    online_ratio: float
    fill_s: float
    forward_s: float
    fill_ratio: float
    bytes_per_label: int


def measure_store(
    setting: Setting,
    *,
    teachers: Sequence[int] = (1, 4),
    rounds: int,
    batches: int = 40,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[StoreResult]:
    """Time epochs of a small student on images of 32 pixels, for different numbers of teachers.

    Args:
        setting: Precision and memory format.
        teachers: Numbers of teachers.
        rounds: Number of rounds; in each, every kind of epoch runs once.
        batches: Batches in an epoch.
        workers: Loader processes; None takes as many as a run would.
        progress: Called with rounds done and rounds in all.
    """
    with tempfile.TemporaryDirectory(prefix="bench_training_") as folder:
        write_images(Path(folder) / "data", count=batches * _BATCH, size=(_IMG_SIZE, _IMG_SIZE))
        for count in teachers:
            yield _measure(Path(folder), setting, count, rounds=rounds, workers=workers, progress=progress)


def _measure(
    folder: Path,
    setting: Setting,
    count: int,
    *,
    rounds: int,
    workers: int | None,
    progress: Callable[[int, int], None],
) -> StoreResult:
    config = _config(folder, setting, count)
    data = open_data(str(folder / "data"), seed=0, img_size=_IMG_SIZE)
    networks = [_network(spec, seed) for seed, spec in enumerate(config.teachers)]
    resolve_training(config, img_size=_IMG_SIZE)
    resolve_label_store(config, KD, KDOptions(), data)
    if workers is not None:
        config.data.workers = workers
    listener = Listener()
    key = store_key(
        config, data=data, teachers=networks, temperature=4.0, img_size=(_IMG_SIZE, _IMG_SIZE), interpolation="bilinear"
    )
    labels = open_labels(config, key, data=data, teachers=networks, listener=listener)
    supervised = _Epochs(config, setting, data.splits["train"], [])
    online = _Epochs(config, setting, data.splits["train"], networks)
    stored = _Epochs(config, setting, data.splits["train"], networks)
    fills, forwards = stored.fill(labels, listener)
    found: dict[str, list[float]] = {"supervised": [], "stored": [], "online": []}
    kinds = {"supervised": supervised, "stored": stored, "online": online}
    for epochs in kinds.values():
        epochs.run()  # starts the loader processes and warms up
    for done in range(rounds):
        for name in kinds if done % 2 == 0 else reversed(kinds):
            found[name].append(kinds[name].run())
        progress(done + 1, rounds)
    labels.store.close()
    ratios = {
        name: median(mine / theirs for mine, theirs in zip(found[name], found["supervised"], strict=True))
        for name in found
    }
    return StoreResult(
        teachers=count,
        supervised_s=median(found["supervised"]),
        stored_s=median(found["stored"]),
        online_s=median(found["online"]),
        stored_ratio=ratios["stored"],
        online_ratio=ratios["online"],
        fill_s=median(fills),
        forward_s=median(forwards),
        fill_ratio=median(fill / forward for fill, forward in zip(fills, forwards, strict=True)),
        bytes_per_label=labels.store.bytes_per_label,
    )


def _config(folder: Path, setting: Setting, count: int) -> DistillConfig:
    teacher = TeacherConfig(name=_TEACHER, pretrained=False)
    config = DistillConfig(
        student=NetworkConfig(name=_STUDENT, pretrained=False),
        teachers=[teacher] * count,
        method="kd",
        label_store=LabelStoreConfig(mode="on", views=_VIEWS, path=str(folder / f"store{count}")),
    )
    config.optimizer.name, config.optimizer.lr = "sgd", 0.01
    config.training.epochs, config.training.batch_size = _EPOCHS, _BATCH
    config.training.precision = setting.precision  # type: ignore[assignment]
    config.training.channels_last = setting.channels_last
    return config


def _network(spec: NetworkConfig, seed: int) -> Network:
    torch.manual_seed(seed)
    return create_network(spec, num_classes=_CLASSES, in_training=True)


class _Epochs:
    """A training module and its loader, an epoch at a time, without a Trainer."""

    def __init__(self, config: DistillConfig, setting: Setting, source: object, teachers: Sequence[Network]) -> None:
        self.setting = setting
        transform = TrainTransform(config.augment, img_size=_IMG_SIZE)
        self.loader: TrainLoader = train_loader(
            source, transform, batch_size=_BATCH, seed=0, cache="ram", workers=config.data.workers, views=_VIEWS,
            view_seed=0, epochs=_EPOCHS,
        )  # fmt: skip
        given = {
            "student": _network(config.student, 0),
            "task": ClassificationTask(num_classes=_CLASSES),
            "config": config,
            "budget": Budget(steps_per_epoch=len(self.loader), epochs=_EPOCHS),
        }
        self.module: DistillationModule = (
            KD(teachers=teachers, options=KDOptions(), **given)
            if teachers
            else Supervised(options=SupervisedOptions(), **given)
        )
        self.module.train()
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.epoch = 0

    def run(self) -> float:
        """Train for an epoch and return its seconds."""
        self.loader.set_epoch(self.epoch)
        start = time.perf_counter()
        for number, batch in enumerate(self.loader):
            ready = self.module.on_after_batch_transfer(self.module.on_before_batch_transfer(batch, 0), 0)
            with self.setting.autocast():
                loss = self.module.training_step(ready, number)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.epoch += 1
        return time.perf_counter() - start

    def fill(self, labels: Labels, listener: Listener) -> tuple[list[float], list[float]]:
        """Fill the store some views at a time; return the seconds of each, and of the forward passes alone."""
        callback = FillLabels(labels, self.loader, listener)
        alone = SimpleNamespace(
            global_rank=0, local_rank=0, world_size=1, strategy=SimpleNamespace(barrier=lambda name: None)
        )
        callback.setup(alone, self.module, "fit")
        at_hand = next(iter(self.loader))
        image = self.module.on_after_batch_transfer({"image": at_hand["image"]}, 0)["image"]
        batches = -(-len(self.loader.source) * _VIEWS_AT_A_TIME // _BATCH)
        self.module.teacher_outputs(image)
        fills, forwards = [], []
        for first in range(0, _VIEWS, _VIEWS_AT_A_TIME):
            start = time.perf_counter()
            for _ in range(batches):
                self.module.teacher_outputs(image)
            forwards.append(time.perf_counter() - start)
            start = time.perf_counter()
            callback._fill(alone, self.module, range(first, first + _VIEWS_AT_A_TIME))
            fills.append(time.perf_counter() - start)
        return fills, forwards
