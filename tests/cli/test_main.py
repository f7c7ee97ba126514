"""Listing, help, and answers to what cannot be understood."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

import visionkd
from visionkd.cli._base import short_help
from visionkd.cli.main import cli

COMMANDS = [
    "bench", "configs", "data", "distill", "doctor", "eval", "export", "predict", "quantize", "report", "search",
    "train", "zoo",
]  # fmt: skip


def load(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def test_the_commands_are_the_files() -> None:
    assert cli.list_commands(click.Context(cli)) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_short_help_is_the_first_line_of_the_file(name: str) -> None:
    help_text = load(name).help
    assert help_text is not None
    assert short_help(name) == help_text.splitlines()[0].rstrip(".")
    assert len(short_help(name)) > 10


def test_a_new_command_is_one_new_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run) -> None:
    import visionkd.cli

    (tmp_path / "count_sheep.py").write_text(
        '"""Count sheep."""\nfrom visionkd.cli import console\nfrom visionkd.cli._base import new_command\n\n'
        '@new_command(__doc__)\ndef command():\n    console.write("1 sheep")\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(visionkd.cli, "__path__", [*visionkd.cli.__path__, str(tmp_path)])
    monkeypatch.setattr("visionkd.registry.names", lambda package: ("count_sheep",))
    assert cli.list_commands(click.Context(cli)) == ["count-sheep"]
    assert run("count-sheep").out == "1 sheep\n"


def test_help_lists_every_command(run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for name in COMMANDS:
        assert f"  {name} " in outcome.out


def test_version(run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"visionkd {visionkd.__version__}\n")


@pytest.mark.parametrize("argv", [(), ("configs",), ("data",)])
def test_a_group_alone_shows_its_help_and_is_a_wrong_request(run, argv: tuple[str, ...]) -> None:
    outcome = run(*argv)
    assert outcome.code == 2
    assert "Usage: visionkd" in outcome.err and "Commands:" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("distil",), "unknown command 'distil'. Did you mean 'distill'?"),
        (("evaluate", "x"), "unknown command 'evaluate'. Did you mean 'eval'?"),
        (("zzz",), "unknown command 'zzz'. Known: bench, configs, data"),
        (("data", "chekc"), "unknown command 'chekc'. Did you mean 'check'"),
        (("distill", "--studnet", "a"), "'--student'"),
        (("bench", "a", "--backend", "torhc,x"), "--backend: unknown name 'torhc'. Did you mean 'torch'?"),
        (("eval",), "MODEL: is required"),
        (("export", "a", "b"), "unexpected extra argument"),
        (("train", "--epochs"), "--epochs"),
    ],
)
def test_wrong_requests(run, argv: tuple[str, ...], expected: str) -> None:
    outcome = run(*argv)
    assert outcome.code == 2
    assert expected in outcome.err
    assert "hint:" in outcome.err or "--backend" in argv
    assert outcome.out == "" and "Traceback" not in outcome.err


def test_all_wrong_values_are_listed_at_once(run) -> None:
    outcome = run("distill", "--epochs", "ten", "--devices", "0", "--task", "foo", "--seed", "-1", "--student", "a")
    assert outcome.code == 2
    assert "4 problems" in outcome.err
    assert "--epochs: must be a whole number from 1 up (given: 'ten')" in outcome.err
    assert "--devices: must be a whole number from 1 up or 'auto' (given: '0')" in outcome.err
    assert "--task: 'foo' is not one of" in outcome.err
    assert "--seed: must be a whole number from 0 up (given: '-1')" in outcome.err
