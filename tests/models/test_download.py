from __future__ import annotations

import http.server
import socket
import threading
import time
from pathlib import Path

import pytest

from visionkd.errors import DownloadError
from visionkd.models import download


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_reachable", {})
    monkeypatch.setattr(download, "PROBE_TIMEOUT_S", 0.5)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_a_server_that_answers_with_an_error_is_reachable() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501 for every request
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert download.reachable(f"http://127.0.0.1:{server.server_port}/some/file")
    finally:
        server.shutdown()
        server.server_close()


def test_a_refusing_and_a_silent_server_are_given_up_soon() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.perf_counter()
        assert not download.reachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
        port = silent.getsockname()[1]
    assert not download.reachable(f"http://localhost:{port}")  # closed by now
    assert time.perf_counter() - start < 4.0


def test_a_failure_while_fetching_is_worded_and_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "reachable", lambda url: True)
    with pytest.raises(DownloadError, match="did not deliver them: reset"):
        with download.hub_access("x", "timm/x", advice="do this"):
            raise ConnectionResetError("reset by peer")
    with pytest.raises(RuntimeError, match="shape"):
        with download.hub_access("x", "timm/x", advice="do this"):
            raise RuntimeError("shape")


def test_the_offline_switch_is_put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "reachable", lambda url: False)
    with pytest.raises(DownloadError, match="cannot be reached"):
        with download.hub_access("x", "timm/x", advice=""):
            pytest.fail("nothing is built where nothing can be had")
    snapshot = tmp_path / "models--timm--x" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with download.hub_access("x", "timm/x", advice=""):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
