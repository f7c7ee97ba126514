"""The models that this project trained: files as their cards say, small enough to keep, made by a command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from visionkd.files import sha256
from visionkd.hub.card import Card, CheckpointArtifact, PublishedArtifact
from visionkd.hub.index import read_card
from visionkd.workflows import show_config

ZOO = Path(__file__).resolve().parents[2] / "zoo"
CARDS = [read_card(file) for file in sorted(ZOO.glob("*/*.yaml"))]
OWN = [card for card in CARDS if card.origin == "own"]
LARGEST_MB = 40.0


def repository_files(card: Card) -> dict[str, tuple[str, int]]:
    """Return hash and size of each file of the repository that a card names."""
    found = {}
    for artifact in card.artifacts.values():
        for file in () if isinstance(artifact, PublishedArtifact) else artifact.files:
            for source in file.sources:
                if source.kind == "repository":
                    found[source.path] = (file.sha256, file.size_bytes)
    return found


def test_the_weights_are_small_enough_and_each_belongs_to_a_card() -> None:
    files = [file for file in (ZOO / "weights").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) / 1e6 < LARGEST_MB
    named = {path for card in CARDS for path in repository_files(card)}
    assert {file.relative_to(ZOO).as_posix() for file in files} == named


def test_names_are_unique_and_so_are_their_folders() -> None:
    names = [card.name for card in CARDS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("card", OWN, ids=lambda card: card.name)
def test_an_own_model_is_what_its_card_says(card: Card) -> None:
    files = repository_files(card)
    assert files, "an own model has its files in the repository"
    for path, (digest, size) in files.items():
        assert path.startswith(f"weights/{card.name}/")
        assert ((ZOO / path).stat().st_size, sha256(ZOO / path)) == (size, digest), path


@pytest.mark.parametrize("card", OWN, ids=lambda card: card.name)
def test_an_own_model_can_be_made_again_and_was_measured(card: Card) -> None:
    training = card.training
    assert training.recipe is not None and show_config(training.recipe)
    assert training.command is not None and f"--config {training.recipe} " in training.command
    assert re.search(r"--out runs/\S+", training.command) and "/tmp" not in training.command
    assert training.commit and not training.commit.endswith("-dirty")
    assert card.licence != "unknown"
    measured = {row.artifact for row in card.metrics if row.by == "here"}
    assert measured == {form for form, found in card.artifacts.items() if not isinstance(found, CheckpointArtifact)}
    assert all(row.images for row in card.metrics)


def test_every_own_model_says_whom_it_learned_from() -> None:
    names = {card.name for card in CARDS}
    for card in OWN:
        teachers = [name for name in (card.training.teacher or "").split(", ") if name.startswith("zoo:")]
        assert {name.removeprefix("zoo:") for name in teachers} <= names, card.name
