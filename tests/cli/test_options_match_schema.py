"""Choices and defaults that the help names are those of the configuration, which the command line does not import."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
import pytest

from visionkd.cli.main import cli
from visionkd.config.int8 import Int8Config
from visionkd.config.quantize import QuantizeConfig
from visionkd.config.schema import ComputeConfig, DistillConfig, FitTeacherConfig, RunConfig, TrainingConfig
from visionkd.config.search import SearchConfig

OPTIONS = {
    "--task": (RunConfig, "task"),
    "--epochs": (TrainingConfig, "epochs"),
    "--batch-size": (TrainingConfig, "batch_size"),
    "--seed": (TrainingConfig, "seed"),
    "--precision": (TrainingConfig, "precision"),
    "--accelerator": (ComputeConfig, "accelerator"),
    "--devices": (ComputeConfig, "devices"),
    "--nodes": (ComputeConfig, "nodes"),
    "--strategy": (ComputeConfig, "strategy"),
    "--fit-teacher": (FitTeacherConfig, "mode"),
    "--method": (DistillConfig, "method"),
}


def options(command: str) -> dict[str, Any]:
    loaded = cli.get_command(click.Context(cli), command)
    assert loaded is not None
    return {name: one for one in loaded.params for name in one.opts if isinstance(one, click.Option)}


@pytest.mark.parametrize("spelling", OPTIONS)
@pytest.mark.parametrize("command", ["distill", "train"])
def test_an_option_agrees_with_its_key(command: str, spelling: str) -> None:
    option = options(command).get(spelling)
    if option is None:
        assert command == "train" and spelling in ("--fit-teacher", "--method")
        return
    section, key = OPTIONS[spelling]
    field = section.model_fields[key]
    assert option.stated_default == str(field.default)
    assert f"Default: {field.default}." in option.help
    if isinstance(option.type, click.Choice):
        assert list(option.type.choices) == list(get_args(field.annotation))


QUANTIZE = {
    "--calibration": (Int8Config, "calibration"),
    "--images": (Int8Config, "images"),
    "--bits": (QuantizeConfig, "bits"),
    "--batch-size": (TrainingConfig, "batch_size"),
    "--seed": (TrainingConfig, "seed"),
    "--precision": (TrainingConfig, "precision"),
}


@pytest.mark.parametrize("spelling", QUANTIZE)
def test_an_option_of_quantize_agrees_with_its_key(spelling: str) -> None:
    option, (section, key) = options("quantize")[spelling], QUANTIZE[spelling]
    field = section.model_fields[key]
    assert option.stated_default == str(field.default)
    if isinstance(option.type, click.Choice):
        assert list(option.type.choices) == list(get_args(field.annotation))


def test_the_schemes_of_quantize_are_those_of_the_workflow() -> None:
    from visionkd.workflows.quantize import SCHEMES

    assert list(options("quantize")["--scheme"].type.choices) == list(SCHEMES)


SEARCH = ("score", "evaluations", "strategy", "population", "tournament", "seed", "init", "batch_size")


@pytest.mark.parametrize("key", SEARCH)
def test_an_option_of_search_agrees_with_its_key(key: str) -> None:
    option, field = options("search")[f"--{key.replace('_', '-')}"], SearchConfig.model_fields[key]
    assert option.stated_default == str(field.default)
    if isinstance(option.type, click.Choice):
        assert list(option.type.choices) == list(get_args(field.annotation))


def test_spaces_and_scores_of_search_are_named() -> None:
    from visionkd.search.budget import BUDGETS
    from visionkd.search.scores import score_names
    from visionkd.search.spaces import space_names

    page = (Path(__file__).resolve().parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    command = cli.get_command(click.Context(cli), "search")
    assert all(f"`{name}`" in page for name in (*score_names(), *space_names()))
    assert all(name in command.help for name in space_names())
    assert all(name in options("search")["--budget"].help and f"`{name}=" in page for name in BUDGETS)


def test_formats_of_export_are_named() -> None:
    formats = get_args(get_args(RunConfig.model_fields["export"].annotation.model_fields["formats"].annotation)[0])
    assert set(formats) <= set(options("export")["--format"].type.choices)
    for name in formats:
        assert name in options("distill")["--export"].help
