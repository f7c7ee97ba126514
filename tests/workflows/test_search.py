from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from visionkd import workflows
from visionkd.cli.main import cli
from visionkd.config.schema import DistillConfig, NetworkConfig
from visionkd.errors import InterruptedRunError, RequestError, WorkError
from visionkd.models.factory import create_network
from visionkd.workflows import _search_files, _search_latency
from visionkd.workflows._request import build_config
from visionkd.workflows._search_cost import Cost, training_cost

DATA = ("data.shapes.num_train=64", "data.shapes.num_val=16", "data.workers=0")
SPACE = """
network: cifar_resnet
args:
  blocks.0: [1, 2]
  blocks.1: [1, 2]
  blocks.2: [1, 0]
  channels.0: [4, 8]
  channels.1: [8]
  channels.2: [64]
"""
REQUEST = {
    "teacher": "cifar_resnet8",
    "options": DATA,
    "evaluations": 12,
    "batch_size": 8,
    "strategy": "evolution",
    "population": 4,
    "tournament": 2,
}


@pytest.fixture
def space(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(SPACE)
    return str(file)


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "candidates.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ranks(run: Path) -> list[tuple[str, str, str]]:
    return [(row["rank"], row["candidate"], row["score"]) for row in table(run)]


def test_a_search_leaves_table_picture_and_command(tmp_path: Path, space: str) -> None:
    result = workflows.search(**REQUEST, space=space, budget="params_m=0.066", out=str(tmp_path / "run"), seed=3)
    assert set(result.files) == {"state", "candidates", "pareto"} and result.strategy == "evolution"
    rows = table(result.run)
    by_status = {status: [row for row in rows if row["status"] == status] for status in ("scored", "failed")}
    assert len(by_status["scored"]) == result.num_scored > 0
    assert all(float(row["params_m"]) <= 0.066 and float(row["macs_g"]) > 0 for row in by_status["scored"])
    assert len(by_status["failed"]) == result.num_failed > 0
    assert all("[" in row["reason"] and not row["score"] for row in by_status["failed"]), "blocks of 0 are no network"
    assert [row["score"] for row in by_status["scored"]] == sorted(
        (row["score"] for row in by_status["scored"]), key=float, reverse=True
    )
    best = result.table[0]
    assert best.model == rows[0]["candidate"] and best.values["score"] == pytest.approx(float(rows[0]["score"]))
    assert ElementTree.fromstring((result.run / "pareto.svg").read_text()).tag.endswith("svg")
    assert json.loads((result.run / "search.json").read_text())["command"] == result.command
    status = json.loads((result.run / "status.json").read_text())
    assert status["state"] == "done"
    assert any(
        re.search(r"Scoring took .* training .* 1,280 images would take .* as long", m) for _, m in status["messages"]
    )


def test_the_command_is_the_winner(tmp_path: Path, space: str) -> None:
    result = workflows.search(**REQUEST, space=space, out=str(tmp_path / "run"), seed=3)
    words = shlex.split(result.command)
    assert words[:2] == ["visionkd", "distill"]
    given = cli.get_command(None, "distill").make_context("distill", words[2:]).params
    assert given["teacher"] == ("cifar_resnet8",) and given["seed"] == 3
    overrides = {"teachers": [{"name": "cifar_resnet8"}], "student.name": given["student"]}
    config = build_config(
        DistillConfig, config=None, options=given["options"], overrides=overrides, out=None, resume=False
    )
    assert config.student.model_dump() == result.student
    assert config.student.args["blocks"][2] == 1 and config.data.shapes.num_train == 64


def test_the_seed_decides_the_ranking(tmp_path: Path, space: str) -> None:
    runs = [
        workflows.search(**REQUEST, space=space, out=str(tmp_path / str(number)), seed=seed).run
        for number, seed in enumerate((0, 0, 1))
    ]
    assert ranks(runs[0]) == ranks(runs[1]) != ranks(runs[2])


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path: Path, space: str) -> None:
    runs = [workflows.search(**REQUEST, space=space, out=str(tmp_path / str(n)), workers=n).run for n in (1, 2)]
    assert ranks(runs[0]) == ranks(runs[1])


def test_a_killed_search_resumes_to_the_same_ranking(tmp_path: Path, space: str, monkeypatch) -> None:
    whole = workflows.search(**REQUEST, space=space, out=str(tmp_path / "whole"))
    genuine, calls = _search_files.write_text, []

    def dies(path, content):
        genuine(path, content)
        calls.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(_search_files, "write_text", dies)
    with pytest.raises(InterruptedRunError, match="Interrupted after 8 of 12 evaluations") as stopped:
        workflows.search(**REQUEST, space=space, out=str(tmp_path / "killed"))
    assert stopped.value.hint == f"Continue with --resume --out {tmp_path / 'killed'}"
    monkeypatch.setattr(_search_files, "write_text", genuine)
    assert len(calls) == 1 and not (tmp_path / "killed" / "candidates.csv").exists()
    resumed = workflows.search(resume=True, out=str(tmp_path / "killed"))
    assert ranks(resumed.run) == ranks(whole.run)
    with pytest.raises(RequestError, match="score"):
        workflows.search(resume=True, score="params", out=str(tmp_path / "killed"))
    more = workflows.search(resume=True, evaluations=14, out=str(tmp_path / "killed"))
    assert more.num_scored + more.num_failed == 14


def test_latency_is_measured_where_it_is_limited(tmp_path: Path) -> None:
    few = {**REQUEST, "evaluations": 2, "strategy": "random", "seed": 1}
    file = tmp_path / "sound.yaml"
    file.write_text(SPACE.replace("[1, 0]", "[1]"))
    space = str(file)
    result = workflows.search(**few, space=space, budget={"latency_ms": 1e4}, out=str(tmp_path / "a"))
    assert result.table[0].values["latency_ms"] > 0
    assert (tmp_path / "a" / "config.yaml").read_text().count("backend: torch") == 1
    with pytest.raises(WorkError, match="None of .* latency_ms"):
        workflows.search(**few, space=space, budget={"latency_ms": 1e-6}, out=str(tmp_path / "b"))


def test_latency_in_int8_is_that_of_a_quantised_candidate(tmp_path: Path, monkeypatch) -> None:
    files: list[bytes] = []
    original = _search_latency.ort_runner
    monkeypatch.setattr(
        _search_latency, "ort_runner", lambda file, **rest: files.append(file.read_bytes()) or original(file, **rest)
    )
    student = create_network(NetworkConfig(name="cifar_resnet8", pretrained=False), num_classes=4, in_training=True)
    for backend in ("onnxruntime", "onnxruntime-int8"):
        assert _search_latency.latency_ms(student, backend, torch.rand(8, 3, 24, 24)) > 0
    assert b"QuantizeLinear" not in files[0] and b"QuantizeLinear" in files[1]
    assert len(files[1]) < 0.5 * len(files[0])


def test_no_accuracy_is_read(tmp_path: Path, teacher_run: Path, space: str) -> None:
    """Whatever the teacher is said to reach, and without a look at any recorded table."""
    opened: list[str] = []
    watching = True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    rankings = []
    for number, top1 in enumerate((10.0, 99.0)):
        card = teacher_run / "model" / "model.json"
        before = card.read_text()
        values = json.loads(before)
        values["metrics"] = {**values.get("metrics", {}), "val/top1": top1}
        card.write_text(json.dumps(values))
        try:
            request = {**REQUEST, "teacher": str(teacher_run)}
            rankings.append(ranks(workflows.search(**request, space=space, out=str(tmp_path / str(number))).run))
        finally:
            card.write_text(before)
    watching = False
    assert rankings[0] == rankings[1]
    assert any("candidates.csv" in name for name in opened), "the watch works"
    forbidden = ("zoo/results", "tests/reference", "s0_table", "metrics.csv", "results.md", ".npz")
    assert not [name for name in opened if any(word in name for word in forbidden)]


def test_it_goes_on_to_distil(tmp_path: Path, teacher_run: Path, space: str) -> None:
    # not channels-last, in which PyTorch 2.14's gradient of a strided 1x1 convolution of less than 8 channels corrupts
    # memory on x86 processors without AVX-512
    options = (
        *DATA, "training.epochs=1", "training.batch_size=32", "training.channels_last=false", "report.enabled=false"
    )  # fmt: skip
    few = {**REQUEST, "evaluations": 2, "strategy": "random", "seed": 1, "options": options}
    with pytest.raises(RequestError, match="no published weights"):
        workflows.search(**few, space=space, distill=True, out=str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()
    few["teacher"] = str(teacher_run)
    result = workflows.search(**few, space=space, img_size=32, distill=True, out=str(tmp_path / "run"))
    assert result.distilled.run == tmp_path / "run" / "distill"
    card = json.loads((result.distilled.run / "model" / "model.json").read_text())
    assert card["model_args"]["blocks"] == result.student["args"]["blocks"]


def test_everything_wrong_is_listed() -> None:
    with pytest.raises(RequestError) as error:
        workflows.search(space="vot", budget="x=1", score="diswat", backend="onnxruntime_int8", evaluations=0)
    said = str(error.value)
    for part in ("--teacher", "'vit'", "params_m", "'diswot'", "onnxruntime-int8", "--evaluations"):
        assert part in said
    with pytest.raises(RequestError, match="--teacher"):
        workflows.search(teacher="resnet5O", space="vit", data="shapes")
    with pytest.raises(RequestError, match="holds no"):
        workflows.search(resume=True, out="nowhere")


def test_what_scoring_costs_beside_training_is_said() -> None:
    assert str(Cost(0.25, 900.0, 1_000_000)) == (
        "Scoring took 0.25 s a candidate; training the best one for 1,000,000 images would take 15 min on this machine,"
        " 3,600 times as long (from the time of a step, without the teacher)"
    )
    student = create_network(NetworkConfig(name="cifar_resnet8", pretrained=False), num_classes=4, in_training=True)
    found = training_cost(student, torch.rand(4, 3, 32, 32), torch.arange(4), images=4000, scored_s=0.1)
    twice = training_cost(student, torch.rand(4, 3, 32, 32), torch.arange(4), images=8000, scored_s=0.1)
    assert 0 < found.trained_s < twice.trained_s * 1.5 and found.images == 4000
