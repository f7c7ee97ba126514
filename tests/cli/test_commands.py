"""Each command hands its parameters to the workflow of the design, and shows the answer for people and for machines."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from visionkd.data.check import CheckReport
from visionkd.types import MetricRow
from visionkd.workflows import results
from visionkd.workflows.configs import ConfigRow
from visionkd.workflows.doctor import DoctorResult, DoctorRow

WORKFLOWS = Path(results.__file__).parent
RUN = results.RunResult(
    run=Path("runs/a"),
    metrics={"val/top1": 55.1},
    table=(
        MetricRow("teacher", {"top1": 61.234, "params_m": 0.27}),
        MetricRow("student", {"top1": 55.1, "params_m": 0.08}),
    ),
    files={"report": Path("runs/a/report.html")},
)
EVALUATION = results.EvalResult(
    "runs/a", "shapes", "val", 400, {"top1": 55.104, "nll": float("nan")}, {"cat": 80.0, "dog": 30.25}
)
PREDICTION = results.PredictResult(
    (results.Prediction(Path("a.jpg"), ("cat", "dog"), (0.75, 0.25), Path("out/a.jpg")),), (("b.jpg", "is truncated"),)
)
EXPORT = results.ExportResult(Path("a.onnx"), 0.33, 1.5e-06, 55.1, None, 256)
BENCH = results.BenchResult((MetricRow("a [torch]", {"latency_ms": 1.2345, "throughput_img_s": 810.4}),))

SEARCH = results.SearchResult(
    run=Path("runs/s"),
    table=(MetricRow("net blocks=[1,3]", {"rank": "1", "params_m": 0.2, "score": -0.5}),),
    command="visionkd distill --teacher t --student net -o 'student.args.blocks=[1, 3]'",
    student={"name": "net"},
    strategy="random",
    num_scored=1,
    num_failed=0,
    num_over_budget=0,
    seconds=1.0,
    files={"pareto": Path("runs/s/pareto.svg")},
)


CHECK = CheckReport(
    "d",
    {"train": 5000, "val": 2},
    unreadable=(("train: a.jpg", "is no image"), ("train: b.jpg", "is empty")),
    leakage=(("train: c.jpg", "val: c.jpg"),),
    tiny=(("train: e.jpg", 3, 4),),
    grey=tuple(f"val: {number}.jpg" for number in range(9)),
)


@dataclass
class Recorder:
    """A workflow that keeps what it was asked and gives a set answer."""

    answer: Any
    given: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.given = given
        listener = given.pop("listener", None)
        if listener is not None:
            listener.message("said aloud")
        print("noise of a library")
        return self.answer


def signature(name: str) -> ast.arguments | None:
    """Return the parameters of a workflow without importing it; None while nobody has written it."""
    for file in WORKFLOWS.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name and not file.name.startswith("_"):
                return node.args
    return None


def check_accepts(name: str, given: Mapping[str, Any]) -> None:
    parameters = signature(name)
    if parameters is None:
        pytest.skip(f"there is no workflow '{name}' yet")
    assert parameters is not None
    known = {one.arg for one in (*parameters.args, *parameters.kwonlyargs)}
    assert set(given) <= known


DISTILL = (
    "distill --teacher vit_l,vit_b --teacher a --student resnet50 --data d --method kd --task classification "
    "--config c -o a.b=1 -o c=x=y --epochs 3 --batch-size 8 --lr 0.1 --seed 4 --fit-teacher probe "
    "--no-cache-teacher --unlabeled u --augment hard --no-pretrained "
    "--baseline b --int8 "
    "--export onnx --out o --resume --overwrite --accelerator cpu --devices 2 --nodes 3 --strategy ddp --precision bf16"
)
SHARED = dict(
    data="d",
    task="classification",
    config="c",
    options=("a.b=1", "c=x=y"),
    epochs=3,
    batch_size=8,
    lr=0.1,
    seed=4,
    pretrained=False,
    export="onnx",
    out="o",
    resume=True,
    overwrite=True,
    accelerator="cpu",
    devices=2,
    nodes=3,
    strategy="ddp",
    precision="bf16",
)
REQUESTS = [
    (
        DISTILL,
        "distill",
        RUN,
        {
            **SHARED,
            "teacher": ("vit_l", "vit_b", "a"),
            "student": "resnet50",
            "method": "kd",
            "fit_teacher": "probe",
            "cache_teacher": False,
            "unlabeled": "u",
            "augment": "hard",
            "baseline": "b",
            "int8": True,
        },
    ),
    (
        "train --model m --objective mae --init i --linear-probe "
        "--data d --task classification --config c -o a.b=1 -o c=x=y --epochs 3 --batch-size 8 "
        "--lr 0.1 --seed 4 --no-pretrained --export onnx --out o --resume --overwrite --accelerator cpu --devices 2 "
        "--nodes 3 --strategy ddp --precision bf16",
        "train",
        RUN,
        {**SHARED, "model": "m", "objective": "mae", "init": "i", "linear_probe": True},
    ),
    (
        "eval m --data d --split test --batch-size 8 --limit 9 --accelerator cpu --backend onnxruntime -o a=1",
        "evaluate",
        EVALUATION,
        dict(
            model="m",
            data="d",
            split="test",
            batch_size=8,
            limit=9,
            accelerator="cpu",
            backend="onnxruntime",
            options=("a=1",),
        ),
    ),
    (
        "export m --format onnx --out f --data d --verify-images 9 --opset 20 --overwrite",
        "export",
        EXPORT,
        dict(model="m", format="onnx", out="f", data="d", verify_images=9, opset=20, overwrite=True, int8=False),
    ),
    (
        "export m.onnx --format tensorrt --precision fp16 --batch 1:2:4 --workspace-mb 64 --timing-cache t --dla 0 "
        "--builder tensorrt --compute-capability 8.7",
        "export",
        EXPORT,
        dict(
            model="m.onnx",
            format="tensorrt",
            precision="fp16",
            batch="1:2:4",
            workspace_mb=64,
            timing_cache="t",
            dla=0,
            builder="tensorrt",
            compute_capability="8.7",
            int8=False,
            overwrite=False,
        ),
    ),
    (
        "export m --bundle b",
        "export",
        EXPORT,
        dict(model="m", format="onnx", bundle="b", int8=False, overwrite=False),
    ),
    (
        "bench a b --backend torch,onnxruntime --batch-size 8 --threads 2 --rounds 3 --img-size 64 --accelerator cpu",
        "bench",
        BENCH,
        dict(
            models=("a", "b"),
            backend=("torch", "onnxruntime"),
            batch_size=8,
            threads=2,
            rounds=3,
            img_size=64,
            accelerator="cpu",
        ),
    ),
    (
        "search --teacher t --space vit --data d --budget params_m=1 --score params --evaluations 9 --strategy random "
        "--population 8 --tournament 3 --seed 4 --init gaussian --img-size 32 --batch-size 16 --backend torch "
        "--workers 2 -o a=1 --distill --out o --resume --overwrite",
        "search",
        SEARCH,
        dict(
            teacher="t",
            space="vit",
            data="d",
            budget="params_m=1",
            score="params",
            evaluations=9,
            strategy="random",
            population=8,
            tournament=3,
            seed=4,
            init="gaussian",
            img_size=32,
            batch_size=16,
            backend="torch",
            workers=2,
            options=("a=1",),
            distill=True,
            out="o",
            resume=True,
            overwrite=True,
        ),
    ),
    (
        "quantize m --data d --teacher t --bits 8 --scheme int8-learned --calibration max --images 32 --config c "
        "-o a=1 --epochs 2 --batch-size 8 --lr 0.1 --seed 3 --export onnx --out o --resume --overwrite "
        "--accelerator cpu --devices 1 --nodes 1 --strategy ddp --precision bf16",
        "quantize",
        RUN,
        dict(
            model="m",
            data="d",
            teacher="t",
            bits=8,
            scheme="int8-learned",
            calibration="max",
            images=32,
            config="c",
            options=("a=1",),
            epochs=2,
            batch_size=8,
            lr=0.1,
            seed=3,
            export="onnx",
            out="o",
            resume=True,
            overwrite=True,
            accelerator="cpu",
            devices=1,
            nodes=1,
            strategy="ddp",
            precision="bf16",
        ),
    ),
    (
        "report r --baseline b --out f --overwrite",
        "report",
        results.ReportResult(Path("f")),
        dict(run="r", baseline="b", out="f", overwrite=True),
    ),
]


@pytest.mark.parametrize(("line", "name", "answer", "expected"), REQUESTS, ids=[request[1] for request in REQUESTS])
def test_parameters_reach_the_workflow(
    run, pretend, line: str, name: str, answer: Any, expected: dict[str, Any]
) -> None:
    workflow = Recorder(answer)
    pretend(name, workflow)
    outcome = run(*line.split())
    assert outcome.code == 0, outcome.err
    assert workflow.given == expected
    assert "said aloud" in outcome.err and "said aloud" not in outcome.out
    check_accepts(name, workflow.given)


def test_what_is_not_given_is_left_to_the_workflow(run, pretend) -> None:
    workflow = Recorder(RUN)
    pretend("distill", workflow)
    assert run("distill", "--devices", "auto").code == 0
    assert {name: value for name, value in workflow.given.items() if value not in (None, (), False)} == {
        "devices": "auto"
    }
    assert workflow.given["pretrained"] is None, "neither --pretrained nor --no-pretrained was given"


def test_a_run_shows_its_table_and_files(run, pretend) -> None:
    pretend("train", Recorder(RUN))
    out = run("train").out.splitlines()
    assert [line.split() for line in out[1:4]] == [
        ["model", "top1", "params_m"],
        ["teacher", "61.23", "0.27"],
        ["student", "55.10", "0.08"],
    ]
    assert any(line.split() == ["report", "runs/a/report.html"] for line in out)


def test_a_search_shows_its_table_and_the_command(run, pretend) -> None:
    pretend("search", Recorder(SEARCH))
    out = run("search").out
    assert f"  {SEARCH.command}\n" in out and "runs/s/pareto.svg" in out and "-0.5" in out
    assert json.loads(run("search", "--json").out)["command"] == SEARCH.command
    pretend("search", Recorder(dataclasses.replace(SEARCH, distilled=RUN)))
    out = run("search", "--distill").out
    assert SEARCH.command not in out and "runs/a/report.html" in out


def test_an_evaluation_names_the_worst_classes_first(run, pretend) -> None:
    pretend("evaluate", Recorder(EVALUATION))
    out = run("eval", "runs/a").out
    assert "400 images" in out and "55.10" in out
    assert out.index("dog") < out.index("cat")


@pytest.mark.parametrize(
    ("line", "name", "answer"),
    [
        ("eval m --json", "evaluate", EVALUATION),
        ("bench m --json", "bench", BENCH),
        ("predict m a.jpg --json", "predict", results.PredictResult(PREDICTION.predictions)),
        ("data check d --json", "check_data", CheckReport("d", {"train": 5})),
        ("doctor --json", "doctor", DoctorResult((DoctorRow("gpu", "missing", "none"),))),
    ],
)
def test_json_is_all_there_is_on_standard_output(run, pretend, line: str, name: str, answer: Any) -> None:
    pretend(name, Recorder(answer))
    outcome = run(*line.split())
    assert outcome.code == 0, outcome.err
    values = json.loads(outcome.out)
    assert isinstance(values, dict) and values
    assert "noise of a library" in outcome.err


def test_json_has_no_nan(run, pretend) -> None:
    pretend("evaluate", Recorder(EVALUATION))
    values = json.loads(run("eval", "m", "--json").out, parse_constant=lambda name: pytest.fail(name))
    assert values["metrics"] == {"top1": 55.104, "nll": None}
    assert values["per_class"] == {"cat": 80.0, "dog": 30.25}


def test_predictions(run, pretend) -> None:
    workflow = Recorder(PREDICTION)
    pretend("predict", workflow)
    outcome = run(*"predict m a.jpg b.jpg --save out --top-k 2 --accelerator cpu --overwrite".split())
    assert workflow.given == dict(
        model="m", images=("a.jpg", "b.jpg"), save="out", top_k=2, accelerator="cpu", overwrite=True,
        classes=None, encoder=None, min_score=None,
    )
    check_accepts("predict", workflow.given)
    assert "a.jpg: cat 75.0 %, dog 25.0 % -> out/a.jpg" in outcome.out.splitlines()
    assert "b.jpg was skipped: is truncated" in outcome.err
    assert outcome.code == 1, "an image that was asked for has no prediction"


def test_a_check_names_what_it_found(run, pretend) -> None:
    workflow = Recorder(CHECK)
    pretend("check_data", workflow)
    outcome = run("data", "check", "d", "-o", "data.val_fraction=0.2")
    assert workflow.given == dict(data="d", options=("data.val_fraction=0.2",))
    check_accepts("check_data", workflow.given)
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines[2:6] == [
        "num images: train 5,000, val 2",
        "unreadable: 2",
        "  train: a.jpg: is no image",
        "  train: b.jpg: is empty",
    ]
    assert "  train: c.jpg = val: c.jpg" in lines and "  train: e.jpg: 3 x 4" in lines
    assert "grey: 9" in lines and "  and 4 more; --json gives all" in lines
    assert json.loads(run("data", "check", "d", "--json").out)["problems"] is True


def test_doctor_fails_where_something_is_broken(run, pretend) -> None:
    rows = (DoctorRow("torch", "ok", "2.14"), DoctorRow("gpu", "broken", "no kernel", "Reinstall."))
    pretend("doctor", Recorder(DoctorResult(rows)))
    outcome = run("doctor")
    assert outcome.code == 1
    assert "no kernel" in outcome.out and "Reinstall." in outcome.out
    pretend("doctor", Recorder(DoctorResult(rows[:1])))
    assert run("doctor").code == 0


def test_configs(run, pretend, tmp_path: Path) -> None:
    pretend("list_configs", lambda: (ConfigRow("classification/a", "The first"),))
    assert run("configs", "list").out.splitlines()[1].split(maxsplit=1) == ["classification/a", "The first"]
    pretend("show_config", lambda name: f"# {name}\n")
    assert run("configs", "show", "x").out == "# x\n"
    given = Recorder(None)

    def copy(name: str, file: str, *, overwrite: bool) -> Path:
        given(name=name, overwrite=overwrite)
        Path(file).write_text(f"# A recipe\n{name}:\n", encoding="utf-8")
        return Path(file)

    pretend("copy_config", copy)
    file = str(tmp_path / "a.yaml")
    outcome = run("configs", "copy", "model", file, "--overwrite")
    assert given.given == {"name": "model", "overwrite": True}
    assert file in outcome.out and f"visionkd train --config {file}" in outcome.err
    assert f"visionkd distill --config {file}" in run("configs", "copy", "student", file).err


def test_an_empty_list_says_so(run, pretend) -> None:
    pretend("list_data", lambda: ())
    assert "nothing to list" in run("data", "list").err


def test_other_processes_of_a_run_keep_silent(run, pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    def workflow(**given: Any) -> Any:
        given["listener"].message("said aloud")
        return RUN

    pretend("train", workflow)
    monkeypatch.setenv("LOCAL_RANK", "1")
    outcome = run("train", "--model", "m")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
