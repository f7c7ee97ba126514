"""The label store when processes die, files rot and several write at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.teachers.label_store_help import Forked, held, kill_me, labels_for, open_store, put
from visionkd.teachers import _shards
from visionkd.teachers._journal import Journal, read_journal
from visionkd.teachers._shards import RowFormat

pytestmark = pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "_SHARD_ROWS", 32)


@pytest.fixture
def said() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def tell(said: list[tuple[str, str]]) -> Callable[..., None]:
    return lambda text, *, level="info": said.append((level, text))


def filled(path: Path, *views: int) -> None:
    with open_store(path) as one:
        for view in views or (0,):
            put(one, range(100), view)
        one.commit()


def sound_labels(path: Path, fmt: RowFormat) -> int:
    return sum(end - start for start, end in read_journal(path, fmt)[1])


def names(path: Path) -> set[str]:
    return {entry.name for entry in os.scandir(path)} - {".lock", "manifest.json"}


class TestDamage:
    def damage(self, file: Path, how: str) -> None:
        content = bytearray(file.read_bytes())
        if how == "flipped bit":
            content[-5] ^= 1
        elif how == "flipped bit in the header":
            content[24] ^= 1
        elif how.startswith("cut to"):
            del content[int(how.split()[-1]) :]
        elif how == "longer":
            content += b"x"
        elif how == "other magic":
            content[:8] = b"NOTALABE"
        elif how.startswith("shard of another"):
            other = "v00000-00002.shard" if how.endswith("block") else "v00001-00001.shard"
            content[:] = file.with_name(other).read_bytes()
        file.write_bytes(content)

    @pytest.mark.parametrize(
        ("how", "reason"),
        [
            ("flipped bit", "its checksum does not match"),
            ("flipped bit in the header", "the checksum of its header"),
            ("cut to 959", "959 bytes instead of 960"),
            ("cut to 30", "does not begin as a shard does"),
            ("cut to 0", "does not begin as a shard does"),
            ("longer", "961 bytes instead of 960"),
            ("other magic", "does not begin as a shard does"),
            ("shard of another block", "belongs to another shard"),
            ("shard of another view", "view 1, which its name does not say"),
        ],
    )
    @pytest.mark.parametrize("read_only", [False, True])
    def test_one_shard_is_computed_again(self, tmp_path, how, reason, read_only, said, tell) -> None:
        filled(tmp_path, 0, 1)
        file = tmp_path / "v00000-00001.shard"
        self.damage(file, how)
        with open_store(tmp_path, read_only=read_only, on_message=tell) as one:
            assert held(one) == [*range(32), *range(64, 100)], "the rows of all other shards are untouched"
            assert held(one, 1) == list(range(100))
            ((level, text),) = said
            assert level == "warning" and str(file) in text and reason in text
            assert file.exists() is read_only
            if not read_only:
                put(one, one.missing(0).tolist())
                one.commit()
                assert held(one) == list(range(100))

    def test_a_damaged_shard_is_not_merged_with(self, tmp_path, said, tell) -> None:
        filled(tmp_path)
        with open_store(tmp_path, on_message=tell) as one:
            self.damage(tmp_path / "v00000-00001.shard", "flipped bit")
            put(one, [40])
            one.commit()
            assert held(one) == [*range(32), 40, *range(64, 100)] and len(said) == 1

    def test_a_shard_that_was_repaired_meanwhile_stays(self, tmp_path) -> None:
        filled(tmp_path)
        file = tmp_path / "v00000-00001.shard"
        good = file.read_bytes()

        def repair(text: str, *, level: str = "info") -> None:
            file.write_bytes(good)  # another process is faster

        with open_store(tmp_path, on_message=repair) as one:
            self.damage(file, "flipped bit")
            assert not one.read(torch.tensor([40]), 0).complete
            one.refresh()
            assert held(one) == list(range(100))

    def test_files_of_others_are_passed_over(self, tmp_path) -> None:
        filled(tmp_path)
        for name in ("v00000-00009.shard", "v0-0.shard", "v00000-00000.shard.bak", ".v00000-00001.shard.x.tmp"):
            (tmp_path / name).write_bytes(b"mine")
        with open_store(tmp_path) as one:
            assert held(one) == list(range(100)) and one.views == (0,)
        assert (tmp_path / "v00000-00000.shard.bak").exists() and not list(tmp_path.glob("*.tmp"))


class TestKill:
    """A writer is killed at one place; whoever opens the store next finds every batch that was complete."""

    def run_and_die(self, path: Path, patch: Callable[[pytest.MonkeyPatch], None], *, commits: bool = False) -> None:
        def work() -> None:
            with pytest.MonkeyPatch.context() as patched:
                one = open_store(path)
                put(one, range(0, 40))
                put(one, range(40, 80))
                patch(patched)
                if commits:
                    one.commit()
                else:
                    put(one, range(80, 100))

        assert Forked(work).wait() == -9

    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
    def test_in_the_middle_of_a_batch(self, tmp_path, share) -> None:
        written = os.write

        def patch(patched: pytest.MonkeyPatch) -> None:
            def half(file: int, content: memoryview) -> int:
                written(file, content[: int(share * len(content))])
                kill_me()
                return 0

            patched.setattr(os, "write", half)

        self.run_and_die(tmp_path, patch)
        with open_store(tmp_path) as one:
            assert held(one) == list(range(80))
            put(one, one.missing(0).tolist())
            one.commit()
            assert held(one) == list(range(100))

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_before_a_shard_is_renamed(self, tmp_path, number) -> None:
        def patch(patched: pytest.MonkeyPatch) -> None:
            renamed, calls = os.replace, []

            def replace(*names: str) -> None:
                calls.append(names)
                if len(calls) == number:
                    kill_me()
                renamed(*names)

            patched.setattr(os, "replace", replace)

        self.run_and_die(tmp_path, patch, commits=True)
        assert len(list(tmp_path.glob("*.shard"))) == number - 1 and len(list(tmp_path.glob(".*.tmp"))) == 1
        with open_store(tmp_path) as one:
            assert held(one) == list(range(80))
        assert names(tmp_path) == {f"v00000-{block:05d}.shard" for block in range(3)}, "nothing is left lying about"

    def test_between_shards_and_journals(self, tmp_path) -> None:
        def patch(patched: pytest.MonkeyPatch) -> None:
            unlinked = Path.unlink

            def unlink(path: Path, missing_ok: bool = False) -> None:
                if path.suffix == ".log":
                    kill_me()
                unlinked(path, missing_ok=missing_ok)

            patched.setattr(Path, "unlink", unlink)

        self.run_and_die(tmp_path, patch, commits=True)
        assert len(list(tmp_path.glob("*.log"))) == 1
        with open_store(tmp_path) as one:
            assert held(one) == list(range(80))
        assert not list(tmp_path.glob("*.log"))

    @pytest.mark.parametrize("after_s", [0.02, 0.05, 0.11])
    def test_at_any_moment(self, tmp_path, after_s) -> None:
        def work() -> None:
            with open_store(tmp_path, samples=500) as one:
                for round_ in range(10_000):
                    put(one, [(7 * round_ + step) % 500 for step in range(7)], round_ % 3)
                    if round_ % 5 == 4:
                        one.commit()

        writer = Forked(work)
        while not list(tmp_path.glob("*.shard")):
            time.sleep(0.005)
        time.sleep(after_s)
        writer.kill()
        assert writer.wait() == -9
        with open_store(tmp_path, samples=500) as one:
            assert sum(len(held(one, view)) for view in range(3)) >= 35
        assert not list(tmp_path.glob("*.log")) and not list(tmp_path.glob("session*"))

    def test_a_garbled_journal_ends_at_the_last_sound_batch(self, tmp_path) -> None:
        fmt = RowFormat(7, "full", 7)
        journal = Journal(tmp_path / "j", fmt)

        rows = np.zeros(5, fmt.row)
        for _ in range(3):
            journal.append(np.arange(5), 0, rows)
        journal.close()
        sound = (tmp_path / "j").read_bytes()
        record = fmt.record.itemsize
        for place, count in ((-1, 10), (record * 6 + 3, 5), (record * 8, 5), (record * 6, 5), (2, 0)):
            content = bytearray(sound)
            content[place] ^= 0x40
            (tmp_path / "j").write_bytes(content)
            assert sound_labels(tmp_path / "j", fmt) == count
        (tmp_path / "j").write_bytes(sound + sound[: record * 4])
        assert sound_labels(tmp_path / "j", fmt) == 15
        (tmp_path / "j").write_bytes(b"")
        assert sound_labels(tmp_path / "j", fmt) == 0


class TestTogether:
    def test_a_living_writer_keeps_its_journal(self, tmp_path) -> None:
        with open_store(tmp_path) as one:
            put(one, [1, 2])
            with open_store(tmp_path) as other:
                assert held(other) == []
                put(other, [3])
                other.commit()
                assert held(other) == [3]
            put(one, [4])
            one.commit()
            assert held(one) == [1, 2, 3, 4]

    def test_what_a_process_gave_up_is_merged_by_another(self, tmp_path) -> None:
        ranks = [open_store(tmp_path) for _ in range(3)]
        for number, rank in enumerate(ranks):
            put(rank, range(number, 100, 3))
        for rank in ranks:
            rank.seal()
        assert ranks[1].commit() == 100 and ranks[0].commit() == 0
        ranks[2].refresh()
        for rank in ranks:
            assert held(rank) == list(range(100))
            put(rank, [0], 1)  # a journal of its own again
            rank.close()
        with open_store(tmp_path) as one:
            assert held(one, 1) == [0]

    def test_two_processes_fill_one_store_and_lose_nothing(self, tmp_path) -> None:
        def work(first: int) -> Callable[[], int]:
            def run() -> int:
                with open_store(tmp_path, samples=400) as one:
                    return sum(put(one, range(start, start + 10)) or one.commit() for start in range(first, 400, 20))

            return run

        processes = [Forked(work(first)) for first in (0, 10)]
        assert sum(process.result() for process in processes) > 200, "each merges; what one gave up another may take"
        with open_store(tmp_path, samples=400) as one:
            assert held(one) == list(range(400))

    def test_two_processes_make_one_store(self, tmp_path) -> None:
        processes = [Forked(lambda: open_store(tmp_path / "new").close()) for _ in range(4)]
        assert [process.result() for process in processes] == [None] * 4

    def test_a_reader_sees_whole_labels_while_they_are_replaced(self, tmp_path) -> None:
        filled(tmp_path)

        def work() -> None:
            with open_store(tmp_path) as one:
                for generation in range(1, 13):
                    put(one, range(100), generation=generation)
                    one.commit()

        writer = Forked(work)
        known = {row.tobytes(): number for number in range(13) for row in labels_for([5], 0, generation=number).numpy()}
        seen = set()
        with open_store(tmp_path, read_only=True) as one:
            end = time.monotonic() + 60
            while len(seen) < 3 and time.monotonic() < end or max(seen) < 12:
                labels = one.read(torch.arange(100), 0)
                assert labels.complete
                seen.add(known[labels.dense()[5].numpy().tobytes()])
                one.refresh()
        assert writer.result() is None

    def test_a_reader_keeps_what_it_mapped_until_it_looks_again(self, tmp_path) -> None:
        filled(tmp_path)
        with open_store(tmp_path, read_only=True) as reader, open_store(tmp_path) as writer:
            before = reader.read(torch.arange(100), 0).dense()
            put(writer, range(100), generation=1)
            writer.commit()
            assert torch.equal(reader.read(torch.arange(100), 0).dense(), before)
            reader.refresh()
            assert torch.equal(reader.read(torch.arange(100), 0).dense(), labels_for(range(100), 0, generation=1))
