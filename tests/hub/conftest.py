from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.zoo_server import Server, serving
from visionkd.hub import sources
from visionkd.hub.transfer import Patience

#: Fails in the same ways as the true one, within a second.
IMPATIENT = Patience(
    timeout_s=10.0, attempts=4, connects=2, first_wait_s=0.01, longest_wait_s=2.0, window_s=0.2, progress_bytes=50_000
)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards of our own, an empty cache, and no patience."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    monkeypatch.setenv("VISIONKD_ZOO", str(folder))
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "cache"))
    settings = ("VISIONKD_OFFLINE", "HF_HUB_OFFLINE", "VISIONKD_ZOO_CACHE_GB")
    for name in (*settings, "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "PATIENCE", IMPATIENT)
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
