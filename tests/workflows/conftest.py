from __future__ import annotations

from pathlib import Path

import pytest

from visionkd import workflows
from visionkd.types import Listener

#: A run of a second: 128 scenes of 32 pixels.
TINY = (
    "data.shapes.num_train=128",
    "data.shapes.num_val=32",
    "data.workers=0",
)


class Recorder(Listener):
    """Remembers what a workflow said."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stages: list[str] = []

    def message(self, text, *, level="info"):
        self.messages.append(text)

    def stage(self, name, title, number, total):
        self.stages.append(name)


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory) -> Path:
    """A trained teacher, good for nothing but tests."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    options = (*TINY, "model.img_size=32", "report.enabled=false")
    workflows.train(model="cifar_resnet8", pretrained=False, options=options, epochs=1, batch_size=32, out=str(out))
    return out
