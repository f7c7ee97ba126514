from __future__ import annotations

import json
from dataclasses import replace

import torch
from PIL import Image

from tests.methods.masked_nets import tiny_vit
from visionkd.losses.masked import patchify
from visionkd.methods._reconstructions import FILE, write_reconstructions
from visionkd.report.data import ModelRow, ReportData
from visionkd.report.html import render_report
from visionkd.report.reconstruction import read_reconstructions


def written(directory, **changes):
    network = tiny_vit(seed=0, num_classes=0)
    image = torch.rand(2, 3, 32, 32)
    mask = torch.zeros(2, 64)
    mask[:, :32] = 1  # the upper half is removed
    prepared = network.prepare(image)
    given = {
        "prepared": prepared,
        "pred": patchify(prepared, 4),
        "mask": mask,
        "epoch": 3,
        "kept": 32,
        "normalized": True,
    }
    write_reconstructions(directory, network=network, **{**given, **changes})
    return image, directory / FILE


def test_the_rows_are_the_image_what_is_seen_and_what_is_made_of_it(tmp_path):
    image, file = written(tmp_path)
    with Image.open(file) as picture:
        facts = json.loads(picture.text["reconstructions"])
        pixels = torch.tensor(list(picture.convert("RGB").tobytes())).view(96, 64, 3)
    assert facts == {"epoch": 3, "images": 2, "kept": 32, "patches": 64, "normalized": True}
    rows = [pixels[start : start + 32].float() / 255 for start in (0, 32, 64)]
    expected = torch.cat(list(image), dim=2).permute(1, 2, 0)
    assert (rows[0] - expected).abs().max() < 0.01
    assert (rows[1][:16] - 0.5).abs().max() < 0.01 and (rows[1][16:] - expected[16:]).abs().max() < 0.01
    assert (rows[2] - expected).abs().max() < 0.01  # a perfect prediction is the image


def test_the_page_shows_them_and_no_accuracy(tmp_path):
    _, file = written(tmp_path)
    found = read_reconstructions(file)
    assert len(found.strips) == 3 and found.strips[0].pixelated and "32 of 64" in found.caption
    data = ReportData(
        title="t",
        run="r",
        created="c",
        student=ModelRow(name="vit", params_m=1.0),
        pretrained=True,
        reconstructions=file,
    )
    page = render_report(data)
    assert page.count("<img src=") == 3 and "top-1" not in page and "no classifier yet" in page
    assert "Reconstruction" not in render_report(replace(data, reconstructions=None))


def test_a_damaged_picture_is_left_out(tmp_path):
    (tmp_path / FILE).write_bytes(b"x")
    assert read_reconstructions(tmp_path / FILE) is None and read_reconstructions(None) is None
