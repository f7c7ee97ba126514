"""What training with quantisers costs: a supervised step of the INT8 student beside one of the float student."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch.nn import functional as F

from _bench.setting import SGD, Material, Pair, Setting
from visionkd.models.network import Network
from visionkd.quantization.calibration import calibrate
from visionkd.quantization.insert import Int8Scheme, quantize_network, unfreeze


@dataclass(frozen=True)
class Int8Cost:
    """Milliseconds a step of both, medians, and the ratio of the two within a round.

    Attributes:
        student: timm name.
        img_size: Pixels.
        batch_size: Images a step.
        float_ms: Step in float.
        int8_ms: Step with quantisers on, the ranges of weights taken anew.
        ratio: Median of the rounds' ratios.
        low: Lower quartile.
        high: Upper quartile.
    """

    student: str
    img_size: int
    batch_size: int
    float_ms: float
    int8_ms: float
    ratio: float
    low: float
    high: float


def measure_int8(
    pair: Pair, setting: Setting, *, rounds: int, steps: int, warmup: int, progress: Callable[[int, int], None]
) -> Int8Cost:
    """Time interleaved rounds of both students."""
    material = Material(pair, setting)
    quantized = quantize_network(material.student, scheme=Int8Scheme(calibration="max"))
    pixels = material.pixels.float() / 255.0
    calibrate(quantized, [pixels], min_images=1)
    quantized.train()
    unfreeze(quantized)
    makers = [_stepper(network, material, setting) for network in (material.student, quantized)]
    for step in makers:
        for _ in range(warmup):
            step()
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for step, taken in zip(makers, times, strict=True):
            start = time.perf_counter()
            for _ in range(steps):
                step()
            taken.append((time.perf_counter() - start) * 1e3 / steps)
        progress(number + 1, rounds)
    ratios = [int8 / plain for plain, int8 in zip(*times, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Int8Cost(pair.student, pair.img_size, pair.batch_size, median(times[0]), median(times[1]), middle, low, high)


def _stepper(network: Network, material: Material, setting: Setting) -> Callable[[], None]:
    network.to(memory_format=setting.memory_format)
    optimizer = torch.optim.SGD(network.parameters(), **SGD)

    def step() -> None:
        with setting.autocast():
            loss = F.cross_entropy(network.net(material.image), material.target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
