"""What the tests of the label store share: labels that follow from their place, and processes that die."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionkd.teachers.store import LabelStore

KEY = {"teachers": [{"architecture": "resnet50", "weights": "ab" * 32}], "augment": {"scale": [0.08, 1.0]}}


def open_store(path: Path, *, samples: int = 100, classes: int = 7, key: Any = KEY, **settings: Any) -> LabelStore:
    return LabelStore.open(path, key, num_samples=samples, num_classes=classes, **settings)


def labels_for(indices: Sequence[int], view: int, *, classes: int = 7, generation: int = 0) -> Tensor:
    """Distributions that no other sample, view or generation has."""
    rows = []
    for index in indices:
        generator = np.random.default_rng([int(index), view, generation])
        rows.append(generator.dirichlet(np.ones(classes)).astype(np.float32))
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, classes)


def put(store: LabelStore, indices: Sequence[int], view: int = 0, *, generation: int = 0) -> None:
    probs = labels_for(indices, view, classes=store.manifest.format.num_classes, generation=generation)
    store.write(torch.tensor(list(indices), dtype=torch.int64), view, probs)


def held(store: LabelStore, view: int = 0) -> list[int]:
    """Samples that have a label; checks that each label is the one that belongs there."""
    count = store.manifest.num_samples
    labels = store.read(torch.arange(count), view)
    present = labels.present.nonzero()[:, 0].tolist()
    expected = labels_for(present, view, classes=store.manifest.format.num_classes)
    assert torch.equal(labels.dense()[labels.present], expected)
    assert store.missing(view).tolist() == sorted(set(range(count)) - set(present))
    assert store.count(view) == len(present)
    return present


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Forked:
    """A process that runs a function and sends back what it returns."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._reader)
            try:
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(pickle.dumps(function()))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writer)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def result(self) -> Any:
        with os.fdopen(self._reader, "rb") as pipe:
            content = pipe.read()
        assert self.wait() == 0
        return pickle.loads(content)
