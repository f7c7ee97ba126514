"""Segmentation from the command line: train, distil, evaluate, predict, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.workflows.dense import TINY, write_scenes
from visionkd.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ("fpn_cifar_resnet8", "--no-pretrained")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISIONKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes")


def visionkd(*arguments: object, options: tuple[str, ...] = ()) -> int:
    return main([*map(str, arguments), *(text for option in options for text in ("-o", option))])


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    options = (*TINY, "model.img_size=64")
    assert visionkd("train", "--model", *NETWORK, "--data", scenes, "--epochs", 3, "--out", out, options=options) == 0
    return out


@pytest.fixture(scope="module")
def distilled(scenes, trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "distilled"
    assert distil(scenes, trained, out, "--baseline", trained, options=("export.formats=[onnx]",)) == 0
    return out


def distil(scenes, teacher, out, *arguments, options=(), epochs=1) -> int:
    options = (*TINY, "student.img_size=64", *options)
    return visionkd(
        "distill", "--teacher", teacher, "--student", *NETWORK, "--method", "kd", "--data", scenes, "--epochs", epochs,
        "--out", out, *arguments, options=options,
    )  # fmt: skip


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_training_learns_and_packages_what_it_measured(trained):
    card, status, comparison = (read(trained / name) for name in ("model/model.json", "status.json", "comparison.json"))
    assert card["task"] == "segmentation" and card["classes"] == ["ground", "red", "blue"]
    assert card["metrics"]["miou"] > 40 and set(card["metrics"]) == {"miou", "pixel_acc"}
    assert status["metrics"]["val/miou"] == pytest.approx(card["metrics"]["miou"])
    last = (trained / "metrics.csv").read_text().splitlines()[-1].split(",")
    header = (trained / "metrics.csv").read_text().splitlines()[0].split(",")
    assert float(last[header.index("miou")]) == pytest.approx(card["metrics"]["miou"], abs=1e-3), "as in training"
    (row,) = comparison["rows"]
    assert row["role"] == "model" and row["miou"] == card["metrics"]["miou"] and "top1" not in row


def test_the_report_shows_maps_and_classes(distilled):
    page = (distilled / "report.html").read_text(encoding="utf-8")
    assert "mIoU, %" in page and "top-1" not in page
    assert all(
        f'id="{section}"' in page for section in ("result", "curves", "scenes", "classes", "confusion", "exports")
    )
    assert page.count('<figure class="scene">') == 6 and page.count('alt="teacher of ') == 6
    assert page.count('alt="errors of ') == 6 and "Best 2" in page and "trained alone" in page


def test_a_report_without_the_data_keeps_the_maps(distilled, tmp_path, capsys):
    run = tmp_path / "run"
    __import__("shutil").copytree(distilled, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"path: {read_path(config)}", f"path: {tmp_path / 'gone'}"))
    assert visionkd("report", run) == 0 and "without pictures" in capsys.readouterr().err
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'alt="label of ' in page and 'alt="image of ' not in page


def read_path(config: str) -> str:
    return next(line.split(": ", 1)[1] for line in config.splitlines() if line.startswith("  path: "))


def test_rows_compare_student_teacher_and_baseline(distilled, trained):
    rows = read(distilled / "comparison.json")["rows"]
    assert [row["role"] for row in rows] == ["student", "teacher", "baseline"]
    assert rows[1]["miou"] == rows[2]["miou"] == read(trained / "model" / "model.json")["metrics"]["miou"]


def test_evaluation_agrees_with_the_package(trained, scenes, capsys):
    assert visionkd("eval", trained, "--data", scenes, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == pytest.approx(read(trained / "model" / "model.json")["metrics"])
    assert found["measure"] == "iou" and set(found["per_class"]) == {"ground", "red", "blue"}
    assert np.mean(list(found["per_class"].values())) == pytest.approx(found["metrics"]["miou"])
    assert visionkd("eval", trained, "--limit", 2) == 0 and "2 images" in capsys.readouterr().out


def test_a_file_is_evaluated_and_predicts_without_torch(distilled, scenes, tmp_path):
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'timm', 'lightning', 'matplotlib'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from visionkd.cli.main import main\n"
        f"code = main(['eval', {str(distilled / 'export' / 'model.onnx')!r}, '--data', {str(scenes)!r}, '--json'])\n"
        f"code |= main(['predict', {str(distilled / 'export' / 'model.onnx')!r}, {str(scenes / 'val' / 'images')!r},"
        f" '--save', {str(tmp_path / 'file')!r}, '--json'])\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found, rest = json.JSONDecoder().raw_decode(done.stdout)
    predicted = json.loads(done.stdout[rest:])
    # the file resizes its answer to the input's size first, which moves a few pixels at the edges
    package = read(distilled / "model" / "model.json")["metrics"]
    assert found["metrics"] == pytest.approx(package, abs=2.0) and found["num_images"] == 7
    assert len(predicted["predictions"]) == 7
    assert visionkd("predict", distilled, scenes / "val" / "images", "--save", tmp_path / "run") == 0
    same = [
        np.mean(np.asarray(Image.open(file)) == np.asarray(Image.open(tmp_path / "run" / file.name)))
        for file in sorted((tmp_path / "file").glob("*.map.png"))
    ]
    assert len(same) == 7 and min(same) > 0.95


def test_predictions_are_drawn_and_kept(trained, scenes, tmp_path, capsys):
    picture = scenes / "val" / "images" / "0.png"
    assert visionkd("predict", trained, picture, "--save", tmp_path / "drawn", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    given = np.asarray(Image.open(tmp_path / "drawn" / "0.map.png"))
    size = Image.open(picture).size
    assert given.shape == size[::-1] and found["labels"][0] == "ground"
    assert found["probs"][0] == pytest.approx((given == 0).mean())
    assert found["saved_map"] == str(tmp_path / "drawn" / "0.map.png")
    assert Image.open(tmp_path / "drawn" / "0.png").width >= 240
    assert visionkd("predict", trained, picture, "--save", tmp_path / "drawn") == 2
    assert "written over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "{classifier}"), "names one class for an image"),
        (
            ("distill", "--teacher", "{classifier}", "--student", *NETWORK, "--method", "kd"),
            "names one class for an image",
        ),
        (("eval", "{trained}", "--data", "shapes", "-o", "task=classification"), "names the class of every pixel"),
        (
            ("distill", "--teacher", "{trained}", "--student", *NETWORK, "--method", "ofa_kd"),
            "does not support segmentation",
        ),
        (
            ("distill", "--teacher", "{trained}", "--student", *NETWORK, "--method", "kd", "--fit-teacher", "probe"),
            "answers for whole images",
        ),
        (("eval", "{onnx}", "-o", "segmentation.evaluation=slide"), "takes one size"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said, scenes, trained, distilled, teacher_run, tmp_path, capsys):
    places = {"{trained}": trained, "{classifier}": teacher_run, "{onnx}": distilled / "export" / "model.onnx"}
    arguments = [places.get(each, each) for each in arguments]
    data = () if "--data" in arguments else ("--data", scenes)
    out = () if arguments[0] == "eval" else ("--out", tmp_path / "out", "--no-pretrained")
    assert visionkd(*arguments, *data, *out) == 2
    assert said in capsys.readouterr().err


def test_a_teacher_of_other_classes_is_refused(trained, tmp_path, capsys):
    others = write_scenes(tmp_path / "others", train=4, val=2, classes=("floor", "cup", "book"))
    assert distil(others, trained, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "classes" in said and "--fit-teacher finetune" in said and "probe" not in said


@pytest.mark.parametrize("way", ["native", "slide"])
def test_other_ways_to_look_at_an_image(way, trained, tmp_path, capsys):
    options = (f"segmentation.evaluation={way}",)
    assert visionkd("eval", trained, "--json", options=options) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    package = read(trained / "model" / "model.json")["metrics"]
    assert found != package and found["pixel_acc"] == pytest.approx(package["pixel_acc"], abs=10)


def test_a_batch_of_maps_is_small_unless_it_is_said(scenes, tmp_path):
    from visionkd.config.schema import NetworkConfig, TrainConfig
    from visionkd.workflows._stages import open_for_training

    for given, expected in (({}, 8), ({"accumulate": 3, "batch_size": 66}, 66), ({"accumulate": 4}, 8)):
        model = NetworkConfig(name="fpn_cifar_resnet8", pretrained=False, img_size=64)
        config = TrainConfig(model=model, training=given)
        config.data.path = str(scenes)
        open_for_training(config, config.model)
        assert config.training.batch_size == expected


def test_cached_labels_are_those_of_the_teacher(scenes, trained, tmp_path, capsys):
    options = ("report.enabled=false", "label_store.views=1")
    assert distil(scenes, trained, tmp_path / "first", "--cache-teacher", options=options, epochs=2) == 0
    assert "1 of the 2 epochs" in capsys.readouterr().err
    assert distil(scenes, trained, tmp_path / "second", "--cache-teacher", options=options, epochs=2) == 0
    assert "the teachers do not run at all" in capsys.readouterr().err
    plain = ("report.enabled=false",)
    assert distil(scenes, trained, tmp_path / "plain", options=plain, epochs=2) == 0
    first, second, without = (
        [line.split(",")[:6] for line in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        for name in ("first", "second", "plain")
    )
    assert first == second, "what was stored is what was said"
    assert first[1] == without[1] and first[3] != without[3], "the first pass is the same, then views repeat"


def test_a_row_of_results(distilled):
    import importlib.machinery
    import importlib.util

    loader = importlib.machinery.SourceFileLoader("record_result", str(ROOT / "tools" / "record_result"))
    tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("record_result", loader))
    loader.exec_module(tool)
    row = tool.row_of(distilled, "a note")
    assert row["miou"] == f"{read(distilled / 'model' / 'model.json')['metrics']['miou']:.2f}"
    assert list(row)[7:9] == ["miou", "pixel_acc"] and "top1" not in row and row["teacher"] == "trained"
