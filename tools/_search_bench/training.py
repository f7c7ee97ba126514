"""Distillation of many small students under one budget: data, teacher and its labels are shared by all of them."""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from dataclasses import dataclass

import lightning
import torch

from visionkd.config.schema import DistillConfig, NetworkConfig
from visionkd.data.cache import cached
from visionkd.data.loader import eval_loader, train_loader
from visionkd.data.open import open_data
from visionkd.data.transforms import EvalTransform, TrainTransform
from visionkd.methods._optimizer import Budget
from visionkd.methods.kd import KD, KDOptions
from visionkd.models.network import Network
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import Listener
from visionkd.workflows._labels import FillLabels, open_labels, resolve_label_store, store_key
from visionkd.workflows._networks import load_network, seeded_network
from visionkd.workflows._training import resolve_training

_PX = (32, 32)


@dataclass(frozen=True)
class Plan:
    """The budget, the same for all students.

    Attributes:
        images: Training images, spread over the classes.
        epochs: Passes over them; each has its own view of an image, the same for all students.
        batch_size: Images in a step.
        lr: Peak learning rate of SGD.
    """

    images: int = 8000
    epochs: int = 3
    batch_size: int = 64
    lr: float = 0.1

    def __str__(self) -> str:
        return f"{self.images} images x {self.epochs} epochs"


class Distillations:
    """Distils one teacher into students, one after the other.

    Args:
        teacher: MODEL, trained on the data.
        data: DATA with splits ``train`` and ``test``.
        plan: The budget.
    """

    def __init__(self, teacher: str, data: str, plan: Plan) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        self.plan, self.teacher = plan, load_network(teacher)
        self.config = DistillConfig(
            method="kd",
            student={"name": "cifar_resnet", "pretrained": False},
            teachers=[{"name": teacher}],
            data={"path": data, "limit_train": plan.images, "workers": 0},
            augment={"crop": "padded", "padding": 4, "hflip": 0.5},
            optimizer={"name": "sgd", "lr": plan.lr, "weight_decay": 5e-4},
            schedule={"warmup_epochs": 0.3},
            training={"epochs": plan.epochs, "batch_size": plan.batch_size, "precision": "bf16"},
            label_store={"mode": "on", "views": plan.epochs},
        )
        self.data = open_data(data, config=self.config.data)
        self.train = cached(self.data.splits["train"], "ram")
        self.test = cached(self.data.splits["val"], "ram")
        resolve_training(self.config, img_size=max(_PX))
        resolve_label_store(self.config, KD, KDOptions(), self.data)

    def distil(self, student: NetworkConfig, seed: int) -> tuple[float, float]:
        """Return the top-1 accuracy on the test images in percent, and the seconds of the training."""
        plan, config = self.plan, self.config
        config.training.seed = seed
        network = seeded_network(student, data=self.data, seed=seed, role="student")
        loader = train_loader(
            self.train, TrainTransform(config.augment, img_size=_PX, interpolation=network.input.interpolation),
            batch_size=plan.batch_size, seed=seed, workers=0, cache="none", epochs=plan.epochs, views=plan.epochs,
            view_seed=config.label_store.view_seed,
        )  # fmt: skip
        key = store_key(
            config, data=self.data, teachers=[self.teacher], img_size=_PX, interpolation=network.input.interpolation,
            temperature=KD.label_temperature(KDOptions()),
        )  # fmt: skip
        labels = open_labels(config, key, data=self.data, teachers=[self.teacher], listener=Listener())
        module = KD(
            student=network, teachers=[self.teacher], config=config, options=KDOptions(),
            task=ClassificationTask(num_classes=len(self.data.classes)),
            budget=Budget(steps_per_epoch=math.ceil(len(loader)), epochs=plan.epochs),
        )  # fmt: skip
        module.on_position = loader.batch_sampler.set_position
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trainer = lightning.Trainer(
                max_epochs=plan.epochs, precision="bf16-mixed", accelerator="cpu", devices=1, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                use_distributed_sampler=False, default_root_dir=folder,
                callbacks=[FillLabels(labels, loader, Listener())],
            )  # fmt: skip
            try:
                trainer.fit(module, loader)
            finally:
                labels.store.close()
        if trainer.interrupted:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - started
        return self.accuracy(module.deployed_student), seconds

    @torch.no_grad()
    def accuracy(self, network: Network) -> float:
        """Return the top-1 accuracy on the test images in percent."""
        network.eval()
        right = total = 0
        for batch in eval_loader(self.test, EvalTransform(network.input), batch_size=250, workers=0):
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(batch["image"].float().div(255.0)).logits
            assert logits is not None
            right += int((logits.argmax(1) == batch["target"]).sum())
            total += len(batch["target"])
        return 100.0 * right / total
