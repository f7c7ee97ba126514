"""A run becomes a card, a card is held against its files and its data, and goes where others find it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from visionkd import workflows
from visionkd.errors import RequestError, WorkError
from visionkd.hub.index import find_card, read_card
from visionkd.workflows import _zoo_verify
from visionkd.workflows._zoo_card import card_text
from visionkd.workflows._zoo_rows import allows_commercial_use, limited, ordered, rows_of

NAME = "cifar_resnet8.supervised_tinyset"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six red and six blue images in each split."""
    root, generator = tmp_path_factory.mktemp("data") / "tinyset", np.random.default_rng(0)
    for split in ("train", "val"):
        for name, channel in (("blue", 2), ("red", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(6):
                pixels = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory) -> Path:
    """A run with a package and an ONNX file."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    options = ("model.img_size=32", "report.enabled=false", "data.workers=0")
    workflows.train(
        model="cifar_resnet8", pretrained=False, data=str(data), options=options, epochs=3, batch_size=4, out=str(out)
    )
    workflows.export(model=str(out), verify_images=4)
    return out


@pytest.fixture(scope="module")
def added(run: Path, tmp_path_factory) -> Path:
    """A zoo with the card of the run."""
    root = tmp_path_factory.mktemp("zoo") / "zoo"
    workflows.add_zoo(run=str(run), zoo=str(root), licence="mit", good_for=["tests"], bad_for=["all else"])
    return root


@pytest.fixture
def zoo(added: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of that zoo beside the project's, and an empty cache."""
    root = Path(shutil.copytree(added, tmp_path / "zoo"))
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VISIONKD_ZOO", str(root))
    return root


def change(file: Path, edit) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    edit(values)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")


def test_a_card_says_what_the_run_says(zoo: Path, run: Path) -> None:
    card = read_card(zoo / "classification" / f"{NAME}.yaml")
    about = json.loads((run / "model" / "model.json").read_text(encoding="utf-8"))
    assert (card.origin, card.data, card.licence) == ("own", "tinyset", "mit")
    assert card.classes == ("blue", "red") and card.num_classes == 2
    assert list(card.artifacts) == ["weights", "onnx"]
    assert card.training.method == "supervised" and card.training.seed == 0
    measured = {row.artifact: row for row in card.metrics}
    assert measured["weights"].values["top1"] == pytest.approx(about["metrics"]["top1"], abs=0.01)
    assert set(measured) == {"weights", "onnx"} and measured["onnx"].images == 12
    assert card.params_m == pytest.approx(0.0775, abs=0.002)
    copied = sorted(file.name for file in (zoo / "weights" / NAME).iterdir())
    assert copied == ["model.json", "model.onnx", "model.safetensors"]
    assert read_card(zoo / "classification" / f"{NAME}.yaml") == card
    assert yaml.safe_load(card_text(card))["training"]["seed"] == 0


def test_nothing_is_written_over_and_what_is_left_to_do_is_said(zoo: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="written over"):
        workflows.add_zoo(run=str(run), zoo=str(zoo), measure=False)
    added = workflows.add_zoo(run=str(run), zoo=str(zoo), measure=False, forms=["weights"], overwrite=True)
    assert [text.partition(":")[0] for text in added.to_do] == [
        "licence", "good_for and bad_for", "training.recipe", "training.commit",
    ][: len(added.to_do)]  # fmt: skip
    with pytest.raises(RequestError, match="has no 'int8'"):
        workflows.add_zoo(run=str(run), zoo=str(zoo), forms=["int8"], overwrite=True)
    with pytest.raises(RequestError, match="not a finished run"):
        workflows.add_zoo(run=str(tmp_path), zoo=str(zoo))
    with pytest.raises(RequestError, match="other letters"):
        workflows.add_zoo(run=str(run), zoo=str(zoo), name="../up")


def test_a_model_agrees_with_its_card(zoo: Path, data: Path) -> None:
    checks = workflows.verify_zoo(names=[NAME], data=[str(data)])
    assert {check.model for check in checks} == {NAME, f"{NAME}@onnx"}
    assert all(check.state == "ok" and check.checked == ("hash", "loads", "metric") for check in checks), checks
    assert all(abs(check.difference) <= 0.1 for check in checks)


def test_a_wrong_metric_a_wrong_input_and_wrong_bytes_fail(zoo: Path, data: Path, monkeypatch) -> None:
    file = zoo / "classification" / f"{NAME}.yaml"
    was = file.read_text(encoding="utf-8")

    change(file, lambda card: card["metrics"][0]["values"].update(top1=card["metrics"][0]["values"]["top1"] - 1.0))
    found = {check.state for check in workflows.verify_zoo(names=[NAME], data=[f"tinyset={data}"])}
    assert found == {"ok", "failed"}

    file.write_text(was, encoding="utf-8")
    change(file, lambda card: card["preprocessing"].update(img_size=[40, 40]))
    wrong = [check for check in workflows.verify_zoo(names=[f"{NAME}@weights"])]
    assert wrong[0].state == "failed" and "img_size is 32, 32, and the card says 40, 40" in wrong[0].reason

    file.write_text(was, encoding="utf-8")
    weights = zoo / "weights" / NAME / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    workflows.prune_zoo(every=True)
    (check,) = workflows.verify_zoo(names=[f"{NAME}@onnx"])
    assert check.state == "failed" and "SHA-256" in check.reason
    cards = [find_card(NAME), find_card("resnet50.a1_in1k")]
    monkeypatch.setattr(_zoo_verify, "all_cards", lambda: iter(cards))
    everything = {check.model: check.state for check in workflows.verify_zoo()}
    assert everything[f"{NAME}@onnx"] == "failed", "it is here, and it is wrong"
    assert everything["resnet50.a1_in1k"] in ("skipped", "ok"), "it is not here, and nobody named it"


def test_wrong_requests_are_listed_together(zoo: Path) -> None:
    with pytest.raises(RequestError) as caught:
        workflows.verify_zoo(names=["no_such", f"{NAME}@int8"])
    assert len(caught.value.problems) == 2
    with pytest.raises(RequestError, match="measured here on 'cifar10'"):
        workflows.verify_zoo(names=[NAME], data=["cifar10"])


def test_models_are_pulled_found_and_pruned(zoo: Path) -> None:
    (first, second) = workflows.pull_zoo(names=[NAME], every=True)
    assert (first.model, second.path.name) == (f"zoo:{NAME}@weights", "model.onnx")
    assert first.fetched and not workflows.pull_zoo(names=[NAME])[0].fetched
    assert [row.name for row in workflows.list_zoo(words=["tinyset"], pulled=True)] == [NAME]
    assert workflows.prune_zoo() == ()
    assert {entry.model for entry in workflows.prune_zoo(every=True)} == {NAME}
    assert not first.path.exists()
    with pytest.raises(RequestError, match="--max-mb"):
        workflows.prune_zoo(max_mb=1.0, every=True)


def test_a_folder_that_was_pushed_to_is_a_zoo(zoo: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "shared"
    pushed = workflows.push_zoo(name=NAME, target=str(target))
    assert pushed.files[0] == f"classification/{NAME}.yaml" and len(pushed.files) == 4
    with pytest.raises(RequestError, match="written over"):
        workflows.push_zoo(name=NAME, target=str(target))
    monkeypatch.setenv("VISIONKD_ZOO", str(target))
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "another"))
    assert {check.state for check in workflows.verify_zoo(names=[NAME])} == {"ok"}


class FakeHub:
    """Stands for huggingface_hub.HfApi: keeps what it is given."""

    revision = "a" * 40
    refuses = False

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        FakeHub.created = (repo, private, exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> object:
        if FakeHub.refuses:
            raise OSError("401 Unauthorized")
        FakeHub.uploaded = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
        return types.SimpleNamespace(oid=self.revision)


def test_a_hub_repository_becomes_a_source(zoo: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=FakeHub))
    pushed = workflows.push_zoo(name=NAME, target="hub:me/tiny", private=True)
    assert FakeHub.created == ("me/tiny", True, True) and pushed.revision == FakeHub.revision
    assert set(FakeHub.uploaded) == {"model.json", "model.safetensors", "model.onnx", "card.yaml", "README.md"}
    assert b"license: mit" in FakeHub.uploaded["README.md"] and b"all else" in FakeHub.uploaded["README.md"]
    sources = find_card(NAME).artifacts["onnx"].files[0].sources
    assert [source.kind for source in sources] == ["repository", "hub"]
    assert (sources[1].repo, sources[1].revision, sources[1].file) == ("me/tiny", FakeHub.revision, "model.onnx")
    workflows.push_zoo(name=NAME, target="hub:me/tiny")  # a newer revision takes the place of the former one
    assert len(find_card(NAME).artifacts["onnx"].files[0].sources) == 2
    monkeypatch.setattr(FakeHub, "refuses", True)
    with pytest.raises(WorkError, match="401"):
        workflows.push_zoo(name=NAME, target="hub:me/tiny")
    with pytest.raises(RequestError, match="OWNER/NAME"):
        workflows.push_zoo(name=NAME, target="hub:tiny")


def test_what_is_not_ours_or_has_no_licence_is_not_pushed(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not ours to push"):
        workflows.push_zoo(name="resnet50.a1_in1k", target=str(tmp_path / "t"))
    change(zoo / "classification" / f"{NAME}.yaml", lambda card: card.update(licence="unknown"))
    with pytest.raises(RequestError, match="no licence"):
        workflows.push_zoo(name=NAME, target=str(tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_the_list_is_filtered_and_sorted(zoo: Path) -> None:
    names = [row.name for row in workflows.list_zoo(task="classification", origin="upstream", words=["resnet50"])]
    assert "resnet50.a1_in1k" in names and all("resnet50" in name for name in names)
    small = workflows.list_zoo(max_params_m=10.0, least=["top1=75"], data="imagenet1k", sort="top1")
    assert small and all(row.params_m <= 10.0 and row.top1 >= 75.0 for row in small)
    assert [row.top1 for row in small] == sorted((row.top1 for row in small), reverse=True)
    worst = workflows.list_zoo(max_params_m=10.0, least=["top1=75"], data="imagenet1k", sort="top1", reverse=True)
    assert worst == tuple(reversed(small))
    free = workflows.list_zoo(commercial=True)
    assert free and not [row for row in free if "-nc" in row.licence]
    assert {row.licence for row in workflows.list_zoo(licence=["mit"])} == {"mit"}
    assert [row.name for row in workflows.list_zoo(words=["tinyset"], forms=True)] == [NAME, f"{NAME}@onnx"]


def test_what_is_not_known_is_within_no_limit_and_is_counted() -> None:
    rows = [row for name in ("resnet50.a1_in1k", "vit_base_patch16_224.mae") for row in rows_of(find_card(name))]
    kept, unknown = limited(rows, {"params_m": 50.0, "latency_ms": None}, {"top1": 10.0})
    assert [row.name for row in kept] == ["resnet50.a1_in1k"] and unknown == {}
    kept, unknown = limited(rows, {"params_m": 500.0, "latency_ms": None}, {"top1": 10.0})
    assert unknown == {"top1": 1}
    assert [row.top1 is None for row in ordered(rows, "top1")] == [False, True]
    assert [row.top1 is None for row in ordered(rows, "top1", reverse=True)] == [False, True]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"sort": "top"}, "Did you mean 'top1'"),
        ({"least": ["top=80", "top1=x"]}, "not METRIC=VALUE"),
        ({"data": "imagenet"}, "Did you mean 'imagenet1k'"),
        ({"licence": ["apache"]}, "no model has 'apache'"),
    ],
)
def test_a_wrong_filter_is_refused(request_: dict, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        workflows.list_zoo(**request_)


def test_licences() -> None:
    assert [allows_commercial_use(name) for name in ("mit", "cc-by-nc-4.0", "unknown")] == [True, False, False]


def test_listing_loads_no_torch() -> None:
    code = "import sys; from visionkd.workflows import list_zoo, verify_zoo; assert list_zoo(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not {"torch", "timm", "onnx", "onnxruntime", "huggingface_hub"} & set(done.stdout.split())
