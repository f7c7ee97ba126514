"""Detection from the command line: train, evaluate, check, report, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.workflows.boxes import NETWORK, TINY, network, write_boxes
from visionkd.cli.main import main
from visionkd.workflows._box_counts import load


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISIONKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("data") / "scenes")


def visionkd(*arguments: object, options: tuple[str, ...] = ()) -> int:
    return main([*map(str, arguments), *(text for option in options for text in ("-o", option))])


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    options = (*TINY, *network(), "data.novel=[blue]")
    request = ("train", "--model", NETWORK, "--no-pretrained", "--data", scenes, "--epochs", 6, "--out", out)
    assert visionkd(*request, options=options) == 0
    return out


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_training_learns_and_packages_what_it_measured(trained):
    card, status, comparison = (read(trained / name) for name in ("model/model.json", "status.json", "comparison.json"))
    assert card["task"] == "detection" and card["classes"] == ["red", "blue"]
    metrics = card["metrics"]
    assert set(metrics) == {"ap", "ap50", "ap75", "ap50_base", "ap50_novel"}
    assert metrics["ap50_base"] > 20 and metrics["ap50_novel"] < 5, "blue boxes were hidden"
    assert status["metrics"]["val/ap50"] == pytest.approx(metrics["ap50"], abs=1e-3)
    header, *rows = [line.split(",") for line in (trained / "metrics.csv").read_text().splitlines()]
    last = dict(zip(header, rows[-1], strict=True))
    assert float(last["ap"]) == pytest.approx(metrics["ap"], abs=1e-3) and last["split"] == "val"
    losses = [float(row[header.index("loss")]) for row in rows if row[header.index("split")] == "train"]
    assert losses[-1] < 0.8 * losses[0] and last["loss"] == "", "a detector has no loss in eval mode"
    (row,) = comparison["rows"]
    assert row["role"] == "model" and row["ap"] == metrics["ap"] and row["params_m"] > 0 and "top1" not in row


def test_the_report_shows_boxes_and_classes(trained):
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "AP, %" in page and "AP50 novel, %" in page and "top-1" not in page and "mIoU" not in page
    assert all(f'id="{name}"' in page for name in ("result", "curves", "scenes", "classes", "precision"))
    assert page.count('<figure class="scene">') == 6 and page.count('alt="errors of ') == 6
    assert page.count('alt="image of ') == 6 and page.count('alt="truth of ') == 6 and "blue (novel)" in page
    assert "AP by class" in page and "Precision over recall of red" in page


def test_a_report_without_the_data_keeps_the_boxes(trained, scenes, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(scenes), str(tmp_path / "gone")))
    assert visionkd("report", run) == 0 and "without pictures" in capsys.readouterr().err
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'alt="truth of ' in page and 'alt="image of ' not in page


def test_evaluation_agrees_with_the_package(trained, scenes, capsys):
    assert visionkd("eval", trained, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == pytest.approx(read(trained / "model" / "model.json")["metrics"], abs=1e-3)
    assert found["measure"] == "ap" and set(found["per_class"]) == {"red", "blue"} and found["num_images"] == 7
    assert np.mean(list(found["per_class"].values())) == pytest.approx(found["metrics"]["ap"])
    assert visionkd("eval", trained, "--data", scenes, "--limit", 2, "--split", "train") == 0
    assert "2 images" in capsys.readouterr().out


def test_classes_are_matched_by_name(trained, scenes, capsys):
    """Data that has only one of the classes, and in another order."""
    for classes, expected in (("[blue,red]", {"red", "blue"}), ("[red]", {"red"})):
        options = (f"data.classes={classes}", "data.novel=[]")
        assert visionkd("eval", trained, "--data", scenes, "--json", options=options) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found["per_class"]) == expected and found["per_class"]["red"] > 5
        assert "ap50_novel" not in found["metrics"]


def test_what_was_found_is_kept(trained):
    evaluations = load(trained / "evaluation.npz")
    assert evaluations.names[0] == "val/0.png" and evaluations.novel == (1,) and list(evaluations.found) == ["student"]
    assert evaluations.metrics("student") == pytest.approx(read(trained / "model" / "model.json")["metrics"])
    assert evaluations.truth.counts.tolist() == [0, 2, 2, 2, 2, 2, 2], "a novel class is measured"
    joined = load(trained / "evaluation.npz").joined(["student"], np.arange(10, 17))
    assert list(joined.found) == ["teacher"] and joined.indices.tolist() == list(range(10, 17))


def test_data_check_counts_boxes(scenes, tmp_path, capsys):
    assert visionkd("data", "check", scenes) == 0
    assert "boxes: red 17, blue 17, images without boxes 2" in capsys.readouterr().out
    broken = tmp_path / "broken"
    shutil.copytree(scenes, broken)
    path = broken / "annotations" / "instances_train.json"
    table = read(path)
    table["annotations"][0]["bbox"] = [5, 5, 0, 5]
    path.write_text(json.dumps(table))
    assert visionkd("data", "check", broken, "--json") == 1
    assert read_out(capsys)["wrong_boxes"] == [["train: train/1.png", "no area: 5, 5, 5, 10"]]


def read_out(capsys):
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("model", "options", "message"), [
    ("fpn_cifar_resnet8", (), "names the class of every pixel, and the data has boxes"),
    (NETWORK, ("augment.mixup_alpha=0.2",), "augment.mixup_alpha"),
    (NETWORK, ("data.novel=[green]",), "no class 'green'"),
    (NETWORK, ("detection.scale=[2,1]",), "scale takes the smallest and the largest factor"),
])  # fmt: skip
def test_what_is_refused(scenes, tmp_path, capsys, model, options, message):
    request = ("train", "--model", model, "--no-pretrained", "--data", scenes, "--out", tmp_path / "run")
    assert visionkd(*request, options=(*TINY, "model.img_size=64", *options)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "run").exists()


def test_networks_and_data_of_different_tasks(trained, tmp_path, capsys):
    assert visionkd("eval", trained, "--data", "shapes", options=("task=classification",)) == 2
    assert "finds boxes, and the data has one class for an image" in capsys.readouterr().err
    assert visionkd("train", "--init", trained, "--linear-probe", "--data", "shapes", "--out", tmp_path / "x") == 2
    assert "Traceback" not in capsys.readouterr().err
