"""From a ``zoo:`` name to something on this machine: a packaged model, an ONNX file, or a published name. No torch."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from visionkd.errors import DataError, RequestError
from visionkd.files import sha256
from visionkd.hub import cache
from visionkd.hub.card import Artifact, Card, CheckpointArtifact, OnnxArtifact, PackageArtifact, PublishedArtifact
from visionkd.hub.index import card_file, read_card, split_name
from visionkd.hub.sources import fetch, is_offline
from visionkd.models.package_file import read_card as package_card
from visionkd.models.package_file import verified_weights
from visionkd.runtime.zoo_name import PREFIX
from visionkd.types import Listener, Progress

#: What the caller can run: networks in torch, ONNX files, or whichever this machine can.
Use = Literal["torch", "onnx", "any"]


@dataclass(frozen=True)
class Pulled:
    """A model of the zoo on this machine.

    Attributes:
        card: Its card.
        artifact: The form that was chosen.
        path: Its packaged directory or its ONNX file; None for weights that timm or torchvision keep.
        model: What stands for it wherever a MODEL is taken: ``path``, or the name of timm or torchvision.
        fetched: Whether it was fetched just now, and not found in the cache.
    """

    card: Card
    artifact: str
    path: Path | None
    model: str
    fetched: bool


def resolve(name: str, *, use: Use = "any") -> str:
    """Pull what a ``zoo:`` name stands for, and return it as a MODEL: a directory, an ONNX file or a published name.

    Args:
        name: ``zoo:NAME`` or ``zoo:NAME@ARTIFACT``.
        use: What the caller can run.
    """
    return pull(name, use=use).model


def locate(name: str, *, use: Use = "any") -> Pulled:
    """Return what :func:`pull` would bring and where it would lie, whether or not it is there; nothing is fetched.

    Raises:
        RequestError: If there is no such model or artifact, or it cannot be used so.
    """
    card = read_card(card_file(name))
    artifact = choose(card, split_name(name)[1], use=use)
    found = card.artifacts[artifact]
    if isinstance(found, PublishedArtifact):
        return Pulled(card, artifact, None, found.model, False)
    directory = cache.artifact_directory(card, artifact)
    path = directory / found.files[0].name if isinstance(found, OnnxArtifact) else directory
    return Pulled(card, artifact, path, str(path), False)


def pull(name: str, *, use: Use = "any", offline: bool | None = None, listener: Listener | None = None) -> Pulled:
    """Bring a model of the zoo onto this machine, unless it is there.

    Several processes may ask for the same model: one fetches it, and the others wait. Whatever interrupts this, what is
    in the cache under the model's name is whole and verified; the next call goes on from the part that was fetched.

    Args:
        name: ``NAME`` or ``NAME@ARTIFACT``, with or without ``zoo:``.
        use: What the caller can run; decides where the name leaves a choice.
        offline: Take nothing from the network; None asks the environment (``VISIONKD_OFFLINE``, ``HF_HUB_OFFLINE``).
        listener: Is told what happens; the steps of its progress are bytes.

    Raises:
        RequestError: If there is no such model or artifact, or it cannot be used so.
        DownloadError: If it is not to be had.
        DataError: If what is offered is refused.
    """
    listener = listener or Listener()
    located = locate(name, use=use)
    card, found = located.card, located.card.artifacts[located.artifact]
    offline = is_offline() if offline is None else offline
    if isinstance(found, PublishedArtifact):
        from visionkd.hub.published import fetch_published  # needs torch

        return replace(located, fetched=fetch_published(found, offline=offline, model=card.name))
    directory = cache.artifact_directory(card, located.artifact)
    fetched = False
    if _problem(directory, found) is not None:

        def waiting() -> None:
            listener.message(f"another process is fetching {PREFIX}{card.name}: waiting for it")

        with cache.locked(cache.lock_name(directory), on_wait=waiting):
            problem = _problem(directory, found)  # it may have come while this waited
            if problem is not None:
                if directory.exists():
                    listener.message(f"{directory}: {problem}; it is fetched anew", level="warning")
                    cache.discard(directory)
                _fill(directory, card, found, zoo=card_file(name).parent.parent, offline=offline, listener=listener)
                fetched = True
    cache.touch(directory)
    if fetched:
        for entry in cache.prune(keep=directory):
            listener.message(f"removed from the cache, unused for longest: {entry.model} {entry.artifact}".rstrip())
    return replace(located, fetched=fetched)


def is_pulled(card: Card, artifact: str) -> bool:
    """Tell whether an artifact is in the cache: in ours, or in that of timm or torchvision."""
    found = card.artifacts[artifact]
    if isinstance(found, PublishedArtifact):
        from visionkd.hub.published import published_file

        return published_file(found.model) is not None
    return cache.artifact_directory(card, artifact).is_dir()


def choose(card: Card, artifact: str | None, *, use: Use = "any") -> str:
    """Return the artifact that is meant: the one named, or the first that the caller and this machine can run.

    Raises:
        RequestError: If there is none.
    """
    has_torch = _has_torch()
    if artifact is not None and artifact not in card.artifacts:
        raise RequestError(
            f"{PREFIX}{card.name} has no artifact '{artifact}'", hint=f"It has: {', '.join(card.artifacts)}."
        )
    names = [artifact] if artifact is not None else list(card.artifacts)
    for name in names:
        is_onnx = isinstance(card.artifacts[name], OnnxArtifact)
        if (is_onnx and use != "torch") or (not is_onnx and use != "onnx" and has_torch):
            return name
    what = f"{PREFIX}{card.name}" + (f"@{artifact}" if artifact else "")
    onnx = [name for name, found in card.artifacts.items() if isinstance(found, OnnxArtifact)]
    if use == "torch" and onnx and names[0] in onnx:
        raise RequestError(
            f"{what} is an ONNX file: it can be evaluated, timed and used to predict, but not be trained, taught from "
            "or exported",
            hint=f"It has: {', '.join(card.artifacts)}.",
        )
    if use != "onnx" and not has_torch:
        raise RequestError(
            f"{what} holds weights for torch, which is not installed here",
            hint="Run: pip install 'visionkd[train]'" + (f", or name {PREFIX}{card.name}@{onnx[0]}" if onnx else ""),
        )
    raise RequestError(
        f"{what} is not an ONNX file",
        hint=f"Name one: {PREFIX}{card.name}@{onnx[0]}" if onnx else f"Write one: visionkd export {PREFIX}{card.name}",
    )


def verify(card: Card, artifact: str) -> None:
    """Compare the files of a pulled artifact with its card, every byte of them.

    Raises:
        DataError: If a file is missing or another one.
    """
    found = card.artifacts[artifact]
    if isinstance(found, PublishedArtifact):
        from visionkd.hub.published import check_published

        check_published(found, model=card.name)
        return
    directory = cache.artifact_directory(card, artifact)
    problem = _problem(directory, found, thorough=True)
    if problem is not None:
        raise DataError(f"'{directory}': {problem}", hint=f"Run: visionkd zoo pull {card.name}@{artifact}")


def _has_torch() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # something keeps it from being imported
        return False


def _problem(directory: Path, artifact: Artifact, *, thorough: bool = False) -> str | None:
    """Return what is wrong with a folder of the cache, None for nothing.

    Weights of a package are not read here unless ``thorough``: whoever loads them compares their hash.
    """
    if not directory.is_dir():
        return "it is not there"
    if isinstance(artifact, CheckpointArtifact):  # packaged here: model.json holds the hash of the weights
        missing = [name for name in ("model.json", "model.safetensors") if not (directory / name).is_file()]
        if missing or not thorough:
            return f"{missing[0]} is missing" if missing else None
        try:
            verified_weights(directory, package_card(directory))
        except DataError as error:
            return error.message
        return None
    for file in artifact.files:
        path = directory / file.name
        if not path.is_file():
            return f"{file.name} is missing"
        if path.stat().st_size != file.size_bytes:
            return f"{file.name} has another length than its card says"
        in_package = isinstance(artifact, PackageArtifact) and path.suffix == ".safetensors"
        if (thorough or not in_package) and sha256(path) != file.sha256:
            return f"{file.name} is damaged: its SHA-256 is not that of its card"
    return None


def _fill(directory: Path, card: Card, artifact: Artifact, *, zoo: Path, offline: bool, listener: Listener) -> None:
    """Fetch an artifact beside its folder and rename it; the artifact's lock is held."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        for stale in directory.parent.glob(f".{directory.name}.*"):  # of processes that were killed
            cache.discard(stale)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    except OSError as error:
        raise cache.write_error(error) from error
    total, done = sum(file.size_bytes for file in artifact.files), 0
    try:
        for file in artifact.files:

            def progress(have: int, before: int = done) -> None:
                listener.progress(Progress("pull", before + have, total))

            fetch(file, staging / file.name, zoo=zoo, offline=offline, progress=progress, model=card.name)
            done += file.size_bytes
        ready = staging
        if isinstance(artifact, CheckpointArtifact):
            from visionkd.hub.convert import package_checkpoint  # needs torch

            ready = staging / "package"
            package_checkpoint(card, artifact, staging / artifact.files[0].name, ready)
        _rename(ready, directory)
    finally:
        cache.discard(staging)


def _rename(ready: Path, directory: Path) -> None:
    try:
        umask = os.umask(0)  # mkdtemp makes the folder private; give it the rights of any other
        os.umask(umask)
        os.chmod(ready, 0o777 & ~umask)
        os.replace(ready, directory)
    except OSError as error:
        raise cache.write_error(error) from error
