"""What every method promises. A method's test inherits this class and says which method it is about."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path

import pytest
import torch

from visionkd import registry
from visionkd.config.load import build_options
from visionkd.config.schema import DistillConfig, NetworkConfig
from visionkd.methods._base import DistillationModule
from visionkd.methods._optimizer import Budget
from visionkd.models.factory import create_network
from visionkd.tasks.classification import ClassificationTask

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = 4
NEEDS = {"probabilities", "features", "gradients"}
TASKS = {"classification", "segmentation", "detection"}


def tiny_network(name: str = "cifar_resnet8", *, seed: int, num_classes: int = NUM_CLASSES, **args):
    """A network small enough for many steps a second."""
    torch.manual_seed(seed)
    config = NetworkConfig(name=name, pretrained=False, args=args)
    return create_network(config, num_classes=num_classes, in_training=True)


def tiny_batch(*, seed: int = 0, size: int = 8) -> dict[str, torch.Tensor]:
    """Random images as a loader yields them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "target": torch.randint(0, NUM_CLASSES, (size,), generator=generator),
        "index": torch.arange(size),
        "unreadable": torch.full((size,), -1),
    }


class MethodContract:
    """Inherit, set ``name``, and override the fixtures' arguments where the method wants other networks."""

    name: str
    teacher_names: tuple[str, ...] = ("cifar_resnet8",)
    student_name = "cifar_resnet8"
    options: dict = {}
    lr = 0.05
    #: Terms that are another thing when a label store stands for the teachers.
    differ_when_stored: tuple[str, ...] = ()

    def build(self, **training) -> DistillationModule:
        config = DistillConfig(
            student={"name": self.student_name},
            teachers=[{"name": name} for name in self.teacher_names],
            method=self.name,
            optimizer={"name": "sgd", "lr": self.lr, "weight_decay": 0.0},
            schedule={"name": "constant", "warmup_epochs": 0},
            training={"seed": 1, **training},
        )
        method = self.method
        module = method(
            student=self.network(self.student_name, seed=1),
            teachers=[self.teacher(name, seed=2 + number) for number, name in enumerate(self.teacher_names)],
            task=self.task(),
            config=config,
            options=build_options(method.Options, self.options),
            budget=Budget(steps_per_epoch=10, epochs=1),
        )
        module.trainer = _NoTrainer()
        return module.train()

    def network(self, name: str, *, seed: int):
        return tiny_network(name, seed=seed)

    def teacher(self, name: str, *, seed: int):
        return self.network(name, seed=seed)

    def task(self):
        return ClassificationTask(num_classes=NUM_CLASSES)

    def batch(self) -> dict[str, torch.Tensor]:
        return tiny_batch()

    @property
    def method(self) -> type[DistillationModule]:
        return registry.load("visionkd.methods", self.name, key="--method").METHOD

    @staticmethod
    def step(module: DistillationModule, batch: dict) -> torch.Tensor:
        batch = module.on_before_batch_transfer(batch, 0)
        return module.training_step(module.on_after_batch_transfer(batch, 0), 0)

    def test_declares_what_it_needs(self):
        assert self.name in registry.names("visionkd.methods")
        assert self.method.tasks and self.method.tasks <= TASKS
        assert self.method.needs <= NEEDS

    def test_options_are_frozen_and_have_defaults(self):
        options = self.method.Options()
        first = next(iter(dataclasses.fields(options))).name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, first, None)
        assert self.method.Options.__doc__ and all(
            f.name in self.method.Options.__doc__ for f in dataclasses.fields(options)
        )

    def test_loss_is_the_weighted_sum_of_named_terms(self):
        module = self.build()
        loss = self.step(module, self.batch())
        found = module.take_train_metrics()
        terms = {name.removeprefix("train/"): value for name, value in found.items() if name != "train/loss"}
        weights = module.loss_weights()
        assert terms and terms.keys() <= weights.keys()
        assert sum(weights[name] * value for name, value in terms.items()) == pytest.approx(loss.item(), rel=1e-5)

    def test_gradient_reaches_all_that_trains_and_nothing_else(self):
        module = self.build()
        before = [copy.deepcopy(teacher.state_dict()) for teacher in module.teachers]
        self.step(module, self.batch()).backward()
        missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        for teacher, state in zip(module.teachers, before, strict=True):
            assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
            assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())

    def test_teacher_stays_in_eval_mode_and_out_of_the_checkpoint(self):
        module = self.build()
        module.train()
        assert module.student.training
        assert not any(part.training for teacher in module.teachers for part in teacher.modules())
        owned = {id(p) for teacher in module.teachers for p in teacher.parameters()}
        assert not owned & {id(p) for p in module.parameters()}
        state_size = sum(value.numel() for value in module.state_dict().values())
        trained = sum(
            value.numel() for part in (module.student, module.projectors) for value in part.state_dict().values()
        )
        assert state_size == trained

    def test_stored_probabilities_can_stand_for_the_teachers(self):
        module, batch = self.build(), self.batch()
        if not module.can_store_labels(module.options):
            pytest.skip(f"'{self.name}' needs its teachers in every step")
        image = module.on_after_batch_transfer(batch, 0)["image"]
        with torch.no_grad():
            probs = module.soft_label(module.teacher_outputs(image))
            online = module.loss_terms(image, batch["target"])
            module.frozen.forwards = None  # nobody may ask them now
            stored = module.loss_terms(image, batch["target"], probs)
        assert online.keys() == stored.keys()
        same = [name for name in online if torch.allclose(online[name], stored[name], rtol=1e-4, atol=1e-6)]
        assert set(online) - set(same) <= set(self.differ_when_stored)

    def test_steps_reduce_the_loss(self):
        module, batch = self.build(), self.batch()
        optimizer = module.configure_optimizers()["optimizer"]
        losses = []
        for _ in range(15):
            loss = self.step(module, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert min(losses[-3:]) < losses[0]

    def test_a_step_depends_on_nothing_but_its_seed(self):
        losses = []
        for noise in (3, 4):
            module = self.build()
            torch.manual_seed(noise)
            losses.append(self.step(module, self.batch()).item())
        assert losses[0] == losses[1]

    def test_state_survives_a_checkpoint(self):
        module = self.build(ema_decay=0.5)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        other = self.build(ema_decay=0.5)
        other.load_state_dict(torch.load(buffer, weights_only=True))

    def test_has_recipe_page_and_changelog_line(self):
        assert any((ROOT / "configs").glob(f"*/{self.name}.yaml")), f"configs/<task>/{self.name}.yaml is missing"
        assert (ROOT / "docs" / "methods" / f"{self.name}.md").is_file()
        assert f"`{self.name}`" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


class _NoTrainer:
    """Stands for the Trainer where a module is driven by hand."""

    current_epoch = 0
    global_rank = 0
    world_size = 1
    strategy = type("Strategy", (), {"all_gather": staticmethod(lambda tensor, **kwargs: tensor)})()
