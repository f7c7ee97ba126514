"""The check of reference vectors passes on what the authors' code gave, and fails on anything else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "tests" / "reference"
#: Methods whose vectors are checked; others in the same directory belong to methods to come.
METHODS = (
    "baseline_cwd",
    "baseline_fgd",
    "baseline_pixel_kd",
    "diswot",
    "dmae",
    "fkd",
    "g2sd",
    "hard",
    "int8_qdq",
    "lad_cwd",
    "lad_kd_variants",
    "lad_label_noising",
    "lad_student_objective",
    "lad_teacher_objective",
    "meal_v2",
    "oadp_asymmetric_loss",
    "oadp_blocks",
    "oadp_box_expand",
    "oadp_calibration",
    "oadp_classifier",
    "oadp_distill_losses",
    "oadp_loss_schedule",
    "oadp_obj_attention",
    "oadp_pseudo_labels",
    "ofa_loss",
    "ofa_projector",
    "ofa_step",
    "quantized_distillation",
    "ssld",
)
WHOLE = Path(os.environ.get("VISIONKD_REFERENCE", ROOT.parent / "shared" / "reference"))


def check(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_reference"), str(directory), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(COPY, tmp_path / "vectors"))


def rewrite(directory: Path, name: str, change) -> None:
    with np.load(directory / f"{name}.npz") as arrays:
        values = {key: np.array(value) for key, value in arrays.items()}
    content = json.loads((directory / f"{name}.json").read_text())
    change(content, values)
    np.savez(directory / f"{name}.npz", **values)
    (directory / f"{name}.json").write_text(json.dumps(content))


def test_all_vectors_pass() -> None:
    result = check(COPY)
    cases = sum(len(json.loads(path.read_text())["cases"]) for path in COPY.glob("*.json"))
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert len(lines) == cases + 1 and lines[-1] == f"{cases} cases: {cases} ok, 0 failed, 0 of unknown kind"
    assert {line.split()[1].split("/")[0] for line in lines[:-1]} == set(METHODS)


@pytest.mark.skipif(not WHOLE.is_dir(), reason=f"no vectors in {WHOLE}; VISIONKD_REFERENCE names others")
def test_the_whole_set_passes() -> None:
    result = check(WHOLE, "--only", ",".join(METHODS))
    assert result.returncode == 0, result.stdout


def test_a_wrong_value_a_wrong_gradient_and_an_unknown_kind_fail(copy: Path) -> None:
    def wrong(content, values):
        first, second = (case["case"] for case in content["cases"][:2])
        values[f"{first}/loss"] = values[f"{first}/loss"] * 1.001
        values[f"{second}/grad_student_logits"] = -values[f"{second}/grad_student_logits"]
        content["cases"].append({**content["cases"][0], "case": "new", "produced_by": "x.py: f", "arrays": {"a": {}}})
        values["new/a"] = np.zeros(3)

    rewrite(copy, "ofa_loss", wrong)
    result = check(copy, "--only", "ofa_loss")
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert lines[0].startswith("FAILED") and "loss" in lines[0]
    assert lines[1].startswith("FAILED") and "grad_student_logits" in lines[1]
    assert lines[-2].startswith("unknown") and "2 failed, 1 of unknown kind" in lines[-1]


def test_small_gradients_are_judged_in_their_own_scale(copy: Path) -> None:
    def wrong(content, values):
        case = content["cases"][0]["case"]
        values[f"{case}/grad_student"] = values[f"{case}/grad_student"] * 1e-3

    rewrite(copy, "baseline_pixel_kd", wrong)
    result = check(copy, "--only", "baseline_pixel_kd")
    assert result.returncode == 1 and "grad_student" in result.stdout.splitlines()[0]
    assert "1 failed" in result.stdout.splitlines()[-1]


def test_cases_are_known_by_their_kind_not_by_their_name(copy: Path) -> None:
    for name in METHODS:

        def renamed(content, values):
            for number, case in enumerate(content["cases"]):
                old, case["case"] = case["case"], f"other_{number}"
                for array in case["arrays"]:
                    values[f"other_{number}/{array}"] = values.pop(f"{old}/{array}")

        rewrite(copy, name, renamed)
        for suffix in ("json", "npz"):
            (copy / f"{name}.{suffix}").rename(copy / f"renamed_{name}.{suffix}")
    assert check(copy).returncode == 0


def test_a_directory_without_vectors_is_told(tmp_path: Path) -> None:
    result = check(tmp_path)
    assert result.returncode == 2 and "no <name>.json" in result.stderr
    (tmp_path / "a.json").write_text('{"cases": [{"case": "x", "arrays": {"y": {}}}]}')
    assert check(tmp_path).returncode == 2
