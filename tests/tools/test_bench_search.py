"""The benchmark of the search: which students it takes, and what it says of scores."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from _search_bench import correlation, students, tables  # noqa: E402

from visionkd.benchmark.complexity import measure_complexity  # noqa: E402
from visionkd.data.shapes import ShapesSource  # noqa: E402
from visionkd.models.factory import create_network  # noqa: E402


@pytest.fixture(scope="module")
def chosen() -> list[students.Student]:
    return students.chosen()


def test_costs_are_those_of_the_networks(chosen):
    for student in (chosen[0], chosen[17], chosen[-1]):
        network = create_network(student.config, num_classes=10, in_training=True)
        found = measure_complexity(network)
        assert (found.params_m, found.macs_g) == pytest.approx((student.params_m, student.macs_g), rel=1e-9)


def test_students_are_distinct_cheap_and_partly_of_equal_cost(chosen):
    assert len({(each.blocks, each.channels) for each in chosen}) == len(chosen) == students.COUNT >= 40
    assert max(each.macs_g for each in chosen) <= students.MOST_MACS_G
    assert max(each.params_m for each in chosen) > 8 * min(each.params_m for each in chosen)
    for name, bands in (("macs_g", students.MACS_BANDS_G), ("params_m", students.PARAMS_BANDS_M)):
        for center, count in bands:
            inside = [each for each in chosen if abs(getattr(each, name) / center - 1) <= students.TOLERANCE]
            assert len(inside) >= count
    assert chosen == students.chosen() != students.chosen(seed=1)


def rows(*values: tuple[float, float, float]) -> list[tables.Row]:
    student = tables.NetworkConfig(name="cifar_resnet")
    return [tables.Row(student, params, macs, top1) for params, macs, top1 in values]


def table(found: list[tables.Row]) -> tables.Table:
    return tables.Table("mine", found, {}, num_classes=10, random_labels=False)


def test_correlations_over_all_and_over_pairs_of_equal_cost():
    # two pairs of equal parameters; the score orders the pairs rightly, and the students of a pair wrongly
    mine = table(rows((1.0, 0.1, 50.0), (1.02, 0.2, 51.0), (2.0, 0.3, 60.0), (2.02, 0.4, 61.0)))
    (row,) = correlation.correlations(mine, [{"s": [2.0, 1.0, 4.0, 3.0]}])
    assert float(row["kendall"]) == pytest.approx(1 / 3, abs=1e-3) and float(row["spearman"]) == pytest.approx(0.6)
    assert row["kendall_equal_params"] == "-1.000" and row["pairs_equal_params"] == 2
    assert row["kendall_equal_macs"] == "nan" and row["pairs_equal_macs"] == 0
    (row,) = correlation.correlations(mine, [{"s": [1.0, 2.0, 3.0, 4.0]}, {"s": [4.0, 3.0, 2.0, 1.0]}])
    assert (row["kendall"], row["kendall_std"], row["seeds"]) == ("0.000", "1.000", 2)


def test_a_winner_keeps_to_its_budget():
    mine = table(rows((1.0, 0.4, 50.0), (2.0, 0.3, 70.0), (3.0, 0.2, 60.0), (4.0, 0.1, 55.0)))
    found = list(correlation.winners(mine, [{"s": [4.0, 1.0, 2.0, 3.0]}]))
    assert [row["limited"] for row in found] == ["params_m"] * 3 + ["macs_g"] * 3
    assert [(row["top1"], row["best_top1"]) for row in found] == [
        ("50.00", "50.00"), ("50.00", "70.00"), ("50.00", "70.00"),
        ("55.00", "55.00"), ("55.00", "60.00"), ("55.00", "70.00"),
    ]  # fmt: skip


def test_every_score_ranks_students_the_same_way_twice(tmp_path):
    file = tmp_path / "own.csv"
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ("blocks", "channels", "params_m", "macs_g", "seed", "top1"))
        writer.writeheader()
        for blocks, seed, top1 in (("1-1-1", 0, 40.0), ("1-1-1", 1, 44.0), ("1-2-1", 0, 45.0)):
            writer.writerow({"blocks": blocks, "channels": "4-8-64", "params_m": 0.1, "macs_g": 0.01, "seed": seed,
                             "top1": top1})  # fmt: skip
    own = tables.own_table(file)
    assert [row.top1 for row in own.rows] == [42.0, 45.0]  # means over seeds
    given = {"teacher": "cifar_resnet56", "seed": 0, "batch": 6}
    source = ShapesSource(0, 12, 32)
    first, seconds = correlation.scored(own, source, init="default", **given)
    again, _ = correlation.scored(own, source, init="default", **given)
    assert first == again and seconds > 0
    assert set(first) == set(correlation.score_names()) and all(len(values) == 2 for values in first.values())
    assert first["diswot"] == pytest.approx(np.add(first["diswot_relation"], first["diswot_semantic"]))
    gaussian, _ = correlation.scored(own, source, init="gaussian", **given)
    assert "synflow" not in gaussian and gaussian["diswot"] != first["diswot"]


def test_the_list_is_shown_without_data():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_search"), "--list"], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == students.COUNT
