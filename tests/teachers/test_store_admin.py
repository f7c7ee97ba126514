from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from tests.teachers.label_store_help import Forked, kill_me, open_store, put
from visionkd.errors import RequestError, WorkError
from visionkd.teachers import _shards, store, store_admin

pytestmark = pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "_SHARD_ROWS", 32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path))
    return tmp_path / "labels"


def make(name: str, *, used_days_ago: float = 0.0, **settings) -> Path:
    path = store.store_path({"name": name})
    with open_store(path, key={"name": name}, **settings) as one:
        put(one, range(100), 0)
        put(one, range(50), 4)
        one.commit()
    when = time.time() - 86400 * used_days_ago
    os.utime(path / "manifest.json", (when, when))
    return path


def test_a_list_of_what_there_is(cache: Path) -> None:
    assert store_admin.list_stores() == ()
    old = make("a", used_days_ago=40, about={"teachers": ["vit_l", "resnet50"], "data": "cifar10"})
    new = make("b", storage="top_k", top_k=3)
    (cache / "other").mkdir()
    (cache / "other" / "manifest.json").write_text('{"format": "mine"}')
    (cache / "file").write_text("")
    first, second = store_admin.list_stores()
    assert (first.path, second.path) == (new, old)
    assert (second.teachers, second.data, second.storage) == (("vit_l", "resnet50"), "cifar10", "full")
    assert (first.teachers, first.data, first.storage) == ((), "", "top-3")
    assert (first.views, first.labels, first.id) == (2, 150, new.name)
    size = sum(file.stat().st_size for file in new.glob("*.shard")) / 1e6
    assert first.size_mb == pytest.approx(size) and size > 0.001
    assert store_admin.unused((first, second), days=39) == (second,)
    assert store_admin.unused((first, second), days=41) == ()


def test_opening_a_store_uses_it() -> None:
    path = make("a", used_days_ago=40)
    open_store(path, key={"name": "a"}).close()
    assert store_admin.unused(store_admin.list_stores(), days=1) == ()


def test_a_store_is_found_by_id_beginning_and_path(cache: Path, tmp_path: Path) -> None:
    path, elsewhere = make("a"), tmp_path / "elsewhere"
    open_store(elsewhere).close()
    for name in (path.name, path.name[:4], str(path)):
        assert store_admin.find_store(name) == path
    assert store_admin.find_store(str(elsewhere)) == elsewhere
    for name, said in (("zzz", "neither a label store nor"), (str(tmp_path), "is no label store")):
        with pytest.raises(RequestError, match=said) as caught:
            store_admin.find_store(name)
        assert "visionkd data cache list" in str(caught.value)
    path.rename(cache / "aa1")
    make("b").rename(cache / "aa2")
    with pytest.raises(RequestError, match="aa1, aa2"):
        store_admin.find_store("aa")


def test_verification_reads_every_shard() -> None:
    path, steps = make("a"), []
    report = store_admin.verify_store(path, progress=lambda done, total: steps.append((done, total)))
    assert (report.shards, report.labels, report.damaged) == (6, 150, ())
    assert steps == [(number, 6) for number in range(1, 7)]
    for name, damage in (("v00000-00002.shard", -1), ("v00004-00000.shard", 3)):
        content = bytearray((path / name).read_bytes())
        content[damage] ^= 1
        (path / name).write_bytes(content)
    report = store_admin.verify_store(path)
    assert (report.shards, [name for name, _ in report.damaged]) == (
        4,
        ["v00000-00002.shard", "v00004-00000.shard"],
    )
    assert len(list(path.glob("*.shard"))) == 6, "nothing is changed"


def test_removal_takes_only_what_belongs_to_the_store(cache: Path) -> None:
    one, two = make("a"), make("b")
    (two / "notes.txt").write_text("mine")
    (two / "model.shard").write_text("mine")
    assert store_admin.remove_store(one).labels == 150
    assert not one.exists()
    store_admin.remove_store(two)
    assert sorted(file.name for file in two.iterdir()) == ["model.shard", "notes.txt"]
    for path in (two, cache, cache / "nothing"):
        with pytest.raises(RequestError, match="no label store"):
            store_admin.remove_store(path)
    assert sorted(file.name for file in two.iterdir()) == ["model.shard", "notes.txt"]


def test_a_store_in_use_is_not_removed_and_one_left_by_a_dead_run_is() -> None:
    path = make("a")
    with open_store(path, key={"name": "a"}) as one:
        with pytest.raises(WorkError, match="in use"):
            store_admin.remove_store(path)
        assert one.read(torch.arange(100), 0).complete

    def die() -> None:
        put(open_store(path, key={"name": "a"}), [1], 7)
        kill_me()

    Forked(die).wait()
    assert list(path.glob("journal-*.log"))
    store_admin.remove_store(path)
    assert not path.exists()


def test_a_store_of_a_newer_version_can_be_listed_and_removed() -> None:
    path = make("a")
    (path / "manifest.json").write_text('{"format": "visionkd label store", "version": 9, "about": [1]}')
    (info,) = store_admin.list_stores()
    assert (info.storage, info.teachers, info.labels) == ("", (), 150)
    store_admin.remove_store(path)
    assert not path.exists()
