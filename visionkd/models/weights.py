"""Reading weights from files that others wrote, without ever running code from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkd.errors import DataError, RequestError, first_line

#: Keys under which training programs keep their weights, the averaged ones first.
_CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "student",
    "teacher",
    "module",
    "params",
    "weights",
)
_PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "net.",
    "model.",
    "ema.module.",
    "student.",
    "teacher.",
    "backbone.",
    "network.",
)
#: Counters of profilers and of batch norm, which decide nothing.
_IGNORED_ENDINGS = ("total_ops", "total_params", "num_batches_tracked")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict in ``path`` and, for safetensors, its metadata.

    Raises:
        RequestError: If the file would need unpickling of arbitrary objects, or holds no weights.
        DataError: If it is damaged.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"'{path}' holds Python objects beside its tensors, and reading those would run code from the file; "
            "weights are only read with weights_only=True",
            hint="Where you trust the file, convert it once in the environment it was written in:\n"
            "    import torch\n"
            f"    content = torch.load({str(path)!r}, weights_only=False)  # a module, or a dict that holds one\n"
            "    torch.save(content.state_dict(), 'weights.pt')\n"
            "and name weights.pt instead.",
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise DataError(
            f"'{path}' cannot be read as a weight file: {first_line(error)[:200]}", hint="Copy or download it again."
        ) from error
    return _find_state_dict(content, path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"'{path}' cannot be read as a safetensors file: {first_line(error)[:200]}",
            hint="Copy or download it again.",
        ) from error


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors and len(tensors) >= len(content) - 2:
            return tensors
        for key in _CONTAINERS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and inner:
                return _find_state_dict(inner, path)
        if tensors:
            return tensors
        keys = ", ".join(str(key) for key in itertools.islice(content, 10))
        raise RequestError(
            f"'{path}' holds no weights: its keys are {keys}", hint=f"Expected one of: {', '.join(_CONTAINERS)}"
        )
    raise RequestError(f"'{path}' holds a {type(content).__name__}, not a state dict", hint="Save module.state_dict().")


def strip_prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of ``tensors`` under the prefix that fits ``wanted`` best, the prefix removed.

    Prefixes of wrappers (``module.``, ``_orig_mod.``, ``net.``, ``student.`` and so on) may be nested up to three deep.
    """
    found = [""]
    for depth in range(3):
        for head in [prefix for prefix in found if prefix.count(".") == depth or not depth]:
            for prefix in _PREFIXES[1:]:
                longer = head + prefix
                if longer not in found and any(key.startswith(longer) for key in tensors):
                    found.append(longer)
    best: dict[str, Tensor] = {}
    best_score = -1
    for prefix in found:
        part = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        score = sum(key in wanted for key in part)
        if score > best_score:
            best, best_score = part, score
    return best


def infer_num_classes(tensors: Mapping[str, Tensor], heads: tuple[str, ...]) -> int | None:
    """Return how many outputs the classifier called one of ``heads`` has in ``tensors``."""
    for head in heads:
        weight = tensors.get(f"{head}.weight")
        if weight is not None and weight.ndim >= 2:
            return weight.shape[0]
    return None


def load_tensors(net: nn.Module, tensors: Mapping[str, Tensor], *, path: Path, architecture: str) -> None:
    """Load ``tensors`` into ``net``, every key of it.

    Where the keys differ, timm's own conversion for the family is tried (original names, resampled positions).

    Raises:
        RequestError: Lists what is missing, unexpected or of another shape.
    """
    problems = _differences(net, tensors)
    if problems:
        convert = getattr(sys.modules.get(type(net).__module__), "checkpoint_filter_fn", None)
        if convert is not None:
            try:
                converted = convert(dict(tensors), net)
            except Exception:  # the conversion presumes keys of its family, and fails in any way on others
                converted = tensors
            if not _differences(net, converted):
                tensors, problems = converted, []
    if problems:
        raise RequestError(
            f"'{path}' does not fit '{architecture}':\n" + "\n".join(f"  {problem}" for problem in problems),
            hint="Name the architecture that the file was written for: ARCHITECTURE@FILE.",
        )
    known = net.state_dict().keys()
    net.load_state_dict({key: value for key, value in tensors.items() if key in known}, strict=False)


def _differences(net: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    wanted = net.state_dict()
    missing = [key for key in wanted if key not in tensors and not key.endswith(_IGNORED_ENDINGS)]
    unexpected = [key for key in tensors if key not in wanted and not key.endswith(_IGNORED_ENDINGS)]
    shapes = [
        f"{key} (file {tuple(tensors[key].shape)}, network {tuple(value.shape)})"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    titles = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    return [f"{title}: {_some(keys)}" for title, keys in titles.items() if keys]


def _some(keys: list[str], count: int = 6) -> str:
    text = ", ".join(keys[:count])
    return f"{text} and {len(keys) - count} more" if len(keys) > count else text


def json_or_none(text: str | None) -> Any:
    """Parse JSON from a metadata value; None where it is absent."""
    return None if text is None else json.loads(text)


def weights_sha256(net: nn.Module) -> str:
    """Return a SHA-256 over names, types, shapes and values of all weights: equal for equal networks, on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()
