"""The worked example of ``docs/methods/adding_a_method.md`` runs as it is printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from visionkd.config.load import build_options, load_config
from visionkd.config.schema import DistillConfig
from visionkd.methods._base import Budget
from visionkd.models.network import Network
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import InputSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "adding_a_method.md"
BLOCKS = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL))
CLASSES = 4


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the example, importable under the name the page gives it."""
    module = ModuleType("visionkd.methods.dist")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(BLOCKS["visionkd/methods/dist.py"], "dist.py", "exec"), module.__dict__)
    yield module


def recipe(method: ModuleType) -> DistillConfig:
    text = BLOCKS["configs/classification/dist.yaml"]
    return load_config(
        DistillConfig, text=text, method_options=lambda name: method.METHOD.Options if name == "dist" else None
    )


def tiny() -> Network:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))
    spec = InputSpec(img_size=(8, 8))
    return Network(net, architecture="tiny", source="timm", input=spec, model_args={"num_classes": CLASSES})


def test_the_page_holds_the_files_it_promises() -> None:
    assert list(BLOCKS) == [
        "visionkd/methods/dist.py",
        "configs/classification/dist.yaml",
        "tests/methods/test_dist.py",
    ]


def test_the_test_of_the_example_passes(method: ModuleType) -> None:
    scope: dict[str, Any] = {}
    exec(compile(BLOCKS["tests/methods/test_dist.py"], "test_dist.py", "exec"), scope)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_recipe_of_the_example_is_valid_and_its_loss_falls(method: ModuleType) -> None:
    config = recipe(method)
    config.optimizer.lr, config.optimizer.weight_decay = 1e-2, 0.0
    torch.manual_seed(0)
    module = method.METHOD(
        student=tiny(),
        teachers=[tiny()],
        task=ClassificationTask(num_classes=CLASSES),
        config=config,
        options=build_options(method.METHOD.Options, config.options),
        budget=Budget(steps_per_epoch=20, epochs=1),
    )
    optimizer = module.configure_optimizers()["optimizer"]
    batch = {"image": torch.rand(16, 3, 8, 8), "target": torch.arange(16) % CLASSES}
    losses = []
    for _ in range(20):
        student, teachers = module.student(batch["image"]), module.teacher_outputs(batch["image"])
        terms = module.distill_loss(student=student, teachers=teachers, target=batch["target"])
        assert set(terms) | {"task_loss"} == set(module.loss_weights())
        loss = terms["inter_loss"] + terms["intra_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for teacher in module.teachers for parameter in teacher.parameters())
