"""The worked example of ``docs/methods/adding_a_method.md`` runs as it is printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.methods.contract import MethodContract
from visionkd import registry
from visionkd.config.load import load_config
from visionkd.config.schema import DistillConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "adding_a_method.md"
BLOCKS = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL))
#: The one promise of the contract that a page cannot keep: the files lie in their places.
NEEDS_FILES = "test_has_recipe_page_and_changelog_line"


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the example, to be found under the name the page gives it."""
    module = ModuleType("visionkd.methods.dist")
    known = registry.names("visionkd.methods")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "names", lambda package: (*known, "dist"))
    exec(compile(BLOCKS["visionkd/methods/dist.py"], "dist.py", "exec"), module.__dict__)
    return module


def recipe(method: ModuleType) -> DistillConfig:
    text = BLOCKS["configs/classification/dist.yaml"]
    return load_config(
        DistillConfig, text=text, method_options=lambda name: method.METHOD.Options if name == "dist" else None
    )


def test_the_page_holds_the_files_it_promises() -> None:
    assert list(BLOCKS) == [
        "visionkd/methods/dist.py",
        "configs/classification/dist.yaml",
        "tests/methods/test_dist.py",
    ]


def test_the_test_of_the_example_passes(method: ModuleType) -> None:
    scope: dict[str, Any] = {"__name__": "test_dist"}
    exec(compile(BLOCKS["tests/methods/test_dist.py"], "test_dist.py", "exec"), scope)
    contracts = [value() for name, value in scope.items() if name.startswith("Test")]
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    tests += [
        getattr(contract, name)
        for contract in contracts
        for name in dir(contract)
        if name.startswith("test_") and name != NEEDS_FILES
    ]
    assert len(contracts) == 2 and len(tests) > 10
    for test in tests:
        test()


def test_the_recipe_of_the_example_is_valid_and_sets_every_option(method: ModuleType) -> None:
    config = recipe(method)
    assert config.method == "dist"
    assert set(config.options) == set(method.METHOD.Options.__dataclass_fields__)


def test_the_checklist_names_what_the_contract_asks_for() -> None:
    assert hasattr(MethodContract, NEEDS_FILES)
    text = PAGE.read_text("utf-8")
    for part in ("visionkd/methods/<name>.py", "configs/<task>/<name>.yaml", "docs/methods/<name>.md", "CHANGELOG.md"):
        assert f"`{part}`" in text
