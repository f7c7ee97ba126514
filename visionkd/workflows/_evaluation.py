"""Run networks over a split and keep what they answered."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from visionkd.data.loader import eval_loader
from visionkd.data.transforms import EvalTransform
from visionkd.files import write_bytes
from visionkd.models.network import Network
from visionkd.types import Listener, Progress, Source

_FULL_VALUES = 10_000_000


@dataclass(frozen=True)
class Answers:
    """What a network said about a split.

    Attributes:
        probs: N x C in float32, after softmax.
        targets: Class indices, N.
        indices: Position of each sample in its source, N; unreadable images are missing.
        skipped: Names of the images that could not be read.
    """

    probs: np.ndarray
    targets: np.ndarray
    indices: np.ndarray
    skipped: tuple[str, ...]


@torch.inference_mode()
def answer(
    network: Network,
    source: Source,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    listener: Listener,
) -> Answers:
    """Run a network over all of ``source``."""
    network.to(device).eval()
    probs, targets, indices = [], [], []
    done, start = 0, time.perf_counter()
    for batch in eval_loader(source, EvalTransform(network.input), batch_size=batch_size, workers=workers):
        count = len(batch["target"])
        if not count:
            continue
        image = batch["image"].to(device, non_blocking=True).float().div_(255.0)
        probs.append(network(image).logits.softmax(1).cpu())
        targets.append(batch["target"])
        indices.append(batch["index"])
        done += count
        rate = done / (time.perf_counter() - start)
        listener.progress(Progress("evaluate", done, len(source), images_per_s=rate, eta_s=(len(source) - done) / rate))
    if not probs:
        shape = (0, network.num_classes)
        empty = np.zeros(0, np.int64)
        return Answers(np.zeros(shape, np.float32), empty, empty, tuple(source.name(i) for i in range(len(source))))
    found = torch.cat(indices).numpy()
    missing = np.setdiff1d(np.arange(len(source)), found)
    return Answers(
        torch.cat(probs).numpy(), torch.cat(targets).numpy(), found, tuple(source.name(int(index)) for index in missing)
    )


@dataclass(frozen=True)
class Evaluations:
    """Answers of several networks about the same samples, by role: ``student``, ``teacher``, ``baseline``.

    Attributes:
        probs: N x C each.
        targets: Class indices, N.
        indices: Position of each sample in the validation split, N.
        names: Sample names, N.
    """

    probs: dict[str, np.ndarray]
    targets: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write ``evaluation.npz``, atomically."""
        buffer = io.BytesIO()
        names = np.frombuffer(json.dumps(self.names).encode(), np.uint8)  # an object array would need pickle
        # half precision makes ties, so that a class or two changes: only where the file would be huge otherwise
        precision = np.float32 if max(values.size for values in self.probs.values()) <= _FULL_VALUES else np.float16
        arrays = {f"{role}_probs": values.astype(precision) for role, values in self.probs.items()}
        np.savez_compressed(buffer, targets=self.targets, indices=self.indices, names=names, **arrays)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Evaluations:
        with np.load(path, allow_pickle=False) as arrays:
            probs = {
                name.removesuffix("_probs"): arrays[name].astype(np.float32)
                for name in arrays.files
                if name.endswith("_probs")
            }
            names = tuple(json.loads(arrays["names"].tobytes().decode()))
            return cls(probs, arrays["targets"], arrays["indices"], names)


def evaluate_together(
    networks: Sequence[tuple[str, Network]], source: Source, *, run_one: Callable[[str, Network], Answers]
) -> Evaluations:
    """Run several networks over one split and keep the samples that all of them could read."""
    answers = {role: run_one(role, network) for role, network in networks}
    common = np.asarray(
        sorted(set.intersection(*(set(found.indices.tolist()) for found in answers.values()))), np.int64
    )
    probs = {role: found.probs[np.searchsorted(found.indices, common)] for role, found in answers.items()}
    first = next(iter(answers.values()))
    targets = first.targets[np.searchsorted(first.indices, common)]
    return Evaluations(probs, targets, common, tuple(source.name(int(index)) for index in common))
