"""The tools around the zoo: pages from cards, data by name, commands from cards."""

from __future__ import annotations

import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from visionkd.hub.card import Card
from visionkd.hub.index import all_cards, find_card

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str) -> ModuleType:
    loader = SourceFileLoader(f"tool_{name}", str(TOOLS / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def own(name: str, command: str, *, recipe: str | None = None, forms: tuple[str, ...] = ("weights",)) -> Card:
    """Return a card of a model that was never trained."""
    file = {"sha256": "a" * 64, "size_bytes": 1, "sources": [{"kind": "repository", "path": "weights/x"}]}
    package = {"format": "package", "files": [{"name": each, **file} for each in ("model.json", "model.safetensors")]}
    onnx = {"format": "onnx", "files": [{"name": "m.onnx", **file}]}
    int8 = {"format": "onnx", "precision": "int8", "target": "cpu", "files": [{"name": "m.int8.onnx", **file}]}
    base = find_card("resnet18.a1_in1k").model_dump()
    values = {"name": name, "origin": "own", "metrics": [], "training": {"method": "kd", "command": command}}
    values["training"]["recipe"] = recipe
    all_forms = {"weights": package, "onnx": onnx, "int8": int8}
    return Card.model_validate(base | values | {"artifacts": {form: all_forms[form] for form in forms}})


def test_the_pages_are_what_the_cards_say() -> None:
    render = tool("render_zoo")
    found = render.models(render.ZOO)
    assert render.README.read_text(encoding="utf-8") == render.readme(render.README.read_text(encoding="utf-8"), found)
    assert render.PAGE.read_text(encoding="utf-8") == render.page(found)


def test_the_page_needs_nothing_from_elsewhere_and_has_every_card() -> None:
    page = (TOOLS.parent / "docs" / "zoo.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|srcset)=|@import|url\(|<link", page)
    assert "default-src 'none'" in page
    ids = re.findall(r'<details class="card" id="([^"]+)"', page)
    assert ids == [card.name for card in all_cards()]
    assert set(re.findall(r'<a href="#([^"]+)"', page)) == set(ids)
    forms = sum(len(card.artifacts) for card in all_cards())
    assert len(re.findall(r"<tr class=\"(?:own|upstream)\"", page)) == forms


def test_what_a_card_says_is_text_and_no_markup() -> None:
    render = tool("render_zoo")
    card = find_card("resnet18.a1_in1k").model_copy(update={"title": "a <script>alert(1)</script> | b"})
    found = [SimpleNamespace(card=card, rows=render.models(render.ZOO)[0].rows[:1])]
    page = render.page(found)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    table = render.readme("<!-- models: upstream -->\n<!-- /models -->\n", found)
    assert table.splitlines()[3].count(" | ") == 7 and "\\|" in table


def test_data_are_found_as_folders_and_archives(tmp_path: Path) -> None:
    from tools._zoo.data import find_data

    (tmp_path / "dense" / "camvid").mkdir(parents=True)
    (tmp_path / "cifar10").mkdir()
    for name in ("cifar10.tar.xz", "imagenet_samples_shared.tar", "imagenet_samples.txt"):
        (tmp_path / name).touch()
    assert find_data("cifar10", tmp_path) == tmp_path / "cifar10"
    assert find_data("camvid", tmp_path) == tmp_path / "dense" / "camvid"
    assert find_data("imagenet_samples", tmp_path) == tmp_path / "imagenet_samples_shared.tar"
    assert find_data("bccd", tmp_path) is None


def test_a_card_becomes_commands(tmp_path: Path) -> None:
    train = tool("train_zoo")
    card = own(
        "s", "visionkd distill --config c --data cifar10 --seed 1 --out runs/s", forms=("weights", "onnx", "int8")
    )
    first, onnx, int8 = train.commands(card, None)
    assert first == "distill --config c --data cifar10 --seed 1 --out runs/s".split()
    assert onnx == "export runs/s --data cifar10".split() and int8 == "export runs/s --int8 --data cifar10".split()
    assert train.commands(card, tmp_path)[0][4] == str(tmp_path)
    with pytest.raises(train.VisionKDError, match="names no --out"):
        train.commands(own("s", "visionkd distill"), None)
    with pytest.raises(train.VisionKDError, match="does not begin with 'visionkd'"):
        train.commands(own("s", "rm --out runs/s"), None)


def test_runs_that_a_command_reads_come_from_the_cards_that_make_them(monkeypatch) -> None:
    train = tool("train_zoo")
    recipe = "classification/cifar10_kd"  # its teacher is runs/cifar10_teacher
    teacher = own("t", "visionkd train --config x --out runs/cifar10_teacher")
    student = own("s", f"visionkd distill --config {recipe} --out runs/cifar10_kd_0", recipe=recipe)
    monkeypatch.setattr(train, "all_cards", lambda: iter([teacher, student]))
    assert dict(train.read_runs(student)) == {"runs/cifar10_teacher": teacher}
    assert [card.name for card in train._in_order(student, "train")] == ["t", "s"]
    assert [card.name for card in train._in_order(student, "zoo")] == ["s"]


def test_a_dry_run_says_every_command_once(capsys) -> None:
    train = tool("train_zoo")
    assert train.main(["--all", "--dry-run", "--teachers", "train", "--data", "nowhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if line.startswith(("visionkd train", "visionkd distill"))]
    assert len(made) == len(set(made)) == sum(card.origin == "own" for card in all_cards())


def test_what_is_at_hand_leaves_published_weights_out() -> None:
    verify = tool("verify_zoo")
    some = verify.at_hand(published=False)
    assert "efficientnet_lite0@weights" in some and not [name for name in some if name.startswith("resnet50")]
    assert set(some) < set(verify.at_hand(published=True))
    sets, missing = verify.measured_on(["resnet18.a1_in1k"], Path("nowhere"))
    assert (sets, missing) == ({}, [])
