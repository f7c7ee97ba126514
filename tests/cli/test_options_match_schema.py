"""Choices and defaults that the help names are those of the configuration, which the command line does not import."""

from __future__ import annotations

from typing import Any, get_args

import click
import pytest

from visionkd.cli.main import cli
from visionkd.config.schema import ComputeConfig, DistillConfig, FitTeacherConfig, RunConfig, TrainingConfig

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


def test_formats_of_export_are_named() -> None:
    formats = options("export")["--format"].type.choices
    for name in formats:
        assert name in options("distill")["--export"].help
