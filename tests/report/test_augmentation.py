from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from report_sample import distilled_run

from visionkd.methods._augmentation_pictures import Pictures
from visionkd.methods._optimizer import Budget
from visionkd.report.augmentation import parameter_rows, read_moments, strips, turn_pictures
from visionkd.report.data import Curves
from visionkd.report.html import render_report


@pytest.fixture
def kept(tmp_path):
    """The folder of a run whose augmentor darkened its images."""
    pictures = Pictures(Budget(steps_per_epoch=10, epochs=2))
    image = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    pictures.keep(image)
    for step, dark, answers in ((0, 1.0, [1, 2, 3]), (20, 0.5, [1, 0, 0])):
        learned = {"brightness, %": {"mean": 100 * (dark - 1), "std": 2.0}, "image, % of the mixture": {"mean": 95.0}}
        pictures.write(tmp_path, step, image * dark, {"parameters": learned, "student": answers, "teacher": [1, 2, 3]})
    return tmp_path / "augmentations"


def curves() -> Curves:
    rows = []
    for step in range(5, 45, 5):
        turn = step % 20 >= 10
        row = {
            "epoch": 1 + (step > 20),
            "step": step,
            "split": "train",
            "agreement": 0.8,
            "augmentor_steps": float(turn),
        }
        row |= {"disagreement": 0.4, "teacher_consistency": 0.1} if turn else {"clean_agreement": 0.9}
        rows.append(row)
    return Curves.from_rows(rows)


def test_moments_are_what_was_kept(kept):
    first, last = read_moments(kept)
    assert (first.epoch, last.epoch) == (0.0, 2.0) and first.count == 3
    assert first.clean.size == first.augmented.size == (90, 20)
    clean, dark = np.asarray(last.clean, dtype=float), np.asarray(last.augmented, dtype=float)
    assert np.abs(dark - clean / 2).max() <= 1.0
    assert np.array_equal(np.asarray(first.clean), np.asarray(last.clean))
    assert last.student == (1, 0, 0)


def test_damaged_and_foreign_files_are_left_out(kept):
    (kept / "step_0000005.png").write_bytes(b"not a picture")
    whole = (kept / "step_0000020.png").read_bytes()
    (kept / "step_0000006.png").write_bytes(whole[: len(whole) // 2])
    from PIL import Image

    Image.new("RGB", (10, 10)).save(kept / "step_0000007.png")
    assert [moment.epoch for moment in read_moments(kept)] == [0.0, 2.0]
    assert read_moments(kept / "missing") == ()


def test_strips_say_when_and_who_agrees(kept):
    rows = strips(read_moments(kept))
    assert [row.title for row in rows] == ["Clean", "Epoch 0", "Epoch 2"]
    assert rows[1].note == "both agree on 3 of 3" and rows[2].note == "both agree on 1 of 3"
    assert all(row.image.startswith("data:image/") and row.pixelated for row in rows)


def test_parameters_of_the_start_and_the_end(kept):
    rows = parameter_rows(read_moments(kept))
    assert rows[0] == ("brightness, %", "0.0 ±\u00a02.0", "\u221250.0 ±\u00a02.0")
    assert rows[1] == ("image, % of the mixture", "95.0", "95.0")


def test_turns_are_drawn_where_there_were_any():
    pictures = turn_pictures(curves())
    assert [picture.title.split(",")[0] for picture in pictures] == [
        "Agreement with the teacher",
        "Divergence in the augmentor's turns",
        "The augmentor's share of the steps",
    ]
    assert turn_pictures(None) == [] and turn_pictures(distilled_run().curves) == []


def test_the_page_shows_it_only_for_a_run_that_learned_one(kept):
    text = render_report(distilled_run(augmentation=kept, curves=curves()))
    assert 'id="augmentation"' in text and 'href="#augmentation"' in text
    section = text[text.index('<section id="augmentation">') :]
    section = section[: section.index("</section>")]
    assert len(re.findall("<img ", section)) == 3 and section.count("<svg") == 3
    assert 'id="augmentation"' not in render_report(distilled_run())
