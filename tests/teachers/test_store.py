from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.teachers.label_store_help import held, labels_for, open_store, put
from visionkd.errors import RequestError, WorkError
from visionkd.teachers import _shards
from visionkd.teachers._manifest import differences
from visionkd.teachers.store import estimate_bytes, nearest_store, store_path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "_SHARD_ROWS", 16)


def test_full_labels_come_back_bit_for_bit(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
        probs = labels_for(order.tolist(), 3)
        returned = store.write(order, 3, probs)
        assert not store.read(order, 3).present.any(), "nothing is there before it is committed"
        assert store.commit() == 100
        found = store.read(order, 3)
        assert found.complete and found.present.all() and len(found) == 100
        for labels in (returned, found):
            assert torch.equal(labels.dense(), probs) and labels.dense().dtype == torch.float32
        assert store.bytes_per_label == 28 and store.views == (3,)
    with open_store(tmp_path / "s", read_only=True) as again:
        assert held(again, 3) == list(range(100))


def test_top_k_labels_keep_the_classes_exactly_and_the_values_in_half_precision(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", samples=50, classes=1000, storage="top_k", top_k=10) as store:
        index = torch.arange(50)
        probs = labels_for(range(50), 0, classes=1000)
        returned = store.write(index, 0, probs)
        store.commit()
        found = store.read(index.flip(0), 0)
        values, classes = probs.flip(0).topk(10, dim=1)
        assert torch.equal(found.indices, classes) and found.indices.dtype == torch.int64
        assert torch.equal(found.values, values.half().float())
        torch.testing.assert_close(found.rest, 1 - values.sum(1), rtol=1e-3, atol=0)
        assert torch.equal(found.dense(), returned.dense().flip(0)), "a resumed run sees what the first one saw"
        for rest in ("uniform", "renormalize"):
            torch.testing.assert_close(found.dense(rest).sum(1), torch.ones(50), rtol=0, atol=1e-6)
        assert store.bytes_per_label <= 44


@pytest.mark.parametrize(("classes", "kept", "row_bytes"), [(1000, 10, 42), (65_536, 10, 42), (70_000, 10, 62)])
def test_bytes_and_classes_of_large_heads(tmp_path: Path, classes: int, kept: int, row_bytes: int) -> None:
    probs = torch.full((2, classes), 0.1 / (classes - 1))
    probs[0, classes - 1] = probs[1, 0] = 0.9
    with open_store(tmp_path / "s", samples=3, classes=classes, storage="top_k", top_k=kept) as store:
        store.write(torch.tensor([2, 0]), 0, probs / probs.sum(1, keepdim=True))
        store.commit()
        assert store.bytes_per_label == row_bytes
        assert store.read(torch.tensor([0, 2]), 0).dense().argmax(1).tolist() == [0, classes - 1]


def test_a_full_row_larger_than_most_shards(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", samples=300, classes=70_000) as store:
        assert store.manifest.shard_rows == 128
        probs = torch.zeros(1, 70_000)
        probs[0, 69_999] = 1.0
        store.write(torch.tensor([299]), 0, probs)
        store.commit()
        assert torch.equal(store.read(torch.tensor([299]), 0).dense(), probs) and store.count(0) == 1


def test_more_classes_than_there_are_are_all(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", classes=3, storage="top_k", top_k=10) as store:
        probs = labels_for([4], 0, classes=3)
        torch.testing.assert_close(store.write(torch.tensor([4]), 0, probs).dense(), probs, rtol=0, atol=1e-3)


def test_several_views_in_one_batch_in_any_order_and_repeated(tmp_path: Path, small_shards: None) -> None:
    with open_store(tmp_path / "s", samples=50) as store:
        for view in (0, 2, 9):
            put(store, range(50), view)
        store.commit()
        assert store.views == (0, 2, 9) and len(list((tmp_path / "s").glob("*.shard"))) == 12
        index = torch.tensor([49, 0, 17, 49, 49, 16, 15])
        view = torch.tensor([0, 9, 2, 0, 9, 1, 9])
        labels = store.read(index, view)
        assert labels.present.tolist() == [True] * 5 + [False, True] and not labels.complete
        for row, (i, v, there) in enumerate(zip(index.tolist(), view.tolist(), labels.present.tolist(), strict=True)):
            assert not there or torch.equal(labels.dense()[row], labels_for([i], v)[0])
        assert labels.dense()[5].isnan().all(), "a label that is not there cannot be trained on unseen"
        store.write(index[:2], torch.tensor([5, 6]), labels_for([1, 2], 0))
        store.commit()
        assert [store.count(v) for v in (0, 5, 6, 7)] == [50, 1, 1, 0]


@pytest.mark.parametrize("storage", ["full", "top_k"])
def test_nothing_is_there_in_a_new_store(tmp_path: Path, storage: str) -> None:
    with open_store(tmp_path / "s", storage=storage, top_k=3) as store:
        labels = store.read(torch.tensor([5, 99]), torch.tensor([0, 1]))
        assert not labels.present.any() and not labels.complete and labels.dense().isnan().all()
        assert len(store.missing(0)) == 100 and store.count(0) == store.nbytes == 0
        nothing = store.read(torch.zeros(0, dtype=torch.int64), 0)
        assert len(nothing) == 0 and nothing.complete and nothing.dense().shape == (0, 7)
        store.write(torch.zeros(0, dtype=torch.int64), 0, torch.zeros(0, 7))
        assert store.commit() == 0


def test_a_pass_that_leaves_samples_out_leaves_them_missing(tmp_path: Path, small_shards: None) -> None:
    with open_store(tmp_path / "s", samples=37) as store:  # 37 is no multiple of 16
        put(store, [i for i in range(37) if i not in (0, 15, 16, 36)])
        store.commit()
        assert store.missing(0).tolist() == [0, 15, 16, 36]
        put(store, [15, 36])
        store.commit()
        assert store.missing(0).tolist() == [0, 16] and held(store) == [i for i in range(37) if i not in (0, 16)]


def test_labels_move_to_a_device_before_they_are_spread_out(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", storage="top_k", top_k=3) as store:
        labels = store.write(torch.arange(4), 0, labels_for(range(4), 0))
        moved = labels.to("meta")
        assert moved.dense().device.type == "meta" and moved.present.device.type == "meta"
        assert torch.equal(labels.to("cpu", non_blocking=True).dense(), labels.dense())


def test_wrong_places_and_labels_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        one = labels_for([0], 0)
        for index, view in (([100], 0), ([-1], 0), ([0], -1)):
            with pytest.raises(IndexError):
                store.read(torch.tensor(index), view)
            with pytest.raises(IndexError):
                store.write(torch.tensor(index), view, one)
        with pytest.raises(ValueError, match="7 classes"):
            store.write(torch.tensor([0]), 0, torch.ones(1, 6))
        with pytest.raises(ValueError, match="1 labels for 2"):
            store.write(torch.tensor([0, 1]), 0, one)
        bad = torch.cat([one, one])
        bad[1, 4] = float("nan")
        with pytest.raises(WorkError, match="1 of 2 images"):
            store.write(torch.tensor([0, 1]), 0, bad)
        assert store.commit() == 0


def test_a_top_k_store_refuses_what_is_not_finite(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", storage="top_k", top_k=2) as store, pytest.raises(WorkError, match="not finite"):
        store.write(torch.tensor([0]), 0, torch.tensor([[float("nan")] + [0.1] * 6]))


def test_a_store_that_is_read_only_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no label store"):
        open_store(tmp_path / "s", read_only=True)
    assert not (tmp_path / "s").exists()
    with open_store(tmp_path / "s") as store:
        put(store, [1, 2])
    before = sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(tmp_path / "s"))
    with open_store(tmp_path / "s", read_only=True) as store:
        assert store.count(0) == 0, "what was not committed waits for one who may write"
        with pytest.raises(ValueError, match="reading only"):
            put(store, [1])
        with pytest.raises(ValueError, match="reading only"):
            store.commit()
    assert before == sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(tmp_path / "s"))


def test_what_was_closed_without_a_commit_is_there_the_next_time(tmp_path: Path) -> None:
    said: list[str] = []
    with open_store(tmp_path / "s") as store:
        put(store, [1, 2])
        put(store, [2, 3])
    with open_store(tmp_path / "s", on_message=lambda text, level="info": said.append(text)) as store:
        assert held(store) == [1, 2, 3]
    assert len(said) == 1 and "4 labels" in said[0] and str(tmp_path / "s") in said[0]
    assert {entry.name for entry in os.scandir(tmp_path / "s")} == {".lock", "manifest.json", "v00000-00000.shard"}


def test_many_shards_keep_no_files_open(tmp_path: Path, small_shards: None) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("counts files through /proc")
    with open_store(tmp_path / "s", samples=200) as store:
        for view in range(8):
            put(store, range(200), view)
        store.commit()
        before = len(os.listdir("/proc/self/fd"))
        for view in range(8):
            assert store.read(torch.arange(200), view).complete
        assert len(os.listdir("/proc/self/fd")) == before


class TestKey:
    def test_each_part_that_differs_is_named_with_both_values(self, tmp_path: Path) -> None:
        key = {
            "teachers": [{"weights": "a" * 64, "input": {"img_size": [224, 224]}}],
            "data": {"fingerprint": "f1"},
            "augment": {"scale": (0.08, 1.0), "flip": True, "crop": "resized"},
            "versions": {"torchvision": "0.23", "torch": "2.8"},
        }
        open_store(tmp_path / "s", key=key).close()
        other = json.loads(json.dumps(key))
        other["teachers"][0]["weights"] = "b" * 64
        other["teachers"].append({"weights": "c"})
        other["augment"].update(scale=[0.2, 1.0], flip=1, crop=None)
        other["versions"]["torchvision"] = "0.24"
        del other["versions"]["torch"]
        with pytest.raises(RequestError) as caught:
            open_store(tmp_path / "s", key=other)
        assert {problem.key: problem.message for problem in caught.value.problems[1:]} == {
            "teachers.0.weights": "the store has aaaaaaaaaaaaaaaa..., this run bbbbbbbbbbbbbbbb...",
            "teachers.1.weights": "the store has nothing, this run c",
            "augment.scale": "the store has [0.08, 1.0], this run [0.2, 1.0]",
            "augment.flip": "the store has true, this run 1",
            "augment.crop": "the store has resized, this run none",
            "versions.torchvision": "the store has 0.23, this run 0.24",
            "versions.torch": "the store has 2.8, this run nothing",
        }
        assert str(tmp_path / "s") in caught.value.problems[0].message
        assert caught.value.hint is not None and "--no-cache-teacher" in caught.value.hint

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"samples": 101}, "num_samples"),
            ({"classes": 8}, "num_classes"),
            ({"storage": "full"}, "storage"),
            ({"top_k": 4}, "top_k"),
        ],
    )
    @pytest.mark.parametrize("read_only", [False, True])
    def test_the_form_is_part_of_it(self, tmp_path: Path, change: dict, part: str, read_only: bool) -> None:
        usual = {"storage": "top_k", "top_k": 3}
        open_store(tmp_path / "s", **usual).close()
        with pytest.raises(RequestError, match=f"{part}: the store has"):
            open_store(tmp_path / "s", read_only=read_only, **{**usual, **change})
        open_store(tmp_path / "s", **usual).close()

    def test_hashes_that_begin_alike_are_shown_whole(self) -> None:
        (problem,) = differences({"a": "x" * 63 + "1"}, {"a": "x" * 63 + "2"})
        assert "x1'" in problem.message and "x2'" in problem.message

    def test_equal_keys_in_another_order_are_equal(self, tmp_path: Path) -> None:
        open_store(tmp_path / "s", key={"a": 1, "b": {"c": (1, 2), "d": None}}).close()
        open_store(tmp_path / "s", key={"b": {"d": None, "c": [1, 2]}, "a": 1.0}).close()

    def test_names_for_people_are_not_compared(self, tmp_path: Path) -> None:
        open_store(tmp_path / "s", about={"teachers": ["a"]}).close()
        open_store(tmp_path / "s", about={"teachers": ["b"]}).close()

    def test_what_is_no_json_is_a_mistake(self, tmp_path: Path) -> None:
        with pytest.raises((TypeError, ValueError)):
            open_store(tmp_path / "s", key={"a": float("nan")})

    def test_the_place_follows_from_key_and_form(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path))
        place = store_path({"a": 1, "b": (1, 2)})
        assert place.parent == tmp_path / "labels" and len(place.name) == 12
        assert store_path({"b": [1, 2], "a": 1}) == place
        others = [
            store_path({"a": 2, "b": [1, 2]}),
            store_path({"a": 1, "b": [1, 2]}, storage="top_k"),
            store_path({"a": 1, "b": [1, 2]}, storage="top_k", top_k=5),
        ]
        assert len({place, *others}) == 4

    def test_the_nearest_store_tells_why_a_new_one_is_needed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path))
        assert nearest_store({"a": 1}) is None
        for key in ({"a": 1, "b": 1}, {"a": 5, "b": 5}):
            open_store(store_path(key), key=key).close()
        found = nearest_store({"a": 1, "b": 2})
        assert found is not None and found[0] == store_path({"a": 1, "b": 1})
        assert [problem.key for problem in found[1]] == ["b"]
        assert nearest_store({"a": 1, "b": 2}, unrelated=lambda name: name == "b") is None


class TestPlace:
    def test_a_directory_of_other_files_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(RequestError, match="notes.txt"):
            open_store(tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_file_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "s").write_text("")
        with pytest.raises(RequestError, match="is a file"):
            open_store(tmp_path / "s")

    def test_an_empty_directory_will_do(self, tmp_path: Path) -> None:
        with open_store(tmp_path) as store:
            put(store, [3])
            store.commit()
            assert held(store) == [3]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{", "is none of a label store"),
            ("[]", "is none of a label store"),
            ('{"format": "something else"}', "is none of a label store"),
            ('{"format": "visionkd label store", "version": 2}', "of format 2"),
            ('{"format": "visionkd label store", "version": 1}', "is damaged"),
        ],
    )
    def test_a_manifest_that_cannot_be_used(self, tmp_path: Path, content: str, said: str) -> None:
        open_store(tmp_path / "s").close()
        (tmp_path / "s" / "manifest.json").write_text(content)
        for read_only in (False, True):
            with pytest.raises(RequestError, match=said) as caught:
                open_store(tmp_path / "s", read_only=read_only)
            assert caught.value.hint
        assert (tmp_path / "s" / "manifest.json").read_text() == content

    def test_the_manifest_tells_another_reader_what_the_bytes_mean(self, tmp_path: Path) -> None:
        with open_store(tmp_path / "s", samples=3, classes=5, storage="top_k", top_k=2) as store:
            put(store, [1])
            store.commit()
        manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
        assert manifest["row"] == {
            "bytes": 10,
            "fields": [["indices", "uint16", 2], ["values", "float16", 2], ["rest", "float16"]],
        }
        fields = [(name, kind, tuple(shape)) for name, kind, *shape in manifest["row"]["fields"]]
        rows = np.fromfile(tmp_path / "s" / "v00000-00000.shard", dtype=np.dtype(fields), offset=64)
        values, classes = labels_for([1], 0, classes=5).topk(2)
        assert rows["indices"][1].tolist() == classes[0].tolist()
        assert rows["values"][1].tolist() == values[0].half().tolist()
        assert np.isnan(rows["rest"][[0, 2]].astype(float)).all()

    def test_the_estimate_is_what_it_takes(self, tmp_path: Path) -> None:
        for storage in ("full", "top_k"):
            with open_store(tmp_path / storage, storage=storage, top_k=3) as store:
                put(store, range(100))
                store.commit()
                assert store.nbytes == estimate_bytes(100, 7, storage, 3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.lists(st.integers(0, 39), max_size=12), st.integers(0, 2)),
            st.tuples(st.sampled_from(["commit", "seal", "reopen", "other"]), st.just([]), st.just(0)),
        ),
        max_size=12,
    ),
    storage=st.sampled_from(["full", "top_k"]),
)
def test_a_store_is_a_dictionary(
    steps: list, storage: str, tmp_path_factory: pytest.TempPathFactory, small_shards: None
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    store = open_store(path, samples=40, classes=4, storage=storage, top_k=2)
    committed: dict[tuple[int, int], torch.Tensor] = {}
    pending: dict[tuple[int, int], torch.Tensor] = {}
    for generation, (what, indices, view) in enumerate(steps):
        if what == "write":
            probs = labels_for(indices, view, classes=4, generation=generation)
            kept = store.write(torch.tensor(indices, dtype=torch.int64), view, probs).dense()
            pending.update({(index, view): row for index, row in zip(indices, kept, strict=True)})
            continue
        if what == "commit":
            store.commit()
        elif what == "seal":
            store.seal()
            continue
        elif what == "reopen":
            store.close()
            store = open_store(path, samples=40, classes=4, storage=storage, top_k=2)
        elif what == "other":  # another process of the run merges what this one gave up
            store.seal()
            open_store(path, samples=40, classes=4, storage=storage, top_k=2).close()
            store.refresh()
        committed.update(pending)
        pending.clear()
        for view in range(3):
            labels = store.read(torch.arange(40), view)
            dense = labels.dense()
            for index in range(40):
                expected = committed.get((index, view))
                assert bool(labels.present[index]) is (expected is not None)
                assert expected is None or torch.equal(dense[index], expected)
    store.close()
