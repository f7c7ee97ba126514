"""Steps of segmentation: visionkd's beside a plain loop of torchvision's network, LAD's beside the sum of its parts.

The plain loop is handed images that are normalised already; visionkd starts from the bytes that its loader delivers.
The parts of a LAD step are the student's own step, the teacher's answer to images with a label channel, and the
distance between two maps at hand, forward and backward; each is timed alone, in the rounds of the whole step.
"""

from __future__ import annotations

import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from _bench.contenders import BARE, NAIVE, ONLINE, Contender
from _bench.rounds import measure
from _bench.setting import SGD, Setting, Step
from visionkd.config.schema import DistillConfig, NetworkConfig, RunConfig, TeacherConfig, TrainConfig
from visionkd.losses.cwd import channel_wise_loss
from visionkd.losses.lad import fixed_codes, label_channel, with_label
from visionkd.methods._base import Budget, DistillationModule
from visionkd.methods._supervised import Supervised
from visionkd.methods.lad import LAD, LADOptions
from visionkd.models.factory import Network, create_network
from visionkd.models.label_input import with_label_input
from visionkd.tasks.segmentation import SegmentationTask
from visionkd.types import IGNORE

NETWORK = "deeplabv3_mobilenet_v3_large"
IMG_SIZE, BATCH_SIZE, NUM_CLASSES, AUX_WEIGHT = (192, 256), 4, 11, 0.4
#: Of the student's step to the plain loop's, of a LAD step to the sum of its parts, and of the metrics to an epoch.
STEP_LIMIT, LAD_LIMIT, METRICS_LIMIT = 1.03, 1.03, 0.02
#: Images of a data set as CamVid has them: what is trained on and what is validated on in an epoch.
EPOCH = (367, 101)
_SEED = 0


@dataclass(frozen=True)
class _Shape:
    batch_size: int = BATCH_SIZE


class Material:
    """A network, and one fixed batch of images and maps; ``lad`` adds a teacher."""

    def __init__(self, setting: Setting, *, lad: bool) -> None:
        self.setting, self.lad, self.pair = setting, lad, _Shape()
        torch.manual_seed(_SEED)
        config = NetworkConfig(name=NETWORK, pretrained=False, img_size=IMG_SIZE, args={"aux": True})
        self.student = self._settled(create_network(config, num_classes=NUM_CLASSES, in_training=True)).train()
        teacher = with_label_input(copy.deepcopy(self.student), std=1.0, seed=_SEED)
        self.teacher = self._settled(teacher).eval().requires_grad_(False)
        self.pixels = torch.randint(0, 256, (BATCH_SIZE, 3, *IMG_SIZE), dtype=torch.uint8)
        self.target = torch.randint(0, NUM_CLASSES, (BATCH_SIZE, *IMG_SIZE), dtype=torch.uint8)
        self.target[:, :8] = IGNORE
        with torch.no_grad():
            self.scaled = self.pixels.to(torch.float32, memory_format=setting.memory_format) / 255.0
            self.image = self.student.normalize(self.scaled)

    def _settled(self, network: Network) -> Network:
        without_dropout(network)
        return network.to(memory_format=self.setting.memory_format)

    def batch(self) -> dict[str, Tensor]:
        return {
            "image": self.pixels,
            "target": self.target,
            "index": torch.arange(BATCH_SIZE),
            "unreadable": torch.full((BATCH_SIZE,), -1),
        }

    def config(self) -> RunConfig:
        network: Any = {"name": NETWORK, "pretrained": False, "img_size": IMG_SIZE, "args": {"aux": True}}
        config: Any
        if self.lad:
            config = DistillConfig(student=NetworkConfig(**network), teachers=[TeacherConfig(**network)], method="lad")
        else:
            config = TrainConfig(model=NetworkConfig(**network))
        config.task = "segmentation"
        optimizer = config.optimizer
        optimizer.name, optimizer.lr, optimizer.weight_decay = "sgd", SGD["lr"], SGD["weight_decay"]
        optimizer.momentum, optimizer.nesterov = SGD["momentum"], SGD["nesterov"]
        optimizer.decay_norm_and_bias = True
        config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
        config.training.batch_size = BATCH_SIZE
        config.training.precision = self.setting.precision
        config.training.channels_last = self.setting.channels_last
        config.compute.accelerator, config.compute.devices = "cpu", 1
        return config

    def module(self, config: RunConfig, *, steps: int) -> DistillationModule:
        given: dict[str, Any] = {
            "student": copy.deepcopy(self.student),
            "task": SegmentationTask(num_classes=NUM_CLASSES, aux_weight=AUX_WEIGHT),
            "config": config,
            "budget": Budget(steps_per_epoch=steps, epochs=1),
        }
        if self.lad:
            return LAD(**given, teachers=[self.teacher], options=LADOptions(aux_weight=AUX_WEIGHT))
        return Supervised(**given)


def without_dropout(net: nn.Module) -> nn.Module:
    """Switch dropout off: its random numbers would tell the losses apart."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


# What is timed --------------------------------------------------------------------------------------------------------


def plain(material: Material) -> Step:
    """The loop of torchvision's references: all heads, cross-entropy over the labelled pixels."""
    net = deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES, aux_loss=True
    )  # fmt: skip
    net.load_state_dict(material.student.net.state_dict())
    net = without_dropout(net).train().to(memory_format=material.setting.memory_format)
    image, target = material.image, material.target.long()
    optimizer = torch.optim.SGD(net.parameters(), **SGD)

    def step() -> Tensor:
        with material.setting.autocast():
            found = net(image)
        loss = sum(
            weight * F.cross_entropy(found[name].float(), target, ignore_index=IGNORE)
            for name, weight in (("out", 1.0), ("aux", AUX_WEIGHT))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def teacher_answer(material: Material) -> Step:
    image, codes = material.scaled, fixed_codes(NUM_CLASSES)

    def step() -> Tensor:
        with torch.no_grad(), material.setting.autocast():
            noise = torch.randn(len(image), 1, *IMG_SIZE)
            channel = label_channel(target=material.target, codes=codes, noise=noise, sigma=0.02, gain=1.75)
            return material.teacher(with_label(image, channel)).logits.sum()

    return step


def distance(material: Material) -> Step:
    with torch.no_grad():
        own = material.student(material.scaled).logits.float()
    other = torch.randn_like(own)

    def step() -> Tensor:
        leaf = own.detach().requires_grad_()
        loss = channel_wise_loss(student_map=leaf, teacher_map=other, temperature=4.0)
        loss.backward()
        return loss

    return step


@dataclass(frozen=True)
class SegmentationResult:
    """What the steps take.

    Attributes:
        plain_ms: Median step of the plain loop.
        step_ms: That of visionkd's Trainer, the student alone.
        ratio: Median over the rounds of the second by the first, with its quartiles.
        lad_ms: Median step of LAD.
        parts_ms: Medians of its parts.
        lad_ratio: Median over the rounds of the LAD step by the sum of its parts, with its quartiles.
        metrics_share: Time of the metrics of an epoch by the time of the epoch.
        plain_mb: Peak memory of a process that makes steps of the plain loop.
        step_mb: That of one that makes visionkd's.
    """

    plain_ms: float
    step_ms: float
    ratio: tuple[float, float, float]
    lad_ms: float
    parts_ms: dict[str, float]
    lad_ratio: tuple[float, float, float]
    metrics_share: float
    plain_mb: float
    step_mb: float

    def problems(self) -> list[str]:
        """Return which figures are above their limits."""
        found = (
            ("a step of the student alone takes", self.ratio[0], STEP_LIMIT, "times the plain loop's"),
            ("a LAD step takes", self.lad_ratio[0], LAD_LIMIT, "times its parts"),
            ("the metrics take", self.metrics_share, METRICS_LIMIT, "of an epoch"),
        )
        return [f"{what} {value:.3f} {of}, more than {most}" for what, value, most, of in found if value > most]


def measure_segmentation(
    setting: Setting, *, rounds: int, steps: int, warmup: int, progress: Callable[[int, int], None]
) -> SegmentationResult:
    """Time all of it in interleaved rounds."""
    asked = {"rounds": rounds, "steps": steps, "warmup": warmup, "progress": progress}
    alone = (Contender(NAIVE, "torchvision loop", plain), Contender(ONLINE, "visionkd, as 'train' trains", None))
    results, _ = measure(Material(setting, lad=False), alone, **asked)  # type: ignore[arg-type]
    by_name = {result.contender.name: result for result in results}
    parts = (
        Contender(BARE, "the student's own step", plain, distils=False),
        Contender("teacher", "the teacher's answer", teacher_answer, distils=False),
        Contender("distance", "the distance, forward and backward", distance, distils=False),
    )
    material = Material(setting, lad=True)
    results, _ = measure(material, (*parts, Contender(ONLINE, "LAD", None)), **asked)  # type: ignore[arg-type]
    *found, lad = results
    sums = [sum(each) for each in zip(*(part.step_ms for part in found), strict=True)]
    ratios = [whole / total for whole, total in zip(lad.step_ms, sums, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    step_ms = by_name[ONLINE].median_ms
    return SegmentationResult(
        by_name[NAIVE].median_ms,
        step_ms,
        by_name[ONLINE].ratio(by_name[NAIVE]),
        lad.median_ms,
        {part.contender.name: part.median_ms for part in found},
        (middle, low, high),
        _metrics_share(material, step_ms=step_ms),
        _peak_mb("plain", setting),
        _peak_mb("visionkd", setting),
    )


def _metrics_share(material: Material, *, step_ms: float) -> float:
    """Return what the metrics of the validation take of an epoch of training and validation."""
    task, batch = SegmentationTask(num_classes=NUM_CLASSES), [each for each in material.target]
    network = copy.deepcopy(material.student).eval()
    metrics = task.metrics()
    times: dict[str, list[float]] = {"answer": [], "update": []}
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            output = network(material.scaled)
            middle = time.perf_counter()
            task.update(metrics, output, batch)
            times["answer"].append(middle - start)
            times["update"].append(time.perf_counter() - middle)
        start = time.perf_counter()
        metrics.compute()
        compute = time.perf_counter() - start
    trained, validated = (count / BATCH_SIZE for count in EPOCH)
    answer, update = (statistics.median(times[name][1:]) for name in ("answer", "update"))
    counting = validated * update + compute
    return counting / (trained * step_ms / 1e3 + validated * answer + counting)


def _peak_mb(which: str, setting: Setting) -> float:
    """Return the peak memory of a fresh process that makes three steps."""
    root = Path(__file__).resolve().parent.parent
    call = f"from _bench.segmentation import peak; peak({which!r}, {setting.precision!r}, {setting.channels_last!r},"
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root.parent)!r}]; {call} {torch.get_num_threads()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak(which: str, precision: str, channels_last: bool, threads: int) -> None:
    """Print the peak memory of this process after three steps, in megabytes."""
    torch.set_num_threads(threads)
    material = Material(Setting(precision, channels_last), lad=False)
    if which == "plain":
        step = plain(material)
        for _ in range(3):
            step()
    else:
        measure(material, (Contender(ONLINE, "", None),), rounds=1, steps=2, warmup=1)  # type: ignore[arg-type]
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands the figure of getrusage on from the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        print(int(line.split()[1]) * 1024 / 1e6)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
