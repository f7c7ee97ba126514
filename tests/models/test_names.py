from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torchvision

from visionkd.errors import RequestError
from visionkd.models.aliases import ALIASES
from visionkd.models.names import resolve_name


@pytest.mark.parametrize(
    ("name", "source", "architecture", "tag"),
    [
        ("vit_l", "timm", "vit_large_patch16_224", None),
        ("resnet50", "timm", "resnet50", None),
        ("resnet50.a1_in1k", "timm", "resnet50", "a1_in1k"),
        ("timm/resnet18", "timm", "resnet18", None),
        ("torchvision/resnet18", "torchvision", "resnet18", None),
        ("torchvision/resnet50.IMAGENET1K_V1", "torchvision", "resnet50", "IMAGENET1K_V1"),
        ("vit_b_16", "torchvision", "vit_b_16", None),
        ("cifar_resnet20", "timm", "cifar_resnet20", None),
        ("squeezenet", "torchvision", "squeezenet1_1", None),
    ],
)
def test_names(name: str, source: str, architecture: str, tag: str | None) -> None:
    found = resolve_name(name)
    assert (found.source, found.architecture, found.tag) == (source, architecture, tag)


def test_every_alias_stands_for_a_network_and_hides_none() -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    for alias, target in ALIASES.items():
        assert timm.is_model(target) or target.removeprefix("torchvision/") in known, target
        assert not timm.is_model(alias), f"{alias} is a timm name of its own"
        assert target in resolve_name(alias).note


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet51", ["unknown network 'resnet51'", "'resnet50'"]),
        ("vit_xl", ["'vit_l'"]),
        ("torchvision/resnet17", ["'torchvision/resnet18'"]),
        ("resnet18.nope", ["no weights called 'nope'", "a1_in1k"]),
        ("runs/nothing", ["no file or directory", "run directory"]),
        ("weights.pt", ["no file or directory"]),
        ("resnet18@nowhere.pt", ["no file 'nowhere.pt'"]),
        ("", ["is empty"]),
        ("a" * 5000, ["unknown network"]),
        ("~nobody-here/a", ["no file or directory"]),
        ("resnet18@~nobody-here/a", ["no file"]),
        ("qqqqqqqqq", ["unknown network", "vit_"]),
    ],
)
def test_unknown_names_are_answered_with_what_exists(name: str, words: list[str]) -> None:
    with pytest.raises(RequestError) as raised:
        resolve_name(name)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert raised.value.exit_code == 2


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/mine/model")
    run.mkdir(parents=True)
    (run / "model.json").write_text("{}")
    assert resolve_name("runs/mine").path == run
    assert resolve_name("runs/mine/model").path == run
    Path("empty").mkdir()
    with pytest.raises(RequestError, match="neither a packaged model nor a finished run"):
        resolve_name("empty")
    Path("w.pt").touch()
    with pytest.raises(RequestError, match="resnet18@w.pt"):
        resolve_name("w.pt")
    Path("w.onnx").touch()
    with pytest.raises(RequestError, match="ONNX"):
        resolve_name("w.onnx")
    assert resolve_name("vit_b@w.pt").architecture == "vit_base_patch16_224"
    assert resolve_name("torchvision/resnet18@w.pt").library == "torchvision"


def test_a_network_comes_before_a_directory_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resnet18").mkdir()
    Path("resnet18/model.json").write_text("{}")
    found = resolve_name("resnet18")
    assert found.source == "timm" and "./resnet18" in found.note
    assert resolve_name("./resnet18").source == "package"
