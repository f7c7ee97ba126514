from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_sample import curves, distilled_run, evaluation, supervised_run

from visionkd.errors import DataError, UnreadableImageError
from visionkd.report.data import Curves, Evaluation, ExportRow, ModelRow, ReportData
from visionkd.report.html import render_report

EVIL = "<script>alert(1)</script>"
SECTIONS = [
    "result",
    "cost",
    "curves",
    "classes",
    "confusion",
    "errors",
    "agreement",
    "calibration",
    "method",
    "exports",
    "messages",
    "provenance",
]
VOID = {"meta", "img", "br", "link", "path", "use", "rect", "image"}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        self.images += [values["src"]] if tag == "img" else []
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text.append(data)


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", "".join(page.text).replace("\u00a0", " "))


def test_full_report_has_every_section_and_a_link_to_each():
    page = Page(render_report(distilled_run()))
    for section in SECTIONS:
        assert section in page.ids
        assert f"#{section}" in page.links


def test_page_is_self_contained_and_ids_are_unique():
    html = render_report(distilled_run(200, 10))
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.search(r"url\((?!#)", html)
    assert "script" not in page.tags and "link" not in page.tags


def test_same_input_gives_the_same_page():
    assert render_report(distilled_run()) == render_report(distilled_run())


def test_untrusted_text_is_never_markup():
    data = distilled_run(
        title=EVIL,
        run=EVIL,
        command=EVIL,
        data=EVIL,
        method=EVIL,
        options={EVIL: EVIL},
        environment={EVIL: {EVIL: EVIL}},
        config=f"</pre>{EVIL}",
        messages=((EVIL, EVIL),),
        preflight=((EVIL, EVIL),),
        skipped=((EVIL, EVIL),),
        exports=(ExportRow(EVIL, EVIL),),
        classes=(EVIL, '"><img src=x onerror=alert(1)>', "$5_note^{", "a\x00\x1b[31m\u202eb", "#0a0b01"),
        student=ModelRow(EVIL, params_m=1.0, latency_ms={EVIL: 1.0}),
        teachers=(ModelRow(EVIL, top1=90.0, params_m=9.0, latency_ms={EVIL: 9.0}),),
    )
    names = tuple(f'{EVIL}" onload="alert(1)' for _ in range(len(data.evaluation)))
    old = data.evaluation
    data = ReportData(
        **{**vars(data), "evaluation": Evaluation(old.targets, old.student_probs, old.teacher_probs, None, names)}
    )
    html = render_report(data)
    page = Page(html)
    assert "script" not in page.tags
    assert all(image.startswith("data:image/") for image in page.images)
    assert "\x00" not in html and "\x1b" not in html and "\u202e" not in html
    assert EVIL in words(page)
    assert "#0a0b01" in words(page)  # a class named like a marker colour stays as it is


def test_supervised_run_speaks_of_no_student_and_no_teacher():
    page = Page(render_report(supervised_run(command="visionkd train --model cifar_resnet20")))
    assert {"result", "curves", "classes", "confusion", "errors", "calibration"} <= set(page.ids)
    assert not {"agreement", "cost", "method"} & set(page.ids)
    assert not {"student", "teacher", "baseline"} & set(re.findall(r"\w+", words(page).lower()))


@pytest.mark.parametrize("num_classes", [2, 30, 31, 1000])
def test_any_number_of_classes(num_classes):
    data = distilled_run(400, num_classes)
    page = Page(render_report(data))
    text = words(page)
    assert ("most frequent mistakes" in text) == (num_classes > 30)
    assert ("worst of" in text) == (num_classes > 30)
    assert ("top-5, %" in text) == (num_classes > 5)
    assert "agreement" in page.ids


def test_report_of_a_run_that_has_only_begun():
    page = Page(render_report(ReportData(title="t", run="r", created="now", student=ModelRow("resnet18"))))
    assert [name for name in page.ids if name in SECTIONS] == ["result"]
    assert "was not measured" in words(page)


def test_empty_evaluation():
    empty = Evaluation(np.zeros(0, dtype=np.int64), np.zeros((0, 5), dtype=np.float32))
    page = Page(render_report(distilled_run(evaluation=empty)))
    assert "classes" not in page.ids


def test_everything_right_means_no_errors_and_a_clean_matrix():
    targets = np.arange(40) % 4
    page = Page(
        render_report(
            supervised_run(
                evaluation=Evaluation(targets, np.eye(4, dtype=np.float32)[targets]), classes=("a", "b", "c", "d")
            )
        )
    )
    assert "errors" not in page.ids and "confusion" in page.ids
    assert "100.00 % top-1" in words(page)


def test_probabilities_that_are_not_finite_do_not_stop_the_report():
    data = distilled_run()
    data.evaluation.student_probs[:3] = np.nan
    assert "NaN" not in render_report(data) and "nan" not in words(Page(render_report(data)))


def test_accuracies_are_measured_where_rows_have_none_and_kept_where_they_have():
    data = distilled_run(student=ModelRow("s", top1=12.34, params_m=1.0))
    text = words(Page(render_report(data)))
    assert "12.34" in text
    expected = 100 * (data.evaluation.teacher_probs.argmax(1) == data.evaluation.targets).mean()
    assert f"{expected:.2f}" in text


def test_several_teachers_have_a_row_each():
    text = words(
        Page(
            render_report(
                distilled_run(
                    teachers=(
                        ModelRow("first_net", top1=91.0, params_m=5.0),
                        ModelRow("second_net", top1=93.0, params_m=9.0),
                    )
                )
            )
        )
    )
    assert "first_net" in text and "second_net" in text and "the best teacher" in text


def test_error_pictures_are_small_and_the_surest_come_first():
    data = distilled_run(300, 5, thumbnail=lambda index: Image.new("RGB", (1600, 900), (index % 255, 0, 0)))
    page = Page(render_report(data))
    assert len(page.images) == 24
    assert max(map(len, page.images)) < 20_000
    shown = [float(value) for value in re.findall(r"student class_\d ([\d.]+) %", words(page))]
    assert len(shown) == 24 and shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("error", [UnreadableImageError("gone"), FileNotFoundError("gone"), ValueError("bad")])
def test_picture_that_cannot_be_read_leaves_its_words(error):
    def thumbnail(index: int) -> Image.Image:
        raise error

    page = Page(render_report(distilled_run(thumbnail=thumbnail)))
    assert page.images == [] and "no picture" in words(page)


def test_light_and_dark_share_the_pictures():
    html = render_report(distilled_run())
    assert "prefers-color-scheme: dark" in html
    body = html[html.index("</style>") :]
    assert "var(--student)" in body and "var(--ink)" in body
    # No colour of matplotlib's own is left: only white figures on dark cells of the matrix.
    assert set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r'href="[^"]*"', "", body))) <= {"#ffffff"}


def test_evaluation_that_does_not_fit_is_refused():
    good = evaluation()
    with pytest.raises(DataError, match="teacher_probs"):
        Evaluation(good.targets, good.student_probs, good.student_probs[:, :3])
    with pytest.raises(DataError, match="targets"):
        Evaluation(good.targets[:-1], good.student_probs)
    with pytest.raises(DataError, match="outside"):
        Evaluation(good.targets + 1, good.student_probs)
    with pytest.raises(DataError, match="names"):
        Evaluation(good.targets, good.student_probs, names=("one",))
    with pytest.raises(DataError, match="5 classes"):
        distilled_run(classes=("a", "b"))


def test_curves_read_from_csv(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,split,loss,top1,kd_loss\n1,5,train,2.0,,4\n1,10,train,1.5,40,\n1,10,val,1.2,50,\n"
        "2,15,train,9,,\n2,15,train,1.0,,\n2,20,val,nan,55\n2,2",
        encoding="utf-8",
    )
    read = Curves.read(path)
    assert read.get("loss", "train").epochs.tolist() == [0.5, 1.0, 2.0]
    assert read.get("loss", "train").values.tolist() == [2.0, 1.5, 1.0]  # a resumed run's row replaces the older one
    assert read.get("loss", "val").values.tolist() == [1.2]
    assert read.get("top1", "val").values.tolist() == [50.0, 55.0]
    assert read.get("kd_loss", "val") is None
    with pytest.raises(DataError, match="absent.csv"):
        Curves.read(tmp_path / "absent.csv")


def test_rows_are_placed_in_their_epoch_by_step():
    steps = [(1, 50), (1, 100), (1, 200), (2, 250), (2, 400), (4, 600), (4, 800)]
    rows = [{"epoch": epoch, "step": step, "split": "train", "loss": 1} for epoch, step in steps]
    assert Curves.from_rows(rows).get("loss", "train").epochs.tolist() == [0.25, 0.5, 1.0, 1.25, 2.0, 3.75, 4.0]
    even = [{"epoch": 1, "step": "", "split": "train", "loss": 1}]
    assert Curves.from_rows(even).get("loss", "train").epochs.tolist() == [1.0]


def test_epochs_counted_from_zero_are_moved():
    rows = [
        {"epoch": epoch, "step": epoch, "split": split, "top1": 1.0} for epoch in range(3) for split in ("train", "val")
    ]
    assert Curves.from_rows(rows).get("top1", "val").epochs.tolist() == [1.0, 2.0, 3.0]


def test_long_curves_stay_small():
    short, long = (
        len(render_report(supervised_run(curves=curves(rows_per_epoch=rows, distilled=False), evaluation=None)))
        for rows in (10, 400)
    )
    assert long < 2 * short
