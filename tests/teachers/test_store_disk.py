"""The label store where a disk is full, or somebody removes it in the middle of a run."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable

import pytest
import torch

from tests.teachers.label_store_help import Forked, held, labels_for, open_store, put
from visionkd.errors import WorkError
from visionkd.teachers import _shards, store

pytestmark = pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "_SHARD_ROWS", 32)


def limited(limit_bytes: int, work: Callable[[], str]) -> str:
    """Run where no file may grow beyond a limit, and return the message of the error."""

    def run() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
        try:
            return work()
        except WorkError as error:
            return f"{error}"

    return Forked(run).result()


def test_full_while_labels_are_computed(tmp_path) -> None:
    def work() -> str:
        one = open_store(tmp_path)
        for start in range(0, 100, 10):
            put(one, range(start, start + 10))
        return "no error"

    text = limited(2000, work)  # 44 bytes a record: 4 batches
    assert str(tmp_path) in text and "up to 7,200 bytes" in text and "--no-cache-teacher" in text
    assert "label_store.path" in text
    with open_store(tmp_path) as one:
        assert held(one) == list(range(40)), "the batch that did not fit is as if never computed"


def test_a_writer_may_go_on_when_there_is_room_again(tmp_path, monkeypatch) -> None:
    written = os.write
    with open_store(tmp_path) as one:
        put(one, range(10))

        def full(file: int, content: memoryview) -> int:
            if len(content) < 400:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written(file, content[:100])

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(WorkError, match="No space left"):
                put(one, range(10, 20))
        put(one, range(20, 30))
        one.commit()
        assert held(one) == [*range(10), *range(20, 30)]


def test_full_while_shards_are_written(tmp_path) -> None:
    with open_store(tmp_path) as one:
        put(one, range(100))
        one.commit()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.shard")}

    def work() -> str:
        one = open_store(tmp_path)
        put(one, [1, 40], generation=1)
        one.commit()
        return "no error"

    assert "There is no room for the label store" in limited(600, work)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.shard")} == before
    assert not list(tmp_path.glob(".*.tmp")), "no half shard is left"
    with open_store(tmp_path) as one:  # what was computed is merged when there is room
        assert torch.equal(one.read(torch.tensor([40]), 0).dense(), labels_for([40], 0, generation=1))


def test_other_errors_are_what_they_are(tmp_path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "x")

    with open_store(tmp_path) as one:
        put(one, [1])
        monkeypatch.setattr(store, "write_shard", broken)
        with pytest.raises(OSError, match="Input/output"):
            one.commit()


def test_a_store_that_was_removed_meanwhile(tmp_path) -> None:

    one = open_store(tmp_path / "s")
    put(one, [1])
    shutil.rmtree(tmp_path / "s")
    for work in (one.refresh, lambda: put(one, [2]) or one.commit()):
        with pytest.raises(WorkError, match="was removed while"):
            work()
    one.close()
