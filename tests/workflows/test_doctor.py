"""What the doctor says of packages, places and versions."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
from pathlib import Path

import pytest

from visionkd.workflows import doctor as module_of_function
from visionkd.workflows.doctor import Requirement, _numbers, _place, check_package, parse_requirement, requirements

ROOT = Path(__file__).resolve().parents[2]


def test_every_requirement_of_the_package_is_looked_at() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    declared = parser["options"]["install_requires"] + parser["options.extras_require"]["train"]
    assert {one.name for one in requirements()} == {line.split(">=")[0] for line in declared.split()}
    assert callable(module_of_function)


def test_a_requirement_is_read() -> None:
    assert parse_requirement('torch>=2.8; extra == "train"') == Requirement("torch", "2.8", "train")
    assert parse_requirement("Pillow") == Requirement("pillow", "", "")


def test_a_package_that_is_not_there() -> None:
    row = check_package(Requirement("no-such-package-of-anyone", "1.0", "train"))
    assert (row.status, row.hint) == ("missing", "pip install 'visionkd[train]'")


def test_a_package_that_is_too_old() -> None:
    row = check_package(Requirement("click", "999.1", ""))
    assert row.status == "broken" and "older than 999.1" in row.detail


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"operator {name}::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", fail)
    row = check_package(Requirement("click", "8.0", ""))
    assert row.status == "broken" and "click::nms does not exist" in row.detail and row.hint is not None


def test_versions_compare_as_numbers() -> None:
    assert _numbers("2.14.1+cu130") == (2, 14, 1)
    assert _numbers("2.10") > _numbers("2.9") and _numbers("2.0") == _numbers("2") and _numbers("x") == (0,)


def test_places(tmp_path: Path) -> None:
    assert _place("cache", tmp_path / "not" / "yet", needed_gb=0.0, hint="h").status == "ok"
    full = _place("cache", tmp_path, needed_gb=1e9, hint="Set it.")
    assert full.status == "broken" and full.hint == "Set it."


def test_a_place_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    row = _place("cache", tmp_path, needed_gb=0.0, hint="Set it.")
    assert row.status == "broken" and "Permission denied" in row.detail
