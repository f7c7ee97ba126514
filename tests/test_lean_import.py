"""``import visionkd`` and the help texts load nothing heavy. Modules are counted, since times depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "torchmetrics",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "pydantic",
    "PIL",
    "yaml",
    "matplotlib",
    "jinja2",
    "rich",
    "safetensors",
    "filelock",
}


def loaded_by(code: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter loads to run ``code``."""
    script = f"import sys, json, contextlib, io\nbefore = set(sys.modules)\n{code}\n"
    script += "sys.__stdout__.write(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout))


def run_cli(*argv: str) -> str:
    return f"""
from visionkd.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert main({list(argv)!r}) == 0
assert out.getvalue().strip()
"""


def test_importing_the_package_loads_next_to_nothing() -> None:
    loaded = loaded_by("import visionkd")
    assert "visionkd" in loaded
    assert not {name for name in loaded if name.startswith("visionkd.")}
    assert not HEAVY & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("argv", [("--help",), ("--version",), ("distill", "--help"), ("data", "check", "--help")])
def test_help_is_light(argv: tuple[str, ...]) -> None:
    loaded = loaded_by(run_cli(*argv))
    assert not HEAVY & {name.split(".")[0] for name in loaded}
    assert len(loaded) < 250, "help has to answer in well under 0.3 s"


def test_the_list_of_commands_imports_no_command() -> None:
    loaded = {name for name in loaded_by(run_cli("--help")) if name.startswith("visionkd.cli.")}
    assert "visionkd.cli.main" in loaded
    assert not loaded & {"visionkd.cli.distill", "visionkd.cli.eval", "visionkd.cli.bench"}


def test_the_workflows_package_imports_no_workflow() -> None:
    loaded = loaded_by("import visionkd.workflows")
    assert not HEAVY & {name.split(".")[0] for name in loaded}


def test_the_check_sees_what_is_loaded() -> None:
    assert "yaml" in loaded_by("import yaml")
