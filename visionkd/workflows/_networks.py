"""Build the networks of a run, and give a teacher the data's classes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from visionkd.benchmark.complexity import measure_complexity
from visionkd.config.schema import DistillConfig, NetworkConfig, TrainConfig
from visionkd.data.loader import eval_loader
from visionkd.data.subset import SubsetSource, stratified_subset
from visionkd.data.views import eval_view
from visionkd.errors import Problem, RequestError, WorkError
from visionkd.files import write_bytes
from visionkd.models.classes import align_classes
from visionkd.models.factory import create_network
from visionkd.models.initial import network_from
from visionkd.models.label_input import sees_labels
from visionkd.models.network import Network
from visionkd.teachers.fit import cache_features, fit_probe
from visionkd.teachers.preflight import Preflight, preflight
from visionkd.teachers.preflight_boxes import preflight_boxes
from visionkd.types import DataSet, Listener, Progress, Source
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._tasks import work_of
from visionkd.workflows._training import torch_device

_CPU_PROBE_GMACS = 5_000.0  # what a probe may cost where there is no GPU: a few minutes on two cores
_PREFLIGHT_IMAGES = 256
_PREFLIGHT_MAPS = 32
_PREFLIGHT_S = 10.0


def seeded_network(
    config: NetworkConfig,
    *,
    data: DataSet | None,
    seed: int,
    role: str,
    init: str | None = None,
    classifier: bool = True,
) -> Network:
    """Create a network whose random weights depend on the run's seed and its role alone.

    Args:
        config: What to create.
        data: Whose classes it gets; None keeps the network's own.
        seed: The run's seed.
        role: ``student``, ``teacher0``, ...
        init: MODEL whose weights it begins with.
        classifier: Whether it gets outputs for the data's classes, or none at all.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, role))
        if data is None:
            return create_network(config, in_training=False)
        if init is not None:
            return network_from(init, config, classes=data.classes if classifier else None, task=data.task)
        if not classifier:
            return create_network(config, num_classes=0, in_training=True)
        return create_network(
            config, num_classes=len(data.classes), classes=data.classes, in_training=True, task=data.task
        )


def load_network(model: str, *, with_labels: bool = False) -> Network:
    """Load a trained MODEL as it is: a run directory, a packaged model, a published network or a weights file.

    Raises:
        RequestError: If it has to be shown labels, unless the caller does so (``with_labels``).
    """
    network = create_network(NetworkConfig(name=model), in_training=False)
    if not with_labels:
        refuse_privileged(network, model)
    return network


def refuse_privileged(network: Network, name: str) -> None:
    """Refuse a network that a method trained with labels in its input: without them its answers mean nothing.

    Raises:
        RequestError: If it is one.
    """
    if sees_labels(network):
        raise RequestError(
            f"'{name}' is a teacher that must be shown the labels beside each image, so it is no model to use",
            hint="Name the run itself for its student; another run of lad may take this teacher.",
        )


def load_classifier(model: str) -> Network:
    """Load a trained MODEL that names classes.

    Raises:
        RequestError: If it is an encoder from pre-training, which names none.
    """
    network = load_network(model)
    if network.num_classes == 0:
        raise RequestError(
            f"'{model}' is an encoder without a classifier: it names no classes yet",
            hint=f"Fit one: visionkd train --init {model} --data DATA (--linear-probe leaves the encoder as it is)",
        )
    return network


def load_for_bench(model: str, *, img_size: int | None = None) -> Network:
    """Load a MODEL to time it: published weights are not fetched, since they change nothing."""
    return create_network(NetworkConfig(name=model, pretrained=False, img_size=img_size), in_training=True).eval()


def seed_of(seed: int, role: str) -> int:
    """Derive an independent seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{role}".encode()).digest()[:7], "big")


def image_batches(
    source: Source, network: Network, *, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images in [0, 1], B x 3 x H x W, prepared as the network wants them, and their targets; maps as a list."""
    view = eval_view(network.task, network.input)
    for batch in eval_loader(source, view, batch_size=batch_size, workers=workers):
        if len(batch["target"]):
            yield batch["image"].float().div_(255.0), batch["target"]


def look_at_teacher(
    teacher: Network, data: DataSet, config: DistillConfig, listener: Listener, *, name: str
) -> Preflight:
    """Run the pre-flight on validation images, for some seconds at most, and say what was found."""
    source = data.splits["val"]
    count = _PREFLIGHT_IMAGES if data.task == "classification" else _PREFLIGHT_MAPS
    if count < len(source):
        source = SubsetSource(source, work_of(data.task).some(source, count, seed=config.data.split_seed))
    start = time.perf_counter()

    def limited() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(image_batches(source, teacher, batch_size=16, workers=0)):
            if number and time.perf_counter() - start > _PREFLIGHT_S:
                return
            yield batch

    look = preflight_boxes if data.task == "detection" else preflight
    found = look(teacher, limited(), num_classes=len(data.classes), device=torch_device(config.compute), name=name)
    seconds_per_image = (time.perf_counter() - start) / (found.num_images + 16)  # the first batch is run twice
    for finding in found.findings:
        listener.message(finding.text, level="warning" if finding.status == "warning" else "info")
    step_s = seconds_per_image * config.training.batch_size
    if step_s > _PREFLIGHT_S:
        listener.message(
            f"{name} takes about {seconds_per_image:.2g} s an image here, {step_s:.0f} s of each step of"
            f" {config.training.batch_size}:"
            " a smaller --batch-size gives sooner signs of life, --precision bf16 or a smaller teacher saves time",
            level="warning",
        )
    return found


def check_fit(teacher: Network, data: DataSet, config: DistillConfig, *, name: str) -> None:
    """Refuse a teacher whose classes are not the data's where nothing is to be done about it.

    Raises:
        RequestError: If it would have to be fitted and ``--fit-teacher`` forbids that, or the task knows no probe.
    """
    mode, dense = config.fit_teacher.mode, data.task != "classification"
    if dense and mode == "probe":
        problem = f"a linear probe answers for whole images, and the data's task is {data.task}"
        raise RequestError(Problem("--fit-teacher", problem, "Use --fit-teacher finetune."))
    aligned = align_classes(teacher.classes, data.classes, teacher.num_classes)
    if aligned.columns is None and (mode == "none" or (dense and mode == "auto")):
        way = "--fit-teacher finetune" if dense else "--fit-teacher probe or finetune"
        raise RequestError(
            Problem(
                "--teacher",
                f"the {teacher.num_classes} classes of {name} are not the {len(data.classes)} of the data"
                f" ({', '.join(data.classes[:5])}{', ...' if len(data.classes) > 5 else ''})",
                f"Use {way}, or a teacher that was trained on these classes.",
            )
        )


def needs_fit(teacher: Network, data: DataSet, config: DistillConfig, listener: Listener, *, name: str) -> bool:
    """Bring the teacher's outputs into the data's order if it knows the classes; return whether it must be fitted."""
    mode = config.fit_teacher.mode
    aligned = align_classes(teacher.classes, data.classes, teacher.num_classes)
    if aligned.columns is not None:
        if aligned.note:
            listener.message(f"{name}: {aligned.note}")
        if aligned.columns != tuple(range(teacher.num_classes)):
            teacher.select_classes(aligned.columns, data.classes)
        return mode in ("probe", "finetune")
    if mode == "auto":
        listener.message(
            f"{name}: its {teacher.num_classes} classes are not the data's {len(data.classes)},"
            " so a linear probe on its features is fitted first (--fit-teacher auto)"
        )
    return True


def probe_teacher(
    teacher: Network,
    data: DataSet,
    config: DistillConfig,
    run: RunDirectory,
    listener: Listener,
    *,
    name: str,
    number: int,
) -> None:
    """Fit a linear probe, or take the one that the run fitted before; the teacher's classifier is replaced in place."""
    file = run.path / "teachers" / f"{number}.probe.safetensors"
    if not file.is_file():
        device = torch_device(config.compute)
        images = config.fit_teacher.max_images or _probe_images(teacher, len(data.classes), device)
        source = stratified_subset(data.splits["train"], images, seed=config.data.split_seed)
        if len(source) < len(data.splits["train"]):
            listener.message(
                f"{name}: the probe takes {len(source)} of {len(data.splits['train'])} training images"
                " (-o fit_teacher.max_images=N takes more)"
            )
        done, start = 0, time.perf_counter()

        def on_batch(count: int) -> None:
            nonlocal done
            done += count
            rate = done / (time.perf_counter() - start)
            listener.progress(
                Progress("fit_teacher", done, len(source), images_per_s=rate, eta_s=(len(source) - done) / rate)
            )

        precision = config.teachers[number].precision or config.training.precision
        features, targets = cache_features(
            teacher,
            image_batches(source, teacher, batch_size=16, workers=config.data.workers or 0),
            device=device,
            dtype={"bf16": torch.bfloat16, "16": torch.float16}.get(precision),
            on_batch=on_batch,
        )
        if not torch.isfinite(features).all():
            raise WorkError(
                f"{name} has NaN or infinite features.", hint="Try -o teachers.0.precision=32, or another teacher."
            )
        probe = fit_probe(features, targets, num_classes=len(data.classes), seed=config.training.seed)
        listener.message(
            f"{name}: linear probe fitted on {probe.num_images} images,"
            f" {probe.holdout_top1:.1f} % top-1 on the held-out fifth"
        )
        write_bytes(file, save({"weight": probe.weight, "bias": probe.bias}))
    probe_tensors = load_file(file)
    teacher.set_classifier(probe_tensors["weight"], probe_tensors["bias"], data.classes)


def probe_classifier(network: Network, data: DataSet, config: TrainConfig, listener: Listener) -> Network:
    """Fit a linear classifier on a network's own features of the training images, each seen once and unchanged."""
    source, done, start = data.splits["train"], 0, time.perf_counter()

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        rate = done / (time.perf_counter() - start)
        listener.progress(Progress("train", done, len(source), images_per_s=rate, eta_s=(len(source) - done) / rate))

    features, targets = cache_features(
        network,
        image_batches(source, network, batch_size=64, workers=config.data.workers or 0),
        device=torch_device(config.compute),
        dtype={"bf16": torch.bfloat16, "16": torch.float16}.get(config.training.precision),
        on_batch=on_batch,
    )
    if not torch.isfinite(features).all():
        raise WorkError(f"'{network.architecture}' has NaN or infinite features.", hint="Try --precision 32.")
    probe = fit_probe(features, targets, num_classes=len(data.classes), seed=config.training.seed)
    listener.message(
        f"Linear probe fitted on {probe.num_images} images,"
        f" {probe.holdout_top1:.1f} % top-1 on a held-out fifth of them"
    )
    network.set_classifier(probe.weight, probe.bias, data.classes)
    return network


def _probe_images(teacher: Network, num_classes: int, device: torch.device) -> int:
    if device.type != "cpu":
        return 100_000
    affordable = int(_CPU_PROBE_GMACS / max(measure_complexity(teacher).macs_g, 1e-6))
    return max(10 * num_classes, min(20_000, affordable))
