"""Steps of masked distillation beside a step that distils features of whole images through whole networks.

All train copies of the same student from the same weights on the same fixed batch, with fused SGD. The step on whole
images is the shortest there is: both networks on all tokens to their last block, one projection, the same distance.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from _bench.setting import SGD, Pair, Setting
from visionkd.config.schema import DistillConfig, NetworkConfig, TeacherConfig
from visionkd.errors import Problem, RequestError
from visionkd.losses.masked import alignment_loss
from visionkd.methods._optimizer import Budget
from visionkd.methods.dmae import DMAE, DMAEOptions
from visionkd.models.factory import Network, create_network

#: The pair that is measured unless another is named: its decoder is that of G2SD's authors for such a student.
PAIR = Pair("vit_base_small", "vit_base_patch16_224", "vit_small_patch16_224", 224, 4, 0, 1)
#: Largest share of the step on whole images that a masked one may take, by mask ratio.
LIMITS = {0.75: 0.35, 0.95: 0.2}
_DECODERS = {192: (128, 4, 4), 384: (256, 4, 8)}  # width of the student: its decoder's width, blocks and heads
_LARGE_DECODER = (512, 8, 16)
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class MaskedResult:
    """What one kind of step takes.

    Attributes:
        name: ``whole``, or the share of patches removed.
        step_ms: Median of the rounds.
        ratio: Median over the rounds of its time by that of the step on whole images in the same round.
        tokens: Tokens of each image in the encoders.
        kept_mb: Bytes that the forward pass keeps for the backward pass, each storage once.
        peak_mb: Most memory that the device had allocated, where it tells.
    """

    name: str
    step_ms: float
    ratio: float
    tokens: int
    kept_mb: float
    peak_mb: float | None


def measure_masked(
    pair: Pair, setting: Setting, *, rounds: int, steps: int, warmup: int, progress: Callable[[int, int], None]
) -> list[MaskedResult]:
    """Time the steps of one pair in interleaved rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, student = (_network(name, pair, device) for name in (pair.teacher, pair.student))
    images = torch.rand(pair.batch_size, 3, *student.input.img_size, generator=torch.Generator().manual_seed(0))
    images = images.to(device)
    patches = student.net.patch_embed.num_patches
    made: dict[str, tuple[Step, int]] = {"whole": (_whole(teacher, student, images, setting), patches + 1)}
    for ratio in LIMITS:
        module = _module(teacher, student, pair, setting, ratio)
        made[f"{ratio:g}"] = (_masked(module.to(device), images, setting), module.keep + 1)
    memory = {name: _memory(step, device) for name, (step, _) in made.items()}
    for step, _ in made.values():
        for _ in range(warmup):
            step()
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        for name, (step, _) in made.items():
            times[name].append(1e3 * _timed(step, steps, device))
        progress(number + 1, rounds)
    return [
        MaskedResult(
            name,
            statistics.median(times[name]),
            statistics.median(own / whole for own, whole in zip(times[name], times["whole"], strict=True)),
            tokens,
            *memory[name],
        )  # fmt: skip
        for name, (_, tokens) in made.items()
    ]


def problems(results: list[dict[str, Any]]) -> list[str]:
    """Return which steps take more than they may."""
    return [
        f"at {100 * ratio:g} % masking a step takes {row['ratio']:.3f} of a step on whole images, more than {limit}"
        for row in results
        for ratio, limit in LIMITS.items()
        if row["name"] == f"{ratio:g}" and row["ratio"] > limit
    ]


def rows_of(results: list[MaskedResult]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]


def _network(name: str, pair: Pair, device: torch.device) -> Network:
    torch.manual_seed(0)
    config = NetworkConfig(name=name, pretrained=False, img_size=pair.img_size)
    network = create_network(config, num_classes=0, in_training=True).to(device)
    if not hasattr(network.net, "patch_embed"):
        raise RequestError(Problem("--pair", f"'{name}' is no plain vision transformer"))
    return network


def _module(teacher: Network, student: Network, pair: Pair, setting: Setting, ratio: float) -> DMAE:
    width, depth, heads = _DECODERS.get(student.net.embed_dim, _LARGE_DECODER)
    config = DistillConfig(
        student=NetworkConfig(name=pair.student), teachers=[TeacherConfig(name=pair.teacher)], method="dmae"
    )
    config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay = "sgd", SGD["lr"], 0.0
    config.training.precision = setting.precision  # type: ignore[assignment]
    options = DMAEOptions(mask_ratio=ratio, decoder_width=width, decoder_depth=depth, decoder_heads=heads)
    given = {"student": copy.deepcopy(student), "teachers": [copy.deepcopy(teacher)], "config": config}
    if found := DMAE.check(**given, options=options):
        raise RequestError(found)
    module = DMAE(**given, options=options, budget=Budget(steps_per_epoch=1_000_000, epochs=1))
    return module.train()


def _masked(module: DMAE, images: Tensor, setting: Setting) -> Step:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], **SGD)

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            terms = module.loss_terms(images)
        loss = terms["reconstruction_loss"] + terms["alignment_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def _whole(teacher: Network, student: Network, images: Tensor, setting: Setting) -> Step:
    teacher, student = copy.deepcopy(teacher).eval().requires_grad_(False), copy.deepcopy(student).train()
    projection = nn.Linear(student.net.embed_dim, teacher.net.embed_dim).to(images.device)
    optimizer = torch.optim.SGD([*student.parameters(), *projection.parameters()], **SGD)

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            with torch.no_grad():
                theirs = teacher.net.forward_features(teacher.prepare(images))
            own = projection(student.net.forward_features(student.prepare(images)))
            loss = alignment_loss(student_feature=own, teacher_feature=theirs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def _timed(step: Step, count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - start) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(step: Step, device: torch.device) -> tuple[float, float | None]:
    """Return megabytes kept for the backward pass, and the device's peak where it tells."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not (tensor.is_leaf and tensor.requires_grad):  # weights are there anyway
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return sum(storages.values()) / 1e6, peak
