"""Kill a run of two stages in the first, between both and in the second: its weights end as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.workflows.masked_runs import ARGS, DECODER, VIT, pretrain, tune
from tests.workflows.test_resume import position, start, status, wait_until, weights

SETTINGS = (
    f"--method g2sd --student {VIT} --no-pretrained --epochs 2 --batch-size 16 -o student.img_size=32"
    " -o data.shapes.num_train=128 -o data.shapes.num_val=32 -o data.workers=0 -o options.generic_epochs=2"
    " -o training.checkpoint_every_s=0 -o optimizer.layer_decay=0.75 -o report.enabled=false"
).split() + ["-o", f"student.args={ARGS}", *(word for option in DECODER for word in ("-o", option))]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teachers")
    first = pretrain(folder / "mae")
    return f"{first},{tune(first, folder / 'tuned')}"


def generic_position(out: Path) -> tuple[int, int]:
    file = out / "checkpoints" / "generic" / "last.ckpt"
    return tuple(torch.load(file, weights_only=True)["position"]) if file.is_file() else (0, 0)


def test_killed_in_both_stages_and_between_them(teachers, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    first = start(whole, "--teacher", teachers, *SETTINGS)
    assert first.wait() == 0, first.stderr.read()
    moments = [
        lambda: generic_position(out) >= (0, 3),  # in the generic stage
        lambda: status(out).get("stage") == "distill",  # behind the boundary, before anything of the next is kept
        lambda: position(out) >= (0, 3),  # in the specific stage
    ]
    process = start(out, "--teacher", teachers, *SETTINGS)
    killed = 0
    for moment in moments:
        if not wait_until(process, moment):
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        process = start(out, "--resume")
    assert process.wait() == 0, process.stderr.read()
    assert killed == 3
    expected, found = weights(whole), weights(out)
    assert expected.keys() == found.keys() and any(name.startswith("head_dist") for name in found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("metrics.csv", "metrics.generic.csv"):
        rows = [[line.split(",")[:3] for line in (run / name).read_text().splitlines()] for run in (whole, out)]
        assert rows[0] == rows[1]
