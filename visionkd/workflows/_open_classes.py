"""Other classes for a detector whose classes are texts."""

from __future__ import annotations

from collections.abc import Sequence

from visionkd.errors import Problem, RequestError
from visionkd.models.detection.open_network import OpenVocabularyDetector
from visionkd.models.network import Network
from visionkd.teachers.encoders import open_encoder


def take_classes(network: Network, classes: Sequence[str], *, model: str, encoder: str | None = None) -> None:
    """Let a detector answer for other classes, by what its encoder makes of their names.

    Args:
        network: The detector.
        classes: Names, in any order.
        model: What the user called the detector.
        encoder: MODEL of its image-text encoder; None takes the one that its package remembers.

    Raises:
        RequestError: If it has a fixed list of classes, the encoder is not there or another one, or a name is one that
            the encoder cannot read.
    """
    if not isinstance(network, OpenVocabularyDetector):
        hint = "One that takes others is trained with 'visionkd distill --method oadp --teacher ENCODER'."
        raise RequestError(Problem("--classes", f"'{model}' has the classes that it was trained on", hint))
    names = [name.strip() for name in classes]
    if not all(names) or len(set(names)) < len(names) or not names:
        said = "needs names, and each of them once"
        raise RequestError(Problem("--classes", said, "Example: --classes 'red circle,blue star'"))
    spec, name = network.spec, encoder or network.spec.encoder
    try:
        opened = open_encoder(name)
    except RequestError as error:
        if encoder is not None:
            raise
        said = f"'{model}' was trained with the encoder '{name}', which is not to be had here: {error.message}"
        raise RequestError(said, hint="Say where it lies with --encoder MODEL.") from error
    if opened.identity.partition("-")[0] != spec.identity.partition("-")[0]:
        said = f"'{name}' has other weights than the encoder that '{model}' was trained with ('{spec.encoder}')"
        raise RequestError(Problem("--encoder", said, "Its texts would mean nothing to the detector: name that one."))
    texts = opened.encode_text(names, spec.templates)
    known = {each for each, base in zip(network.classes or (), network.base, strict=True) if base}
    network.set_classes(names, texts.to(network.texts), base=[each in known for each in names])
