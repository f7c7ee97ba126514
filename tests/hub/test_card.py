"""Cards: what the schema refuses, and how they are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub.zoo_server import card_values, entry, https, onnx_bytes, write_card, write_onnx_card
from visionkd.errors import RequestError
from visionkd.hub.card import PublishedArtifact
from visionkd.hub.index import all_cards, card_files, find_card, read_card, split_name
from visionkd.runtime.zoo_name import is_zoo_name

CONTENT = onnx_bytes(256)
MEASURED = {"data": "cifar10", "split": "val", "by": "here", "how": "visionkd eval", "values": {"top1": 90.0}}
TIMED = {"artifact": "onnx", "backend": "onnxruntime", "device": "x", "img_size": [32, 32], "latency_ms": 1.0}
HERE = {"kind": "repository", "path": "weights/tiny/model.onnx"}


def onnx_card(**changes: Any) -> dict[str, Any]:
    file = entry("model.onnx", CONTENT, dict(HERE))
    return card_values(artifacts={"onnx": {"format": "onnx", "files": [file]}}, **changes)


def file_of(values: dict[str, Any]) -> dict[str, Any]:
    return values["artifacts"]["onnx"]["files"][0]


def test_every_card_of_the_project_is_valid() -> None:
    cards = list(all_cards())
    assert {"efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"} <= {card.name for card in cards}
    for card in cards:
        assert card.preprocessing.spec().img_size == card.preprocessing.img_size
        for artifact in card.artifacts:
            assert card.size_bytes(artifact) or isinstance(card.artifacts[artifact], PublishedArtifact)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what puts a value into a card; numbers index into lists."""

    def change(values: Any) -> None:
        *parents, last = path.split(".")
        for part in parents:
            values = values[int(part) if part.isdecimal() else part]
        values[int(last) if last.isdecimal() else last] = value

    return change


FILE = "artifacts.onnx.files.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("wheel", 3), "wheel: unknown key (given: 3)"),
        (_set("format", 2), "card of format 2, and this version reads 1"),
        (_set("name", "other"), "name: is 'other', and the file is called tiny.yaml"),
        (_set("name", "../evil"), "name: string should match"),
        (_set("licence", "Apache 2"), "licence: string should match"),
        (_set("num_classes", -1), "num_classes: "),
        (_set("classes", ["a", "b"]), "2 names in 'classes' for num_classes 3"),
        (_set("preprocessing.crop_pct", 1.5), "preprocessing.crop_pct: "),
        (_set("metrics", [{**MEASURED, "values": {}}]), "metrics.0.values: "),
        (
            _set("metrics", [{**MEASURED, "artifact": "int8"}]),
            "metrics name the artifact 'int8'",
        ),
        (_set("latencies", [{**TIMED, "artifact": "int8"}]), "latencies name the artifact 'int8'"),
        (_set("latencies", [{**TIMED, "latency_ms": 0}]), "latencies.0.latency_ms: "),
        (_set("origin", "own"), "a model of our own needs training.command"),
        (_set("publisher", None), "an upstream model needs its publisher"),
        (_set("good_for", []), "good_for: "),
        (_set("artifacts", {}), "artifacts: "),
        (_set("artifacts.onnx.format", "pickle"), "artifacts.onnx: "),
        (_set("artifacts.onnx.precision", "int8"), "'target' goes with precision int8"),
        (_set(f"{FILE}.sha256", "abc"), f"{FILE}.sha256: "),
        (_set(f"{FILE}.size_bytes", 0), f"{FILE}.size_bytes: "),
        (_set(f"{FILE}.name", "model.pkl"), "'model.pkl' must end in one of .onnx"),
        (_set(f"{FILE}.name", "../model.onnx"), f"{FILE}.name: must be a path below its folder"),
        (_set(f"{FILE}.name", "a/model.onnx"), f"{FILE}.name: must be the name of a file"),
        (_set(f"{FILE}.name", ".model.onnx"), f"{FILE}.name: must be a path below its folder"),
        (_set(f"{FILE}.sources", []), f"{FILE}.sources: "),
        (_set(f"{FILE}.sources.0", {"kind": "ftp", "url": "x"}), f"{FILE}.sources.0: "),
        *(
            (_set(f"{FILE}.sources.0.path", path), f"{FILE}.sources.0.path: must be a path below its folder")
            for path in ("/etc/passwd", "../x", "a/../../x", "C:/x", "a\\..\\x", "", "a/.git/x", "a\nb")
        ),
        *(
            (_set(f"{FILE}.sources.0", {"kind": "https", "url": url}), f"{FILE}.sources.0.url: must ")
            for url in (
                "http://example.org/x",
                "file:///etc/passwd",
                "ftp://x/y",
                "https:///x",
                "https://a:b@example.org",
            )
        ),
        (
            _set(f"{FILE}.sources.0", {"kind": "hub", "repo": "a/b", "revision": "main", "file": "x"}),
            f"{FILE}.sources.0.revision: ",
        ),
        (
            _set(f"{FILE}.sources.0", {"kind": "hub", "repo": "a/../b", "revision": "0" * 40, "file": "x"}),
            f"{FILE}.sources.0.repo: ",
        ),
        (
            _set(f"{FILE}.sources.0", {"kind": "python-package", "package": "x", "version": 0.1, "file": "../x"}),
            f"{FILE}.sources.0.file: ",
        ),
    ],
)
def test_what_a_card_may_not_say(zoo: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    values = onnx_card()
    file = write_card(zoo, values)
    read_card(file)
    change(values)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        read_card(file)
    assert message in caught.value.message


def test_all_problems_are_listed_at_once(zoo: Path) -> None:
    values = onnx_card(num_classes="many", wheel=1)
    file_of(values)["sha256"] = "?"
    with pytest.raises(RequestError) as caught:
        read_card(write_card(zoo, values))
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"num_classes", "wheel", "artifacts.onnx.files.0.sha256"}


def test_packages_hold_what_a_package_needs(zoo: Path) -> None:
    files = [entry("model.safetensors", b"x", HERE), entry("Model.safetensors", b"x", HERE)]
    for given, message in ((files[:1], "a package needs model.json"), (files, "two files have the same name")):
        values = card_values(artifacts={"weights": {"format": "package", "files": given}})
        with pytest.raises(RequestError, match=message):
            read_card(write_card(zoo, values))


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: !!python/object/apply:os.system [ls]", "a: &a [*a]", "\xff"])
def test_what_is_no_card_at_all(zoo: Path, text: str) -> None:
    (zoo / "x.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError):
        read_card(zoo / "x.yaml")


def test_cards_are_found_and_own_ones_come_first(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    write_onnx_card(zoo, CONTENT, *https("https://example.org/x"))
    write_onnx_card(other, CONTENT, *https("https://example.org/y"), name="efficientnet_lite0")
    monkeypatch.setenv("VISIONKD_ZOO", os.pathsep.join([str(zoo), str(other)]))
    assert card_files()["tiny"].parent == zoo / "classification" and "efficientnet_lite1" in card_files()
    assert find_card("zoo:efficientnet_lite0@onnx").title == "A model for tests"
    with pytest.raises(RequestError, match="Did you mean 'tiny'?"):
        find_card("tinny")
    write_card(zoo, onnx_card(task="segmentation"))
    with pytest.raises(RequestError, match="have the same name"):
        card_files()
    monkeypatch.setenv("VISIONKD_ZOO", str(tmp_path / "absent"))
    with pytest.raises(RequestError, match="VISIONKD_ZOO does not exist"):
        card_files()


def test_names() -> None:
    assert split_name("zoo:a@int8") == ("a", "int8") and split_name(" a ") == ("a", None)
    for wrong in ("", "zoo:", "@int8", "zoo:a@"):
        with pytest.raises(RequestError, match="does not name a model"):
            split_name(wrong)
    assert is_zoo_name("zoo:a") and not is_zoo_name("zoo/a") and not is_zoo_name("resnet18")
