from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from visionkd.errors import RequestError
from visionkd.models.factory import create_network
from visionkd.search.spaces import GridSpace, Space, key_of, open_space, space_names


def differences(first: dict, second: dict) -> int:
    assert first.keys() == second.keys()
    return sum(first[name] != second[name] for name in first)


@pytest.mark.parametrize("name", space_names())
def test_a_space_keeps_its_promises(name: str) -> None:
    space, rng = open_space(name), random.Random(0)
    assert isinstance(space, Space)
    one, other = space.sample(rng), space.sample(rng)
    assert json.loads(json.dumps(one)) == one
    for _ in range(20):
        assert differences(one, space.mutate(one, rng)) == 1
        child = space.crossover(one, other, rng)
        assert all(child[axis] in (one[axis], other[axis]) for axis in child)
    again = random.Random(3)
    assert space.sample(random.Random(3)) == space.sample(again)


@pytest.mark.parametrize("name", [name for name in space_names() if name != "timm"])
def test_candidates_are_networks_that_run(name: str) -> None:
    space = open_space(name, img_size=32)
    rng = random.Random(1)
    config = space.network(space.mutate(space.sample(rng), rng))
    assert not config.pretrained
    with torch.device("meta"):
        network = create_network(config, num_classes=4, in_training=True).eval()
        assert network.net(torch.empty(2, 3, 32, 32)).shape == (2, 4)


def test_s0_is_the_cards() -> None:
    space = open_space("cifar_resnet_s0")
    assert space.size == len({key_of(candidate) for candidate in space.enumerate()}) == 64
    config = space.network({"blocks.0": 5, "blocks.1": 5, "blocks.2": 7})
    assert (config.name, config.args) == ("cifar_resnet", {"blocks": [5, 5, 7]})
    net = create_network(config, num_classes=100, in_training=True).net
    assert [len(net.layer1), len(net.layer2), len(net.layer3)] == [5, 5, 7]


def test_vits_have_whole_heads() -> None:
    space, rng = open_space("vit"), random.Random(0)
    one, other = space.sample(rng), space.sample(rng)
    made = [space.mutate(one, rng) for _ in range(40)] + [space.crossover(one, other, rng) for _ in range(40)]
    assert all(candidate["embed_dim"] % candidate["num_heads"] == 0 for candidate in [*made, *space.enumerate()])


def test_timm_holds_all_networks_and_mutates_within_a_family() -> None:
    import timm

    space, rng = open_space("timm"), random.Random(0)
    assert space.size == len(timm.list_models())
    near = sum("resnet" in space.mutate({"network": "resnet18"}, rng)["network"] for _ in range(100))
    assert near > 50
    assert space.network({"network": "resnet18"}).pretrained, "the student then starts from published weights"


OWN = """
name: mine
network: [cifar_resnet, cifar_resnet8]
args:
  shortcut: [conv, pad]
  channels.0: [8, 16]
  channels.1: [32]
  channels.2: [64]
fixed: {drop_rate: 0.1}
img_size: 48
"""


def test_a_yaml_file_is_a_space(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    space = open_space(str(file))
    assert (space.name, space.size) == ("mine", 8)
    config = space.network(next(iter(space.enumerate())))
    assert config.name == "cifar_resnet" and config.img_size == 48 and not config.pretrained
    assert config.args == {"drop_rate": 0.1, "shortcut": "conv", "channels": [8, 32, 64]}
    assert open_space(str(file), img_size=32).network(next(iter(space.enumerate()))).img_size == 32


def test_a_python_file_is_a_space(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from visionkd.search.spaces import GridSpace\n"
        "SPACE = GridSpace('mine', network='cifar_resnet', axes={'width': (0.5, 1.0)})\n"
    )
    assert [c["width"] for c in open_space(str(file)).enumerate()] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "netwrok: x", ["netwrok", "Did you mean 'network'", "network: is required"]),
        ("a.yaml", "network: x\nargs: {a: 1, b.1: [2]}", ["args.a: must be a list", "args.b: items must be numbered"]),
        ("a.yaml", "network: x", ["leaves nothing to choose"]),
        ("a.yaml", "network: x\nargs: {a: [1]}\nimg_size: big", ["img_size: must be a whole number"]),
        ("a.py", "x = 1", ["defines no SPACE"]),
        ("a.py", "SPACE = 1", ["a SPACE without sample"]),
        ("a.py", "1 / 0", ["ZeroDivisionError"]),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, name: str, text: str, said: list[str]) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError) as error:
        open_space(str(tmp_path / name))
    assert all(part in str(error.value) for part in said)


@pytest.mark.parametrize(("name", "said"), [("cifar_resent", "Did you mean 'cifar_resnet'"), ("x.yaml", "no file")])
def test_an_unknown_space_is_told(name: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        open_space(name)


def test_a_grid_with_one_candidate_stays() -> None:
    space = GridSpace("one", network="x", axes={"a": (1,)})
    assert space.mutate({"a": 1}, random.Random(0)) == {"a": 1}
