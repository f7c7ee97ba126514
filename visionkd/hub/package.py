"""A packaged model: ``model.safetensors`` with plain weights, ``model.json`` with all that is needed to use them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

import visionkd
from visionkd import registry
from visionkd.files import sha256
from visionkd.models.factory import Network, load_packaged
from visionkd.models.package_file import CARD_FILE, DECODER_FILE, FORMAT, TEXT_FILE, WEIGHTS_FILE
from visionkd.types import TaskName


def save_package(
    network: Network,
    directory: str | os.PathLike[str],
    *,
    task: TaskName,
    classes: Sequence[str] | None,
    metrics: Mapping[str, float],
    origin: Mapping[str, Any],
    note: str = "",
) -> Path:
    """Write ``network`` as a packaged model; the directory is complete or absent, and replaces a former one.

    Args:
        network: What to package. Its plain weights are written: they load into timm or torchvision without visionkd.
            Those of a quantised network lie among them, with its scales. The decoder of a masked pre-training and the
            text encoder of a contrastive training get files of their own.
        directory: Where to; its parent must exist or be creatable.
        task: Task that the outputs serve.
        classes: Class names in output order; None takes the network's.
        metrics: Measured values by name, such as ``val/top1``.
        origin: How it came about: run, method, teachers, data, versions.
        note: What the metrics are, where they are not what their names say.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    classes = network.classes if classes is None else tuple(classes)
    if classes is not None and len(classes) != network.num_classes:
        raise ValueError(f"{len(classes)} class names for {network.num_classes} outputs")
    identity = {
        "architecture": network.architecture,
        "source": network.source,
        "model_args": network.model_args,
        "num_classes": network.num_classes,
        "classes": list(classes) if classes is not None else None,
        "input": network.input.to_dict(),
    }
    # Clones, because safetensors refuses tensors that share memory, as tied weights do.
    quantization, state = network.quantization, network.net.state_dict()
    if network.packed is not None:  # by name, as hub/ and quantization/ stand side by side
        quantization, state = registry.load("visionkd.quantization", "packing", key="quantization").stored(network)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in identity.items()}
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        content = _in_order(save(tensors, metadata={"format": "pt", **metadata}))
        (temporary / WEIGHTS_FILE).write_bytes(content)
        decoder = network.masked_decoder
        if decoder is not None:
            (temporary / DECODER_FILE).write_bytes(_in_order(save(dict(decoder.tensors), metadata={"format": "pt"})))
        texts = network.image_text
        if texts is not None:
            (temporary / TEXT_FILE).write_bytes(_in_order(save(dict(texts.tensors), metadata={"format": "pt"})))
        card = {
            "format": FORMAT,
            **identity,
            "pretrained_tag": network.pretrained_tag,
            **({"quantization": quantization} if quantization is not None else {}),
            **({"decoder": decoder.spec.to_dict()} if decoder is not None else {}),
            **({"text": texts.spec.to_dict()} if texts is not None else {}),
            "task": task,
            "metrics": dict(metrics),
            **({"metrics_note": note} if note else {}),
            "origin": {"visionkd": visionkd.__version__, **origin},
            "sha256": {file.name: sha256(file) for file in sorted(temporary.glob("*.safetensors"))},
        }
        (temporary / CARD_FILE).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files = list(temporary.iterdir())
        for file in files:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        for file in files:
            os.chmod(file, 0o666 & ~umask)
        _swap(temporary, directory)
        for stale in directory.parent.glob(f".{directory.name}.*"):  # left by a process that was killed
            if stale.suffix in (".tmp", ".old"):
                shutil.rmtree(stale, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def load_package(directory: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Return the network of a packaged model (or of a run that holds one), in eval mode, and its ``model.json``.

    Raises:
        DataError: If a file is missing or its SHA-256 is not the one that was written down.
    """
    directory = Path(directory)
    inner = directory / "model"
    return load_packaged(
        inner if not (directory / CARD_FILE).is_file() and (inner / CARD_FILE).is_file() else directory
    )


def _swap(temporary: Path, directory: Path) -> None:
    """Rename ``temporary`` to ``directory``, over a former one."""
    if not directory.exists():
        os.replace(temporary, directory)
        return
    # A directory cannot be renamed over one that is not empty, so the former one steps aside for a moment.
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".old", dir=directory.parent))
    os.replace(directory, aside / directory.name)
    try:
        os.replace(temporary, directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.replace(aside / directory.name, directory)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _in_order(content: bytes) -> bytes:
    """Sort the header of a safetensors file, whose order is left to chance: equal weights then make equal files."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
