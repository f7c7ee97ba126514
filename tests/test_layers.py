"""The import direction: a module imports only from rows above its own, and not across folders within a row."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "visionkd"
ROWS = {
    "visionkd": 0,
    "errors": 0,
    "types": 0,
    "registry": 0,
    "files": 0,
    "config": 1,
    "losses": 1,
    "runtime": 1,
    "models": 2,
    "data": 2,
    "tasks": 2,
    "teachers": 3,
    "quantization": 3,
    "hub": 3,
    "benchmark": 3,
    "methods": 4,
    "search": 4,
    "export": 4,
    "report": 4,
    "workflows": 5,
    "zoo": 5,
    "cli": 6,
    "__main__": 7,
}
TORCH = {"torch", "torchvision", "timm", "lightning", "torchmetrics", "safetensors"}
#: The files of data/ that may import torch; the others serve a device without it.
TORCH_DATA_FILES = {
    "transforms.py",
    "dense_transforms.py",
    "detection_transforms.py",
    "loader.py",
    "sampler.py",
    "known.py",
    "cache.py",
    "mixing.py",
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted name of everything that is imported, at any depth, with its line.

    Args:
        tree: A parsed module.
        package: Dotted name of the package that holds it, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                # 'from visionkd import models' names a folder, 'from visionkd.errors import WorkError' does not
                yield f"{base}.{alias.name}" if base == "visionkd" else base, node.lineno


def without_type_checking(tree: ast.Module) -> ast.Module:
    """Drop what only a type checker imports."""

    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Drop().visit(tree)


def folder_of(relative: Path) -> str:
    """Return the part of the project a file belongs to."""
    if len(relative.parts) > 1:
        return relative.parts[0]
    return "visionkd" if relative.name == "__init__.py" else relative.stem


def violations(relative: Path, source: str) -> list[str]:
    """Return what a file imports although its row forbids it."""
    folder = folder_of(relative)
    row = ROWS[folder]
    package = ".".join(["visionkd", *relative.parts[:-1]])
    found = []
    for name, line in imports(ast.parse(source), package):
        parts = name.split(".")
        if parts[0] != "visionkd":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in ROWS else "visionkd"
        if target != folder and target != "visionkd" and ROWS[target] >= max(row, 1):
            found.append(f"{relative}:{line} imports {name}: row {ROWS[target]} from row {row}")
    return found


def outside(relative: Path, source: str) -> list[str]:
    """Return the third-party packages a file imports although its folder must do without them."""
    folder = folder_of(relative)
    found = []
    for name, line in imports(without_type_checking(ast.parse(source)), ""):
        top = name.split(".")[0]
        is_torch = top in TORCH
        if top in ("click", "rich") and folder != "cli":
            found.append(f"{relative}:{line} imports {top}, which only cli/ may")
        if is_torch and (ROWS[folder] == 0 or folder in ("config", "runtime", "cli")):
            found.append(f"{relative}:{line} imports {top}, which {folder}/ may not")
        if is_torch and folder == "data" and relative.name not in TORCH_DATA_FILES:
            found.append(f"{relative}:{line} imports {top}, but data sources work without it")
        if folder == "losses" and top in TORCH - {"torch"}:
            found.append(f"{relative}:{line} imports {top}: losses know tensors and nothing else")
    return found


def prints(source: str) -> list[int]:
    """Return the lines that call print."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_upwards(file: Path) -> None:
    relative, source = file.relative_to(ROOT), file.read_text(encoding="utf-8")
    assert folder_of(relative) in ROWS, "a new folder needs a row"
    assert violations(relative, source) + outside(relative, source) == []
    if folder_of(relative) != "cli":
        assert prints(source) == [], "only cli/ prints"


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("models/factory.py", "from visionkd.hub.package import load", True),
        ("models/factory.py", "import visionkd.workflows", True),
        ("models/factory.py", "from visionkd import cli", True),
        ("models/factory.py", "def f():\n    from visionkd.data.open import open_data", True),  # across a row, and late
        ("models/factory.py", "from ..teachers import fit", True),
        ("models/factory.py", "from .features import stages", False),
        ("models/factory.py", "from visionkd.errors import WorkError\nfrom visionkd import __version__", False),
        ("workflows/train.py", "from visionkd.methods import kd", False),
        ("errors.py", "from visionkd.config import load", True),
    ],
)
def test_the_check_finds_what_it_should(file: str, source: str, wrong: bool) -> None:
    assert bool(violations(Path(file), source)) is wrong


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("runtime/session.py", "import torch", True),
        ("runtime/session.py", "from torch import nn", True),
        ("runtime/session.py", "if TYPE_CHECKING:\n    from torch import Tensor", False),
        ("data/folder.py", "import torch", True),
        ("data/loader.py", "import torch", False),
        ("losses/kl.py", "import timm", True),
        ("workflows/train.py", "import click", True),
        ("cli/console.py", "import rich.live", False),
    ],
)
def test_the_check_of_packages_finds_what_it_should(file: str, source: str, wrong: bool) -> None:
    assert bool(outside(Path(file), source)) is wrong


def test_the_check_finds_prints() -> None:
    assert prints("x = 1\nprint(x)") == [2]
