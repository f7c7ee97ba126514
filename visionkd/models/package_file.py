"""Reading a packaged model: ``model.safetensors`` beside ``model.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visionkd.errors import DataError
from visionkd.files import sha256

FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
#: Decoder of a masked pre-training, beside the encoder that is the model.
DECODER_FILE = "decoder.safetensors"
#: Text encoder of a contrastive training, beside the image encoder that is the model.
TEXT_FILE = "text.safetensors"
_REQUIRED = ("architecture", "source", "model_args", "num_classes", "input", "task", "sha256")


def read_card(directory: Path) -> dict[str, Any]:
    """Return the content of ``model.json``, checked.

    Raises:
        DataError: If it is damaged, lacks keys, or was written by a newer version.
    """
    path = directory / CARD_FILE
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"'{path}' cannot be read: {error}", hint="Copy the packaged model again.") from error
    if not isinstance(card, dict):
        raise DataError(f"'{path}' does not describe a model", hint="Copy the packaged model again.")
    written = card.get("format")
    if written != FORMAT:
        raise DataError(
            f"'{path}' has format {written}, and this version reads format {FORMAT}",
            hint="Update visionkd: pip install --upgrade visionkd"
            if isinstance(written, int)
            else "Package the model again.",
        )
    missing = [key for key in _REQUIRED if key not in card]
    if missing:
        raise DataError(f"'{path}' lacks {', '.join(missing)}", hint="Package the model again.")
    return card


def verified_weights(directory: Path, card: dict[str, Any], file: str = WEIGHTS_FILE) -> Path:
    """Return the path of the weights (or of another file) after comparing their SHA-256 with the card's.

    Raises:
        DataError: If they are absent, or not the ones that the card describes.
    """
    path = directory / file
    if not path.is_file():
        raise DataError(f"'{path}' is missing", hint="Copy the packaged model again, with all of its files.")
    expected = card["sha256"]
    expected = expected.get(file) if isinstance(expected, dict) else expected
    found = sha256(path)
    if found != expected:
        raise DataError(
            f"'{path}' is damaged or was replaced: its SHA-256 is {found}, and {CARD_FILE} says {expected}",
            hint="Copy the packaged model again, or package it anew from its run.",
        )
    return path
