"""What a MODEL argument means: a timm or torchvision name, a package, or a checkpoint file."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from visionkd import registry
from visionkd.errors import RequestError, did_you_mean
from visionkd.models.aliases import ALIASES
from visionkd.models.detection import names as detection
from visionkd.models.segmentation import names as segmentation

_TORCHVISION = (*segmentation.TORCHVISION, *detection.TORCHVISION)
#: What the names of open_clip's image-text encoders begin with: none of them is a network that names classes.
OPEN_CLIP = "open_clip:"
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Resolved:
    """What a name stands for.

    Attributes:
        source: Where the network comes from.
        architecture: timm or torchvision name, ``HEAD_BACKBONE`` or ``DETECTOR_BACKBONE``; for a hub model its
            ``hf-hub:`` name; None where a file tells.
        tag: Name of the published weights; None takes the default ones.
        path: Package directory or checkpoint file.
        note: A choice made on the user's behalf, to be said aloud.
        library: Library that builds the architecture; ``visionkd`` joins a head and a backbone of timm.
        zoo: The ``zoo:`` name that was given; what it stands for may yet have to be fetched.
    """

    source: Literal["timm", "torchvision", "visionkd", "package", "file"]
    architecture: str | None = None
    tag: str | None = None
    path: Path | None = None
    note: str | None = None
    library: Literal["timm", "torchvision", "visionkd"] | None = None
    zoo: str | None = None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep timm's, torchvision's and the hub's chatter from the user; errors are ours to word."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub", "torch.hub", "httpx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def resolve_name(name: str) -> Resolved:
    """Find out what ``name`` stands for.

    Names of networks come before directories and files of the same name; ``./name`` always means the path.

    Raises:
        RequestError: If it stands for nothing; the nearest names are offered.
    """
    name = os.fspath(name).strip()
    if not name:
        raise RequestError("the name of the network is empty", hint="Give a name such as resnet50.")
    if name.startswith("zoo:"):
        found = registry.load("visionkd.hub", "pull", key="zoo").locate(name, use="torch")  # by name: hub/ is above
        published = resolve_name(found.model) if found.path is None else Resolved("package", path=found.path)
        return replace(published, zoo=name)
    if name.startswith(("hf-hub:", "hf_hub:")):
        return Resolved("timm", "hf-hub:" + name.split(":", 1)[1], library="timm")
    if name.startswith("local-dir:"):
        return Resolved("timm", name, library="timm")
    if "@" in name and not name.startswith(OPEN_CLIP):
        architecture, _, file = name.partition("@")
        return _file(name, architecture, Path(os.path.expanduser(file)))
    network = _network(name)
    path = Path(os.path.expanduser(name))
    if network is not None:
        if package_directory(path) is not None:
            note = f"'{name}' is taken as the network of that name; write './{name}' for the directory"
            return Resolved(network.source, network.architecture, network.tag, None, note, network.library)
        return network
    if os.path.isdir(path):  # pathlib raises where a name is too long for the file system
        found = package_directory(path)
        if found is None:
            raise RequestError(
                f"the directory '{name}' is neither a packaged model nor a finished run: it has no model.json and no "
                "model/model.json",
                hint="A run packages its model when it ends; continue an unfinished one with --resume --out DIR.",
            )
        return Resolved("package", path=found)
    if os.path.isfile(path):
        return _file(name, None, path)
    raise _unknown(name)


def fetched(resolved: Resolved) -> Path | None:
    """Return the package or file of a resolved name, pulled from the zoo where it comes from there and is not here.

    Raises:
        DownloadError: If it is not to be had.
    """
    if resolved.zoo is not None:
        registry.load("visionkd.hub", "pull", key="zoo").pull(resolved.zoo, use="torch")
    return resolved.path


def package_directory(path: Path) -> Path | None:
    """Return the directory that holds ``model.json``: ``path`` itself or its ``model/``; None if there is none."""
    for candidate in (path, path / "model"):
        if (candidate / "model.json").is_file():
            return candidate
    return None


def known_names() -> tuple[str, ...]:
    """Return every name of a network: aliases, timm's and torchvision's."""
    import timm

    import visionkd.models.cifar_resnet  # noqa: F401  (registers its networks with timm)
    import visionkd.models.free_mobilenet  # noqa: F401  (the same)

    torchvision_names = [f"torchvision/{name}" for name in _torchvision_names()]
    return tuple(sorted({*ALIASES, *timm.list_models(), *torchvision_names}))


def _torchvision_names() -> list[str]:
    import torchvision

    return [*torchvision.models.list_models(module=torchvision.models), *_TORCHVISION]


def _parts(name: str) -> tuple[str, str] | None:
    """Return what stands on a backbone, and the backbone, as the name says it."""
    return segmentation.split_name(name) or detection.split_name(name)


def _head_on_backbone(name: str) -> Resolved | None:
    """Return the segmentation network ``HEAD_BACKBONE`` or the detector ``DETECTOR_BACKBONE``, or None."""
    parts = _parts(name)
    backbone = None if parts is None else _network(parts[1])
    if backbone is None or backbone.source != "timm":
        return None
    architecture = f"{parts[0]}_{backbone.architecture}"
    return Resolved("visionkd", architecture, backbone.tag, None, backbone.note, "visionkd")


def _network(name: str) -> Resolved | None:
    """Return the network called ``name``, or None."""
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    import visionkd.models.cifar_resnet  # noqa: F401  (registers its networks with timm)
    import visionkd.models.free_mobilenet  # noqa: F401  (the same)

    library, _, rest = name.rpartition("/")
    if library not in ("", "timm", "torchvision", "visionkd"):
        return None
    note = None
    architecture, tag = split_model_name_tag(rest)
    if library == "visionkd" or (not library and architecture not in _TORCHVISION and _parts(rest)):
        return _head_on_backbone(rest)
    if not library and architecture in ALIASES:
        target = ALIASES[architecture]
        note = f"'{architecture}' stands for {target}"
        library, _, architecture = target.rpartition("/")
    if library != "torchvision" and timm.is_model(architecture):
        tags = [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]
        if tag and tag not in tags:
            known = ", ".join(sorted(filter(None, tags))) or "none"
            raise RequestError(
                f"'{architecture}' has no weights called '{tag}'",
                hint=did_you_mean(tag, tags) or f"Published weights of {architecture}: {known}",
            )
        return Resolved("timm", architecture, tag or None, None, note, "timm")
    if library != "timm" and architecture in _torchvision_names():
        if tag:
            from torchvision.models import get_model_weights

            tags = [weights.name for weights in get_model_weights(architecture)]
            if tag not in tags:
                raise RequestError(f"'{architecture}' has no weights called '{tag}'", hint=f"Known: {', '.join(tags)}")
        return Resolved("torchvision", architecture, tag or None, None, note, "torchvision")
    return None


def _file(name: str, architecture: str | None, path: Path) -> Resolved:
    """Resolve ``ARCHITECTURE@FILE``, or a bare file that carries its architecture."""
    if not os.path.exists(path):
        raise RequestError(f"'{name}': there is no file '{path}'", hint="Name an existing file after the '@'.")
    if path.is_dir():
        raise RequestError(
            f"'{name}': '{path}' is a directory",
            hint="Name the weight file in it, or the directory alone if it is a package.",
        )
    if path.suffix == ".onnx":
        raise RequestError(
            f"'{path}' is an ONNX file: it can be evaluated, benchmarked and used to predict, but not be trained or "
            "taught from",
            hint="Name the run directory or the packaged model that it was exported from.",
        )
    if architecture is None:
        if path.suffix != ".safetensors":
            raise RequestError(
                f"'{path}' does not say which architecture its weights are for",
                hint=f"Write ARCHITECTURE@FILE, for example resnet18@{path}",
            )
        return Resolved("file", path=path)
    network = _network(architecture)
    if network is None:
        raise _unknown(architecture)
    return Resolved("file", network.architecture, network.tag, path, network.note, network.library)


def _unknown(name: str) -> RequestError:
    if name.startswith(OPEN_CLIP):
        return RequestError(
            f"'{name}' is an image-text encoder, not a network that names classes, pixels or boxes",
            hint="It teaches a detector: visionkd distill --method oadp --student fasterrcnn_BACKBONE",
        )
    looks_like_path = os.sep in name.removeprefix("torchvision/").removeprefix("timm/") or name.endswith(_WEIGHT_FILES)
    if looks_like_path or name.startswith((".", "~")):
        return RequestError(
            f"there is no file or directory '{name}', nor a network of that name",
            hint="A model is a run directory, a packaged model, ARCHITECTURE@FILE, or a timm or torchvision name.",
        )
    bare = name.rpartition("/")[2].partition(".")[0]
    prefix = "torchvision/" if name.startswith("torchvision/") else ""
    names = known_names()
    for unknown_part in (segmentation.unknown_part, detection.unknown_part):
        if (found := unknown_part(name, names)) is not None:
            return found
    near = did_you_mean(prefix + bare, names) or did_you_mean(prefix + bare.replace("-", "_"), names)
    hint = near or f"Any timm or torchvision name works, and these: {', '.join(sorted(ALIASES))}"
    return RequestError(f"unknown network '{name}'", hint=hint)
