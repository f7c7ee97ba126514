"""Recipes are found, read and copied, from a checkout and from an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from visionkd.errors import RequestError
from visionkd.workflows import configs, copy_config, list_configs, show_config

TEXT = "# Distils a into b.\n#\n# More words.\nmethod: kd\n"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / "configs"
    for name, text in {
        "classification/cifar10_kd.yaml": TEXT,
        "classification/both.yaml": "# One\n",
        "segmentation/both.yml": "method: lad\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "README.md").write_text("no recipe", encoding="utf-8")
    monkeypatch.setattr(configs, "config_directory", lambda: root)
    return root


def test_list(folder: Path) -> None:
    assert {row.name: row.summary for row in list_configs()} == {
        "classification/both": "One",
        "classification/cifar10_kd": "Distils a into b.",
        "segmentation/both": "",
    }


@pytest.mark.parametrize("name", ["classification/cifar10_kd", "cifar10_kd", "cifar10_kd.yaml"])
def test_show_finds_a_recipe(folder: Path, name: str) -> None:
    assert show_config(name) == TEXT


def test_show_takes_files_and_runs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: auto\n", encoding="utf-8")
    assert show_config(str(tmp_path / "config.yaml")) == "method: auto\n"
    assert show_config(str(tmp_path)) == "method: auto\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10_kdd", "Did you mean 'cifar10_kd'"),
        ("both", "classification/both, segmentation/both"),
        ("zzz", "neither"),
        ("", "is empty"),
        ("/", "is a directory without a config.yaml"),
        ("z" * 5000, "neither"),
        ("~nobody-here/a", "neither"),
    ],
)
def test_unknown_names(folder: Path, name: str, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        show_config(name)
    assert expected in str(caught.value) and "visionkd configs list" in str(caught.value)


def test_a_file_that_is_no_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="UTF-8"):
        show_config(str(file))


def test_copy(folder: Path, tmp_path: Path) -> None:
    target = copy_config("cifar10_kd", tmp_path / "new" / "mine.yaml")
    assert target.read_text(encoding="utf-8") == TEXT
    assert copy_config("cifar10_kd", tmp_path) == tmp_path / "cifar10_kd.yaml"


def test_copy_writes_over_nothing_unasked(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("precious", encoding="utf-8")
    with pytest.raises(RequestError, match="--overwrite"):
        copy_config("cifar10_kd", target)
    assert target.read_text(encoding="utf-8") == "precious"
    copy_config("cifar10_kd", target, overwrite=True)
    assert target.read_text(encoding="utf-8") == TEXT


def test_the_checkout_has_its_recipes() -> None:
    folder = configs.config_directory()
    assert folder is not None and folder.is_dir()
    for row in list_configs():
        assert row.summary, f"{row.name} must begin with a comment that says what it is"
