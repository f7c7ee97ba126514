"""Whatever a server does: the right file, or an error that says what was wrong, and never a wrong file."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import shutil
import socket
import ssl
import subprocess
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests.hub.zoo_server import (
    Fault,
    Server,
    compressed,
    cut,
    drip,
    garbage,
    https,
    ignores_ranges,
    onnx_bytes,
    other_length,
    other_range,
    redirect,
    silent,
    stall,
    status,
    unannounced,
    write_onnx_card,
    wrong_bytes,
)
from visionkd.errors import DownloadError
from visionkd.hub import cache, sources, transfer
from visionkd.hub.pull import pull
from visionkd.types import Listener, Progress

CONTENT = onnx_bytes()
PATH = "/model.onnx"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a silent server up soon; elsewhere a machine that is busy must not look like one."""
    monkeypatch.setattr(sources, "PATIENCE", dataclasses.replace(sources.PATIENCE, timeout_s=0.4))


@pytest.fixture
def offered(zoo: Path, server: Server) -> Server:
    server.files[PATH] = CONTENT
    write_onnx_card(zoo, CONTENT, *https(server.url + PATH))
    return server


def assert_nothing_was_kept() -> None:
    assert not list(cache.cache_root().glob("models/*/*"))


def pulled_bytes() -> bytes:
    path = pull("tiny").path
    assert path is not None and path.is_relative_to(cache.cache_root()) and path.name == "model.onnx"
    return path.read_bytes()


def test_a_server_that_works(offered: Server) -> None:
    class Heard(Listener):
        steps: list[Progress] = []

        def progress(self, progress: Progress) -> None:
            self.steps.append(progress)

    first, second = pull("tiny", listener=Heard()), pull("zoo:tiny@onnx")
    assert (first.fetched, second.fetched) == (True, False)
    assert first.path == second.path and first.path.read_bytes() == CONTENT
    assert offered.requests == [(PATH, 0)], "the second time nobody is asked"
    steps = [step.step for step in Heard.steps]
    assert steps == sorted(steps) and steps[-1] == Heard.steps[-1].steps == len(CONTENT)
    assert not list(cache.cache_root().glob("parts/*"))


@pytest.mark.parametrize(
    ("plan", "begins"),
    [
        ([cut(100_000)], [0, 100_000]),
        ([cut(0), cut(60_000), cut(60_000)], [0, 0, 60_000, 120_000]),
        ([stall(1000)], [0, 1000]),
        ([silent], [0, 0]),
        ([drip], None),
        ([garbage], [0, 0]),
        ([cut(1000), ignores_ranges], [0, 1000]),
        ([cut(1000), other_range], [0, 1000, 0]),
        ([cut(1000), status(416)], [0, 1000, 0]),
        ([cut(1000), cut(1000), cut(1000), cut(200_000), cut(1000), cut(1000)], None),
        ([status(500), status(503), status(502)], [0, 0, 0, 0]),
        ([status(429, Retry_After=1)], [0, 0]),
        ([status(429, Retry_After="soon")], [0, 0]),
        ([redirect("/elsewhere/model.onnx")], None),
        ([unannounced()], [0]),
    ],
    ids=lambda value: "" if not isinstance(value, list) or not callable(value[0]) else None,
)
def test_what_passes_is_waited_for(offered: Server, soon: None, plan: list[Fault], begins: list[int] | None) -> None:
    offered.files["/elsewhere/model.onnx"] = CONTENT
    offered.plan[PATH] = list(plan)
    assert pulled_bytes() == CONTENT
    if begins is not None:
        assert [begin for path, begin in offered.requests] == begins


def test_the_wait_that_a_server_asks_for_is_kept(offered: Server) -> None:
    offered.plan[PATH] = [status(429, Retry_After=1)]
    start = time.monotonic()
    assert pulled_bytes() == CONTENT
    assert time.monotonic() - start >= 1.0
    assert transfer._retry_after(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=3)
    assert transfer._retry_after(formatdate(time.time() - 100, usegmt=True)) == 0.0


@pytest.mark.parametrize(
    ("fault", "message", "asked"),
    [
        (status(404), "has no such file (HTTP 404)", 1),
        (status(403), "forbids it (HTTP 403)", 1),
        (status(500), "(HTTP 500) (given up after 4 attempts)", 4),
        (status(429, Retry_After=3600), "is asked too often (HTTP 429), and asks to come back in 3600 s", 1),
        (wrong_bytes, "gives another file: 299,", 1),
        (other_length(-1), "offers 299,", 1),
        (other_length(+1), "offers 299,", 1),
        (unannounced(b"more"), "sends more than the 299,", 1),
        (cut(10), "cut the connection after", 4),
        (stall(10), "was silent for 0.4 s", 4),
        (silent, "was silent for 0.4 s", 4),
        (drip, "sends less than 1 kB/s", 4),
        (garbage, "broke the connection", 4),
        (compressed, "sends it compressed (gzip)", 1),
        (status(204), "answers with status 204", 1),
        (redirect(PATH), "redirects without end", None),
        (redirect("file:///etc/passwd"), "redirects without end, or to nowhere", 1),
        (redirect("ftp://127.0.0.1/model.onnx"), "redirects to ftp://127.0.0.1, which is not https", 1),
    ],
)
def test_what_lasts_is_an_error_that_says_so(
    offered: Server, soon: None, fault: Fault, message: str, asked: int | None
) -> None:
    offered.plan[PATH] = [fault] * 30
    with pytest.raises(DownloadError) as caught:
        pull("tiny")
    assert message in caught.value.message and offered.url + PATH in caught.value.message
    assert caught.value.hint
    if asked is not None:
        assert len(offered.requests) == asked
    assert_nothing_was_kept()
    offered.plan.clear()
    assert pulled_bytes() == CONTENT, "what was left over harms no later pull"


def test_the_mirrors_are_asked_in_turn(zoo: Path, server: Server) -> None:
    server.files |= {"/a": CONTENT, "/b": CONTENT[:-1] + b"?", "/d": CONTENT, "/e": CONTENT}
    server.plan["/a"] = [cut(100_000)] + [status(404)] * 9
    write_onnx_card(zoo, CONTENT, *https(*(server.url + path for path in ("/a", "/b", "/c", "/d", "/e"))))
    assert pulled_bytes() == CONTENT
    # /b goes on from what /a gave, is found out, and is not believed from the beginning either
    assert server.requests == [("/a", 0), ("/a", 100_000), ("/b", 100_000), ("/b", 0), ("/c", 0), ("/d", 0)]


def test_all_mirrors_are_named_where_none_helps(zoo: Path, server: Server) -> None:
    server.files["/b"] = CONTENT[:-1] + b"?"
    write_onnx_card(zoo, CONTENT, *https(server.url + "/a", server.url + "/b"))
    with pytest.raises(DownloadError) as caught:
        pull("tiny")
    lines = caught.value.message.splitlines()
    assert "zoo:tiny" in lines[0] and "/a has no such file" in lines[1] and "/b gives another file" in lines[2]
    assert hashlib.sha256(CONTENT).hexdigest() in lines[2]


def test_bytes_left_by_something_else_are_not_gone_on_from(offered: Server) -> None:
    part = cache.part_file(hashlib.sha256(CONTENT).hexdigest())
    part.parent.mkdir(parents=True)
    for rubbish in (b"rubbish" * 10, CONTENT + b"!", b"?" * len(CONTENT)):
        part.write_bytes(rubbish)
        assert pulled_bytes() == CONTENT
        cache.prune(0, even_recent=True)


def test_a_server_that_is_not_there(zoo: Path, server: Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    server.files[PATH] = CONTENT
    nowhere, unknown = f"http://127.0.0.1:{port}/x", "https://no-such-host.invalid/x"
    write_onnx_card(zoo, CONTENT, *https(nowhere, unknown))
    with pytest.raises(DownloadError) as caught:
        pull("tiny")
    lines = caught.value.message.splitlines()
    assert "cannot be reached" in lines[1] and "2 attempts" in lines[1] and "is not found by name" in lines[2]
    write_onnx_card(zoo, CONTENT, *https(nowhere, server.url + PATH))
    assert pulled_bytes() == CONTENT


def test_a_wrong_proxy_is_named(offered: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://someone:secret@127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(DownloadError, match=rf"through the proxy 127\.0\.0\.1:{port} \(http_proxy\)") as caught:
        pull("tiny")
    assert "secret" not in str(caught.value) and not offered.requests
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert pulled_bytes() == CONTENT


def test_offline(offered: Server, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="downloads are switched off") as caught:
        pull("tiny", offline=True)
    assert "visionkd zoo pull tiny" in caught.value.hint and not offered.requests
    for name in ("VISIONKD_OFFLINE", "HF_HUB_OFFLINE"):
        with monkeypatch.context() as within:
            within.setenv(name, "1")
            with pytest.raises(DownloadError, match="switched off"):
                pull("tiny")
    assert pulled_bytes() == CONTENT
    assert not pull("tiny", offline=True).fetched, "what is here needs no network"
    (zoo / "model.onnx").write_bytes(CONTENT)
    cache.prune(0, even_recent=True)
    write_onnx_card(zoo, CONTENT, *https(offered.url + PATH), {"kind": "repository", "path": "model.onnx"})
    assert pull("tiny", offline=True).path.read_bytes() == CONTENT, "nor does what lies in the repository"


class FullDisk:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(content[: self.room])
        self.room -= written
        return written

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.close()


def test_a_disk_that_fills_up(offered: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = transfer._opened
    with monkeypatch.context() as within:
        within.setattr(transfer, "_opened", lambda part, begin: FullDisk(opened(part, begin), 100_000))
        with pytest.raises(DownloadError, match="no space left on device") as caught:
            pull("tiny")
    assert "VISIONKD_CACHE" in caught.value.hint and str(cache.cache_root()) in caught.value.message
    assert_nothing_was_kept()
    assert pulled_bytes() == CONTENT
    assert offered.requests == [(PATH, 0), (PATH, 100_000)], "with room again it goes on"


def test_a_full_disk_is_seen_before_anything_is_fetched(offered: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 60 << 20})
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="has 63 MB free, and 4 MB more are needed"):
        pull("tiny")
    assert not offered.requests


def test_a_cache_that_cannot_be_written(offered: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VISIONKD_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="cannot be written") as caught:
        pull("tiny")
    assert "VISIONKD_CACHE" in caught.value.hint


def test_a_certificate_that_is_not_trusted(zoo: Path, server: Server, tmp_path: Path, monkeypatch) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    if shutil.which("openssl") is None or subprocess.run([*request, *names], capture_output=True).returncode:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.files[PATH] = CONTENT
    url = f"https://127.0.0.1:{server.server_port}"
    write_onnx_card(zoo, CONTENT, *https(url + PATH))
    with pytest.raises(DownloadError, match="a certificate that is not trusted .*; set SSL_CERT_FILE"):
        pull("tiny")
    assert not server.requests
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    server.plan[PATH] = [cut(1000), redirect(url.replace("https", "http") + PATH)]
    with pytest.raises(DownloadError, match="redirects to http://127.0.0.1, which is not https"):
        pull("tiny")
    server.plan[PATH] = [redirect(url + PATH)]
    assert pulled_bytes() == CONTENT
