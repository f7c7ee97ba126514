"""``visionkd zoo``: what it hands to the workflows and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visionkd.hub.cache import Entry
from visionkd.workflows._zoo_add import ZooAdded
from visionkd.workflows._zoo_push import ZooPushed
from visionkd.workflows._zoo_rows import ZooRow
from visionkd.workflows._zoo_verify import ZooCheck
from visionkd.workflows.zoo import ZooFile

ROW = ZooRow(
    "r8", "classification", "cifar10", 81.0, None, None, 0.08, 0.0125, 0.3, None, "cpu", "kd", "apache-2.0", "own"
)
GOOD = ZooCheck("r8", "ok", ("hash", "loads", "metric"), "cifar10", "top1", 81.0, 81.05, 0.05)
BAD = ZooCheck("r20", "failed", ("hash",), reason="its outputs are 9, and the card says 10")
AWAY = ZooCheck("vit", "skipped", reason="not here")


def test_the_list_hands_all_filters_on(run, pretend) -> None:
    given: dict[str, Any] = {}

    def list_zoo(**request: Any) -> tuple[ZooRow, ...]:
        given.update(request)
        return (ROW,)

    pretend("list_zoo", list_zoo)
    words = "zoo list small --task classification --licence mit,apache-2.0 --max-size-mb 5 --min top1=80 --sort size_mb"
    head, line = run(*words.split(), "--forms", "--commercial").out.splitlines()
    assert head.split() == "name task data top1 params_m macs_g size_mb licence origin".split()
    assert line.split()[:4] == ["r8", "classification", "cifar10", "81.00"]
    assert given["words"] == ("small",) and given["licence"] == ("mit", "apache-2.0") and given["max_size_mb"] == 5.0
    assert given["least"] == ("top1=80",) and given["forms"] and given["commercial"] and given["max_params_m"] is None
    assert json.loads(run("zoo", "list", "--json").out)["models"][0]["method"] == "kd"


def test_wrong_values_are_refused_together(run) -> None:
    outcome = run("zoo", "list", "--max-size-mb", "0", "--task", "naming")
    assert outcome.code == 2 and "--max-size-mb" in outcome.err and "--task" in outcome.err


def test_a_card_is_shown(run) -> None:
    shown = run("zoo", "show", "zoo:efficientnet_lite0").out
    assert "apache-2.0" in shown and "Good for:" in shown and "zoo:efficientnet_lite0" in shown and "75.10" in shown
    card = json.loads(run("zoo", "show", "efficientnet_lite0", "--json").out)
    assert card["artifacts"]["weights"]["files"][0]["sha256"].startswith("57934424")
    wrong = run("zoo", "show", "efficientnet_lite9")
    assert wrong.code == 2 and "'efficientnet_lite0'" in wrong.err


def test_pull(run, pretend) -> None:
    given: dict[str, Any] = {}

    def pull_zoo(**request: Any) -> tuple[ZooFile, ...]:
        given.update(request)
        return (ZooFile("zoo:r8@weights", Path("c/r8"), 0.3, True, "mit"),)

    pretend("pull_zoo", pull_zoo)
    assert "zoo:r8@weights" in run("zoo", "pull", "r8").out
    assert given["names"] == ("r8",) and given["offline"] is None and not given["every"]
    assert json.loads(run("zoo", "pull", "r8", "--all", "--offline", "--json").out)["models"][0]["path"] == "c/r8"
    assert given["offline"] is True and given["every"]
    assert run("zoo", "pull").code == 2


def test_verification_fails_where_a_model_differs(run, pretend) -> None:
    given: dict[str, Any] = {}
    found = (GOOD, AWAY)

    def verify_zoo(**request: Any) -> tuple[ZooCheck, ...]:
        given.update(request)
        return found

    pretend("verify_zoo", verify_zoo)
    outcome = run("zoo", "verify", "--data", "cifar10=d", "--data", "camvid", "--tolerance", "0.2")
    assert outcome.code == 0 and "r8" in outcome.out and "vit" not in outcome.out and "skipped" in outcome.err
    assert given["data"] == ("cifar10=d", "camvid") and given["tolerance"] == 0.2 and given["names"] == ()
    found = (GOOD, BAD)
    assert run("zoo", "verify", "r8", "r20").code == 1
    outcome = run("zoo", "verify", "--json")
    assert outcome.code == 1 and json.loads(outcome.out)["failed"] == 1


def test_add_says_what_is_left_to_do(run, pretend) -> None:
    given: dict[str, Any] = {}

    def add_zoo(**request: Any) -> ZooAdded:
        given.update(request)
        return ZooAdded(Path("zoo/classification/r8.yaml"), "r8", (), 0.3, ("licence: say which one",))

    pretend("add_zoo", add_zoo)
    outcome = run("zoo", "add", "runs/kd", "--good-for", "a", "--good-for", "b", "--form", "weights,int8", "--time")
    assert "zoo/classification/r8.yaml" in outcome.out and "to do: licence: say which one" in outcome.err
    assert given["good_for"] == ("a", "b") and given["forms"] == ("weights", "int8") and given["time"]
    assert "licence" not in given and given["measure"]


def test_push_and_prune(run, pretend) -> None:
    pretend("push_zoo", lambda **request: ZooPushed(request["target"], ("card.yaml",), 0.3))
    assert "shared" in run("zoo", "push", "r8", "shared").out
    pretend("prune_zoo", lambda **request: (Entry("r8", "weights-1", Path("c"), 300_000, 0.0),))
    assert json.loads(run("zoo", "prune", "--all", "--json").out)["removed"][0]["size_mb"] == 0.3
    pretend("prune_zoo", lambda **request: ())
    assert "nothing was removed" in run("zoo", "prune").err
