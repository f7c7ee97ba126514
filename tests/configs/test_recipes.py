"""Every recipe parses, names the command that runs it, and has its row in ``configs/README.md``."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from pydantic import BaseModel

from visionkd import registry
from visionkd.cli._base import LazyGroup
from visionkd.config.load import dump_config, load_config
from visionkd.config.quantize import QuantizeConfig
from visionkd.config.schema import DistillConfig, RunConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    file.relative_to(ROOT / "configs").with_suffix("").as_posix(): file for file in ROOT.glob("configs/**/*.y*ml")
}
KINDS: dict[str, type[RunConfig]] = {"distill": DistillConfig, "train": TrainConfig, "quantize": QuantizeConfig}
#: What a general recipe has in the place of its data; such a recipe shows every key there is.
PLACEHOLDER = "path/to/images"
FREE_FORM = ("options", "args")
GENERAL = sorted(
    name for name, file in RECIPES.items() if yaml.safe_load(file.read_text("utf-8"))["data"]["path"] == PLACEHOLDER
)
METHODS = registry.names("visionkd.methods")

every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


def header(text: str) -> list[str]:
    """Return the lines of the comment that a recipe begins with, without the comment signs."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return lines


def commands(text: str) -> list[list[str]]:
    """Return the words of each ``visionkd`` command in a recipe's header; those of a code block, not of a sentence."""
    return [shlex.split(line) for line in header(text) if line.startswith("  visionkd ")]


def value_of(words: list[str], option: str) -> str | None:
    """Return what follows ``option`` in a command, None where it is not given."""
    return words[words.index(option) + 1] if option in words else None


def own_command(name: str, text: str) -> list[str]:
    """Return the command that runs the recipe itself; the others make what it needs."""
    own = [words for words in commands(text) if value_of(words, "--config") == name]
    assert len(own) == 1, f"the header of {name} has {len(own)} commands with '--config {name}'"
    return own[0]


def parsed(words: list[str]) -> dict[str, Any]:
    """Parse a command with the real command line, without running it, and return its parameters."""
    group = LazyGroup("visionkd")
    context = click.Context(group, info_name="visionkd")
    name, command, rest = group.resolve_command(context, words[1:])
    assert isinstance(command, click.Command)
    return command.make_context(name, rest, parent=context).params


def config_of(name: str) -> RunConfig:
    text = RECIPES[name].read_text("utf-8")
    return load_config(KINDS[own_command(name, text)[1]], text=text, where=name, method_options=method_options)


def method_options(method: str) -> type | None:
    return None if method == "auto" else importlib.import_module(f"visionkd.methods.{method}").METHOD.Options


def keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of everything in a nested mapping; the items of a list share one path."""
    items = values.items() if isinstance(values, dict) else [(None, item) for item in values]
    for key, value in items:
        path = prefix if key is None else f"{prefix}.{key}".lstrip(".")
        if key is not None:
            yield path
        if key not in FREE_FORM and isinstance(value, (dict, list)):
            yield from keys(value, path)


def schema_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in kind.model_fields.items():
        path = f"{prefix}.{key}".lstrip(".")
        yield path
        nested = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for inner in nested:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from schema_keys(inner, path)


def test_there_are_recipes_in_a_folder_for_each_task() -> None:
    assert RECIPES, "no recipe was found: the tests below would all be empty"
    assert GENERAL, "no general recipe was found"
    assert [name for name in RECIPES if name.count("/") != 1] == []


@every_recipe
def test_a_recipe_is_valid(name: str) -> None:
    config = config_of(name)
    assert load_config(type(config), text=dump_config(config)) == config
    assert config.task == name.split("/")[0]


@every_recipe
def test_a_recipe_begins_with_a_summary_and_the_exact_command(name: str) -> None:
    lines = header(RECIPES[name].read_text("utf-8"))
    assert re.fullmatch(r"\S.{20,}\.( .+)?", lines[0]) and len(lines[0]) <= 128
    words = own_command(name, "\n".join(f"# {line}" if line else "#" for line in lines))
    assert "--out" in words, "a reader should know where the result lies"


@every_recipe
def test_every_command_in_a_header_is_one_that_the_command_line_takes(name: str) -> None:
    for words in commands(RECIPES[name].read_text("utf-8")):
        params = parsed(words)
        assert params["config"] is None or params["config"] in RECIPES, f"{params['config']} is no recipe"


@every_recipe
def test_what_a_recipe_needs_is_made_by_a_command_before_it(name: str) -> None:
    text = RECIPES[name].read_text("utf-8")
    config, own = config_of(name), own_command(name, text)
    earlier = commands(text)[: commands(text).index(own)]
    made = {value_of(words, "--out") for words in earlier}
    wanted = {teacher.name for teacher in getattr(config, "teachers", ()) if teacher.name.startswith("runs/")}
    wanted |= {value_of(own, "--baseline")} - {None}
    wanted |= {init for init in [getattr(config, "init", None)] if init and init.startswith("runs/")}
    assert wanted <= made


@pytest.mark.parametrize("name", GENERAL)
def test_a_general_recipe_shows_every_key(name: str) -> None:
    values = yaml.safe_load(RECIPES[name].read_text("utf-8"))
    elsewhere = ("augment.hard.", "losses.")  # the first are in hard.yaml, the second below each method's name
    if name != "classification/kd":
        elsewhere += ("int8",)  # the same for every method
    task = name.split("/")[0]
    elsewhere += ("data.shapes.vocabulary",)  # in the recipes of shapes
    elsewhere += () if task == "segmentation" else ("segmentation", "data.ignore")
    elsewhere += () if task == "detection" else ("detection", "data.novel")
    elsewhere += ("data.classes",) if task == "classification" else ()
    ends = (".backbone",) if task == "classification" else ()
    shown = {key for key in schema_keys(type(config_of(name))) if not key.startswith(elsewhere)}
    shown = {key for key in shown if not key.endswith(ends)}
    assert sorted(shown - set(keys(values))) == []
    if "method" in values:
        options = method_options(values["method"])
        assert list(values["options"]) == list(getattr(options, "__dataclass_fields__"))  # noqa: B009 - a plain type


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe_and_a_page(method: str) -> None:
    tasks = importlib.import_module(f"visionkd.methods.{method}").METHOD.tasks
    found = [
        name for name in RECIPES if name.split("/")[1] == method and getattr(config_of(name), "method", None) == method
    ]
    assert {name.split("/")[0] for name in found} == set(tasks)
    assert (ROOT / "docs" / "methods" / f"{method}.md").is_file()


def test_the_table_has_one_row_for_each_recipe() -> None:
    rows = re.findall(
        r"^\| \[`([^`]+)`\]\(([^)]+)\) \|", (ROOT / "configs" / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(RECIPES)
    assert [(name, link) for name, link in rows if (ROOT / "configs" / link) != RECIPES[name]] == []


def test_the_table_names_the_command_of_each_header() -> None:
    text = (ROOT / "configs" / "README.md").read_text("utf-8")
    rows = {match[1]: match[0] for match in re.finditer(r"^\| \[`([^`]+)`\].*$", text, re.MULTILINE)}
    wrong = [
        name
        for name, row in rows.items()
        if f"`{shlex.join(own_command(name, RECIPES[name].read_text('utf-8')))}`" not in row
    ]
    assert wrong == []


@every_recipe
def test_the_table_states_the_epochs(name: str) -> None:
    text = (ROOT / "configs" / "README.md").read_text("utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| [`{name}`]"))
    assert re.findall(r"(\d+) epochs", row) == [str(config_of(name).training.epochs)]


@pytest.mark.parametrize(
    "words",
    [
        ["visionkd", "distill", "--config", "classification/kd", "--epoch", "3"],
        ["visionkd", "distil", "--config", "classification/kd"],
        ["visionkd", "train", "--config", "classification/train", "--epochs", "three"],
    ],
)
def test_the_check_of_commands_finds_wrong_ones(words: list[str]) -> None:
    from visionkd.errors import RequestError

    with pytest.raises((click.UsageError, RequestError)):
        parsed(words)


def test_the_check_of_keys_finds_a_missing_one() -> None:
    values = yaml.safe_load(RECIPES[GENERAL[0]].read_text("utf-8"))
    del values["training"]["log_every"]
    del values["teachers" if "teachers" in values else "model"]
    assert "training.log_every" in set(schema_keys(config_of(GENERAL[0]).__class__)) - set(keys(values))
