"""``visionkd data cache``: what it hands to the workflows, what it shows, and when it asks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.teachers.label_store_help import open_store, put
from visionkd import workflows
from visionkd.cli import console
from visionkd.teachers.store import store_path
from visionkd.teachers.store_admin import StoreInfo, StoreReport

STORE = StoreInfo(
    "0123456789ab",
    ("vit_l", "resnet50"),
    "cifar10",
    "full",
    3,
    150,
    1.5,
    "2026-01-02T03:04:05Z",
    Path("c/0123456789ab"),
)
SOUND = StoreReport("0123456789ab", 6, 150, (), Path("c/0123456789ab"))
DAMAGED = StoreReport("ba9876543210", 5, 100, (("v00000-00001.shard", "its checksum does not match"),), Path("c/ba"))


def two_stores() -> list[Path]:
    paths = [store_path({"name": name}) for name in ("a", "b")]
    for path, name in zip(paths, ("a", "b"), strict=True):
        with open_store(path, key={"name": name}, about={"teachers": [f"teacher_{name}"], "data": "d"}) as store:
            put(store, range(30))
            store.commit()
    return paths


def test_the_list_is_a_table_and_json(run, pretend) -> None:
    pretend("list_cache", lambda: (STORE,))
    head, line = run("data", "cache", "list").out.splitlines()
    assert head.split() == "id teachers data storage views labels size_mb last_used path".split()
    assert line.split() == "0123456789ab vit_l, resnet50 cifar10 full 3 150 1.50 2026-01-02T03:04:05Z".split() + [
        "c/0123456789ab"
    ]
    stores = json.loads(run("data", "cache", "list", "--json").out)["stores"]
    assert stores[0]["teachers"] == ["vit_l", "resnet50"] and stores[0]["labels"] == 150
    pretend("list_cache", lambda: ())
    assert json.loads(run("data", "cache", "list", "--json").out) == {"stores": []}
    assert "nothing to list" in run("data", "cache", "list").err


def test_verification_fails_where_a_shard_is_damaged(run, pretend) -> None:
    given: dict[str, Any] = {}

    def verify(**request: Any) -> Any:
        given.update(request)
        return reports

    pretend("verify_cache", verify)
    reports = (SOUND,)
    outcome = run("data", "cache", "verify", "0123", "c/x")
    assert outcome.code == 0 and given["stores"] == ("0123", "c/x")
    reports = (SOUND, DAMAGED)
    outcome = run("data", "cache", "verify")
    assert outcome.code == 1 and given["stores"] == ()
    assert [line.split()[3] for line in outcome.out.splitlines()] == ["damaged", "0", "1"]
    assert "c/ba/v00000-00001.shard: its checksum does not match" in outcome.err
    outcome = run("data", "cache", "verify", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["stores"][1]["damaged"] == [["v00000-00001.shard", "its checksum does not match"]]


def test_removal_reaches_the_workflow(run, pretend) -> None:
    given: dict[str, Any] = {}

    def remove(**request: Any) -> Any:
        given.update(request)
        return (STORE,)

    pretend("remove_cache", remove)
    outcome = run("data", "cache", "remove", "0123", "--unused-days", "30", "--yes", "--json")
    assert given == {"stores": ("0123",), "every": False, "unused_days": 30, "confirm": None}
    assert json.loads(outcome.out)["removed"][0]["id"] == STORE.id
    assert STORE.id in run("data", "cache", "remove", "--all").out
    assert given["every"] is True and given["unused_days"] is None and callable(given["confirm"])
    assert run("data", "cache", "remove", "x", "--unused-days", "-1").code == 2


@pytest.mark.parametrize(("answer", "is_left"), [(True, False), (False, True)])
def test_it_asks_before_anything_is_removed(run, monkeypatch, answer: bool, is_left: bool) -> None:
    path = two_stores()[0]
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdin)
    asked: list[str] = []

    def confirm(text: str, **_: Any) -> bool:
        asked.append(text)
        return answer

    monkeypatch.setattr("click.confirm", confirm)
    outcome = run("data", "cache", "remove", path.name)
    assert outcome.code == 0 and asked == ["Remove 1 store?"]
    assert str(path) in outcome.err, "it says what it asks about"
    assert path.exists() is is_left
    assert ("nothing was removed" in outcome.err) is is_left


def test_the_real_thing(run: Callable[..., Any]) -> None:
    assert run("data", "cache", "list").code == 0
    one, two = two_stores()
    assert "teacher_a" in run("data", "cache", "list").out
    assert run("data", "cache", "verify").code == 0
    shard = two / "v00000-00000.shard"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert run("data", "cache", "verify", one.name).code == 0
    assert run("data", "cache", "verify", str(two)).code == 1

    nobody = run("data", "cache", "remove", "--all")
    assert nobody.code == 2 and "--yes" in nobody.err and one.exists()
    for arguments, said in (
        ((), "--all"),
        (("--all", one.name), "Give one of them"),
        (("nothing", "zilch"), "2 problems"),
        (("nothing", one.name), "'nothing' is neither"),
    ):
        outcome = run("data", "cache", "remove", "--yes", *arguments)
        assert outcome.code == 2 and said in outcome.err and one.exists() and two.exists()
    assert run("data", "cache", "remove", "--yes", "--unused-days", "1").code == 0
    assert one.exists() and two.exists(), "both were used today"

    with open_store(one, key={"name": "a"}):
        outcome = run("data", "cache", "remove", "--yes", "--all")
    assert outcome.code == 1 and "in use" in outcome.err
    assert one.exists() and not two.exists(), "what is not in use is removed"
    assert run("data", "cache", "remove", "--yes", one.name[:6]).code == 0
    assert not one.exists() and workflows.list_cache() == ()
