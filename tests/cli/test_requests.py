"""Wrong requests to the real workflows: all that is wrong is said at once, in the words of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from visionkd.config.schema import DistillConfig, TrainConfig
from visionkd.errors import RequestError
from visionkd.models import factory
from visionkd.workflows import _request

TINY = "--no-pretrained -o model.img_size=32 -o data.shapes.num_train=16 -o data.shapes.num_val=8 -o data.workers=0"


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wrong request must be refused before a network is built or its weights are fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(factory, "hub_access", lambda *_, **__: pytest.fail("weights were to be fetched"))


def test_every_wrong_name_is_listed_with_every_wrong_value(run) -> None:
    names = "--teacher runs/nothing,vit_l --student resnet18x --data petz --baseline runs/alone --method kdd"
    outcome = run("distill", *names.split(), *"--export onx -o training.epoch=3 -o optimizer.lr=-1".split())
    assert outcome.code == 2 and "8 problems" in outcome.err
    for text in (
        "- --teacher: there is no file or directory 'runs/nothing'",
        "- --student: unknown network 'resnet18x'. Did you mean 'resnet18'",
        "- --data: 'petz' is neither a directory, nor an archive, nor a known data set",
        "- --baseline: there is no file or directory 'runs/alone'",
        "- --method: unknown name 'kdd'. Did you mean 'kd'?",
        "- --export (export.formats.0): must be 'onnx' (given: 'onx')",
        "- training.epoch: unknown key (given: 3). Did you mean 'epochs'?",
        "- optimizer.lr: must be greater than 0 (given: -1)",
    ):
        assert text in outcome.err
    assert "vit_l" not in outcome.err, "it exists"


def test_names_in_a_recipe_are_known_by_their_keys(run, tmp_path: Path) -> None:
    Path("mine.yaml").write_text("student: {name: resnet51}\nteachers: [{name: runs/no}]\ndata: {path: no/data}\n")
    err = run("distill", "--config", "mine.yaml").err
    assert "- student.name: unknown network" in err and "- teachers.0.name: there is no" in err
    assert "- data.path: 'no/data' is neither" in err


def test_an_unknown_recipe_does_not_hide_wrong_names(run) -> None:
    outcome = run("distill", "--config", "nope", "--teacher", "runs/a,runs/b", "--data", "runs/c")
    assert outcome.code == 2 and "4 problems" in outcome.err
    assert "- nope: is neither a recipe nor a file" in outcome.err
    assert outcome.err.count("- --teacher: ") == 2 and "- --data: " in outcome.err


def test_the_recipe_of_another_command(run) -> None:
    err = run("train", "--config", "classification/kd", "--model", "resnet18").err
    assert "error: classification/kd: is a recipe for 'visionkd distill' (it has student and teachers)\n" in err
    assert "hint: Run: visionkd distill --config classification/kd" in err
    Path("runs/a b").mkdir(parents=True)
    Path("runs/a b/config.yaml").write_text("model: {name: resnet18}\n")
    outcome = run("distill", "--resume", "--out", "runs/a b")
    assert outcome.code == 2 and "hint: Run: visionkd train --resume --out 'runs/a b'" in outcome.err


def test_resume_needs_its_run(run) -> None:
    for command in ("train", "distill"):
        outcome = run(command, "--resume")
        assert outcome.code == 2 and "problems" not in outcome.err
        assert "--resume: needs the run directory to continue in. Give --resume --out DIR." in outcome.err


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["distill"], ["--config", "--student", "--out", "--teacher", "--data"]),
        (["train"], ["--model", "--export"]),
        (["report", ""], ["RUN", "--baseline"]),
        (["export", " "], ["MODEL", "--out"]),
        (["predict", "", "a.jpg", ""], ["MODEL", "IMAGE...", "--save"]),
    ],
)
def test_empty_values(run, argv: list[str], options: list[str]) -> None:
    outcome = run(*argv, *(f"{name}=" for name in options if name.startswith("-")))
    assert outcome.code == 2 and f"{len(options)} problems" in outcome.err
    assert all(f"{option}: is empty" in outcome.err for option in options)


def test_the_python_twins_are_told_too() -> None:
    given = {"options": (), "resume": False}
    for kind, overrides, words in (
        (
            TrainConfig,
            {"model.name": "", "data.path": ""},
            ["--model: the name of the network is empty", "--data: is empty"],
        ),
        (DistillConfig, {"training.epochs": 0, "compute.devices": "x"}, ["--epochs (training.epochs)", "--devices"]),
    ):
        with pytest.raises(RequestError) as caught:
            _request.build_config(kind, config=None, overrides=overrides, out=None, **given)
        assert all(word in str(caught.value) for word in words)
    with pytest.raises(RequestError, match="(?s)--config: is empty.*--out: is empty"):
        _request.build_config(TrainConfig, config=" ", overrides={}, out="", **given)


def test_wrong_numbers_are_listed_at_once(run) -> None:
    err = run("distill", "--epochs", "0", "--lr", "-1", "--batch-size", "x").err
    assert "3 problems" in err
    for text in (
        "--epochs: must be a whole number from 1 up (given: '0')",
        "--lr: must be a number above 0 (given: '-1')",
        "--batch-size: must be a whole number from 1 up (given: 'x')",
    ):
        assert text in err
    for value in ("nan", "inf", "0", "fast"):
        assert f"--lr: must be a number above 0 (given: '{value}')" in run("train", "--lr", value).err


def test_a_recipe_that_is_no_yaml_is_the_only_problem(run) -> None:
    Path("mine.yaml").write_text("student: [\n")
    outcome = run("distill", "--config", "mine.yaml")
    assert outcome.code == 2 and outcome.err.startswith("error: mine.yaml: is not valid YAML: line 2, column 1: ")
    assert "hint" not in outcome.err and "required" not in outcome.err and "unicode string" not in outcome.err


def test_the_options_of_the_method_that_auto_takes_are_checked(run) -> None:
    err = run(*"distill --teacher vit_b --student resnet18 -o options.temprature=2".split()).err
    assert "options.temprature: unknown option of this method. Did you mean 'temperature'" in err


def test_an_argument_of_the_constructor_is_answered_with_the_nearest(run) -> None:
    outcome = run("train", "--model", "cifar_resnet8", *TINY.split(), "-o", "model.args.widht=2")
    assert outcome.code == 2
    assert "model.args.widht: 'cifar_resnet8' has no such argument (given: 2). Did you mean 'width'?" in outcome.err


def test_arguments_are_checked_with_everything_else(run) -> None:
    line = "distill --teacher cifar_resnet8,cifar_resnet14 --student cifar_resnet8 --data petz"
    options = "-o student.args.widht=2 -o student.args.num_classes=3 -o teachers.1.args.in_chans=1"
    outcome = run(*line.split(), *options.split())
    assert outcome.code == 2 and "4 problems" in outcome.err
    for text in (
        "- student.args.widht: 'cifar_resnet8' has no such argument (given: 2). Did you mean 'width'?",
        "- student.args.num_classes: is not for the arguments of 'cifar_resnet8': the data decides it",
        "- teachers.1.args.in_chans: ",
        "- --data: ",
    ):
        assert text in outcome.err


@pytest.mark.parametrize(
    ("out", "words"), [("file/run", "not a directory: file"), ("/proc/visionkd", "/proc/visionkd")]
)
def test_a_run_directory_that_cannot_be(run, out: str, words: str) -> None:
    Path("file").touch()
    if out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    outcome = run("train", "--model", "cifar_resnet8", *TINY.split(), "--out", out)
    assert outcome.code == 1
    assert words in outcome.err and "hint: " in outcome.err and "internal error" not in outcome.err
