"""INT8 inside of a run: calibrate a network, and train it with its quantisers on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from visionkd.config.int8 import Int8Config
from visionkd.config.schema import RunConfig
from visionkd.data.open import open_data
from visionkd.data.subset import stratified_subset, targets_of
from visionkd.hub.package import save_package
from visionkd.methods._base import DistillationModule
from visionkd.methods._optimizer import Budget
from visionkd.models.classes import names_or_numbers
from visionkd.models.network import Network
from visionkd.quantization.bias_correction import correct_bias
from visionkd.quantization.calibration import USUAL_IMAGES, calibrate
from visionkd.quantization.equalization import equalize, find_chains
from visionkd.quantization.insert import (
    Int8Scheme,
    activation_quantizers,
    float_layers,
    freeze,
    int8_layers,
    quantize_network,
    unfreeze,
)
from visionkd.types import DataSet, Listener, Progress, Source
from visionkd.workflows._int8_boxes import BlankBoxes
from visionkd.workflows._int8_maps import BlankMaps
from visionkd.workflows._networks import image_batches, load_network
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._stages import Stages
from visionkd.workflows._tasks import check_task
from visionkd.workflows._training import fit, torch_device

#: Learning rate of a training with quantisers on, as a share of the one that the weights were trained with.
LR_RATIO = 0.01
_BATCH, _DENSE_BATCH = 32, 8
_FEW_IMAGES = 128
_SHOWN = 5


def images_for(network: Network, config: RunConfig, *, model: str, listener: Listener) -> DataSet:
    """Open data for a trained network whose ranges or accuracy are asked for: any images will do.

    A network that names pixels, or finds boxes, takes images without maps or boxes too; labels of whole images, if any,
    are not looked at.

    Args:
        network: The network.
        config: Settings, with the data.
        model: What the user called the network.
        listener: Is told what happens.

    Raises:
        RequestError: If the data has maps or boxes, and the network is not for these.
    """

    def names() -> tuple[str, ...]:
        return names_or_numbers(network.classes, network.num_classes)

    drawn = config.data.path == "shapes" and config.task == "auto"
    data = open_data(
        config.data.path, config=config.data, seed=config.data.split_seed, img_size=max(network.input.img_size),
        task=network.task if drawn else config.task, classes=names,
    )  # fmt: skip
    kind = {"segmentation": BlankMaps, "detection": BlankBoxes}.get(network.task)
    if kind is not None and data.task == "classification":
        if any(bool((targets_of(source) >= 0).any()) for source in data.splits.values()):
            listener.message("The labels are not looked at: they name whole images", level="warning")
        blank = {name: kind(source) for name, source in data.splits.items()}
        return replace(data, task=network.task, classes=names(), splits=blank)
    check_task(model, network.task, data.task, key="--data")
    return data


def scheme_of(config: Int8Config) -> Int8Scheme:
    """Return the part of the settings that belongs to the network."""
    return Int8Scheme(
        calibration=config.calibration,
        percentile=config.percentile,
        attention=config.attention,
        gates=config.gates,
        residual=config.residual,
        skip=config.skip,
        learned_scales=config.learned_scales,
    )


def quantize_student(
    network: Network,
    source: Source,
    config: Int8Config,
    *,
    device: torch.device,
    workers: int = 0,
    seed: int = 0,
    listener: Listener | None = None,
) -> Network:
    """Return a calibrated INT8 copy of ``network``, in eval mode: post-training quantisation.

    Args:
        network: Trained, in float.
        source: Images to find ranges on; labels are not looked at but to spread the choice over the classes.
        config: Settings.
        device: Where to run.
        workers: Loader processes.
        seed: Chooses the images.
        listener: Is told what happens.

    Raises:
        WorkError: If the network cannot be quantised.
        DataError: If the images give no usable ranges.
    """
    listener = listener or Listener()
    chosen = stratified_subset(source, config.images, seed=seed)
    quantized = quantize_network(network.to(device), scheme=scheme_of(config)).eval()

    def batches() -> Iterator[Tensor]:
        done = 0
        size = _BATCH if network.task == "classification" else _DENSE_BATCH
        for image, _ in image_batches(chosen, network, batch_size=size, workers=workers):
            yield image
            done += len(image)
            listener.progress(Progress("calibrate", done, len(chosen)))

    equalized = equalize(quantized, batches()) if config.equalize and find_chains(quantized) else {}
    found = calibrate(quantized, batches())
    if found.images < _FEW_IMAGES:
        listener.message(
            f"Ranges come from {found.images} images; {USUAL_IMAGES} are usual (-o int8.images=N)", level="warning"
        )
    if config.correct_bias:
        correct_bias(quantized, batches())
    for text in _said(quantized, found.images, config, len(equalized)):
        listener.message(text)
    return quantized


def _said(network: Network, images: int, config: Int8Config, equalized: int) -> Iterator[str]:
    layers, rest = len(int8_layers(network)), float_layers(network)
    text = f"INT8: {layers} layers and {len(activation_quantizers(network))} activations, ranges by"
    text += f" '{config.calibration}' from {images} images"
    yield text + (f"; {equalized} pairs of layers equalised" if equalized else "")
    if rest:
        names = ", ".join(f"{name} ({reason})" for name, reason in list(rest.items())[:_SHOWN])
        yield f"In float stay {len(rest)} layers: {names}" + (", ..." if len(rest) > _SHOWN else "")


def calibrate_once(
    network: Network,
    int8: Int8Config,
    *,
    data: DataSet,
    config: RunConfig,
    run: RunDirectory,
    listener: Listener,
    stages: Stages,
) -> Network:
    """Find all ranges in a stage of a run, which is resumed with those that were found, and return the INT8 network.

    Args:
        network: In float; one that is quantised already is taken as it is.
        int8: Settings of the quantisation.
        data: Its training split gives the images.
        config: Settings of the run.
        run: The run.
        listener: Is told what happens.
        stages: Of the run; one of them is called ``calibrate``.
    """
    kept = run.path / "stages" / "calibrated"
    with stages.stage("calibrate", f"Find the ranges of {network.architecture}") as todo:
        if todo and run.writes:
            if network.quantization is None:
                network = quantize_student(
                    network, data.splits["train"], int8, device=torch_device(config.compute),
                    workers=config.data.workers or 0, seed=config.training.seed, listener=listener,
                )  # fmt: skip
            save_package(network.cpu(), kept, task=data.task, classes=data.classes, metrics={}, origin={})
    run.wait_for_path(kept)
    return load_network(str(kept))


class FreezeInt8(Callback):
    """Fixes batch norms and the ranges of weights for the last share of a training.

    Args:
        share: Of the training's steps.
    """

    def __init__(self, share: float) -> None:
        self.share, self.frozen = share, False

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.frozen = state_dict["frozen"]

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        for network in _networks(pl_module):
            unfreeze(network)
            if self.frozen:  # resumed: ranges are those of the checkpoint
                for layer in int8_layers(network).values():
                    layer.weight_quantizer.frozen = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, batch: Any, batch_idx: int) -> None:
        steps = int(trainer.num_training_batches)
        total = steps * int(trainer.max_epochs or 1)
        if not self.frozen and trainer.current_epoch * steps + batch_idx >= math.floor(total * (1.0 - self.share)):
            for network in _networks(pl_module):
                freeze(network)
            self.frozen = True
        if self.frozen:
            for module in pl_module.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


def _networks(module: DistillationModule) -> tuple[Network, ...]:
    return (module.student,) if module.ema is None else (module.student, module.ema.module)


def fit_int8(
    build: Callable[[Budget], DistillationModule], *, student: Network, int8: Int8Config, **settings: Any
) -> Network:
    """Train a quantised network and return it with all scales fixed: quantisation-aware training.

    Args:
        build: Makes the module, of any method that looks at logits alone, for a budget.
        student: The quantised network that trains.
        int8: Settings.
        settings: Further arguments of :func:`visionkd.workflows._training.fit`.
    """
    module = fit(build, student=student, callbacks=[FreezeInt8(int8.frozen_share)], **settings)
    network = module.deployed_student
    freeze(network)
    return network
