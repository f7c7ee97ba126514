"""What setup.cfg says agrees with what is in the repository, and a wheel holds what an installed program needs."""

from __future__ import annotations

import configparser
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_folder_is_packaged(setup_cfg: configparser.ConfigParser) -> None:
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "visionkd").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders}
    listed = set(setup_cfg["options"]["packages"].split())
    assert listed - {"visionkd._configs", "visionkd._zoo"} == expected


def test_the_base_is_what_a_device_needs(setup_cfg: configparser.ConfigParser) -> None:
    names = {line.split(">=")[0] for line in setup_cfg["options"]["install_requires"].split()}
    assert names == {"numpy", "pillow", "click", "rich", "pyyaml", "pydantic", "filelock"}


def test_the_teachers_are_those_of_the_cards(setup_cfg: configparser.ConfigParser) -> None:
    sources = [
        source
        for file in (ROOT / "zoo").glob("*/*.yaml")
        for artifact in yaml.safe_load(file.read_text(encoding="utf-8"))["artifacts"].values()
        for described in artifact.get("files", ())
        for source in described["sources"]
        if source["kind"] == "python-package"
    ]
    listed = setup_cfg["options.extras_require"]["teachers"].split()
    assert sorted(listed) == sorted(f"{source['package']}=={source['version']}" for source in sources)


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")
def test_a_wheel_holds_recipes_and_templates(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("visionkd", "configs", "zoo"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "configs" / "classification" / "only_for_this_test.yaml").write_text("# A recipe\n", encoding="utf-8")
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = wheel.namelist()
    assert "visionkd/_configs/classification/only_for_this_test.yaml" in names
    assert "visionkd/report/template.html.j2" in names
    assert any(name.endswith("licenses/LICENSE") or name.endswith("dist-info/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith("visionkd")]

    unpacked = tmp_path / "unpacked"
    wheel.extractall(unpacked)
    code = "from visionkd.workflows import list_configs; print([row.name for row in list_configs()])"
    listed = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "classification/only_for_this_test" in listed.stdout, listed.stderr
