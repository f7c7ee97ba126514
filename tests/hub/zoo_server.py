"""A server that fails in the ways servers fail, and a zoo whose cards point at it."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

#: Answers one request: the handler, the whole file, and the byte that was asked to begin with.
Fault = Callable[["Handler", bytes, int], None]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        begin = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        with self.server.lock:
            self.server.requests.append((self.path, begin))
            plan = self.server.plan.get(self.path, [])
            fault = plan.pop(0) if plan else well
        if self.path not in self.server.files and fault is well:
            fault = status(404)
        self.close_connection = True
        try:
            fault(self, self.server.files.get(self.path, b""), begin)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def do_HEAD(self) -> None:
        """Answer as a hub does, of which a client asks the length and the commit first."""
        body = self.server.files.get(self.path)
        self.close_connection = True
        if body is None:
            self.head(404, Content_Length=0)
            return
        tag = hashlib.sha256(body).hexdigest()
        commit = self.path.split("/")[4]
        self.head(200, Content_Length=len(body), ETag=f'"{tag}"', X_Repo_Commit=commit, Accept_Ranges="bytes")

    def head(self, code: int, **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Files by path, what to do at the next requests of each path, and the requests that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plan: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, int]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


# Faults ---------------------------------------------------------------------------------------------------------------


def well(handler: Handler, body: bytes, begin: int) -> None:
    if begin >= len(body) > 0:
        handler.head(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
        return
    if begin:
        handler.head(206, Content_Length=len(body) - begin, Content_Range=f"bytes {begin}-{len(body) - 1}/{len(body)}")
    else:
        handler.head(200, Content_Length=len(body))
    handler.wfile.write(body[begin:])


def cut(after: int) -> Fault:
    """Close the connection after so many bytes."""

    def fault(handler: Handler, body: bytes, begin: int) -> None:
        if begin:
            handler.head(
                206, Content_Length=len(body) - begin, Content_Range=f"bytes {begin}-{len(body) - 1}/{len(body)}"
            )
        else:
            handler.head(200, Content_Length=len(body))
        handler.wfile.write(body[begin : begin + after])

    return fault


def stall(after: int) -> Fault:
    """Send so many bytes and then nothing, with the connection open."""

    def fault(handler: Handler, body: bytes, begin: int) -> None:
        cut(after)(handler, body, begin)
        handler.wfile.flush()
        handler.server.closing.wait(30)

    return fault


def silent(handler: Handler, body: bytes, begin: int) -> None:
    handler.server.closing.wait(30)


def drip(handler: Handler, body: bytes, begin: int) -> None:
    handler.head(200, Content_Length=len(body))
    for byte in body:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if handler.server.closing.wait(0.02):
            return


def wrong_bytes(handler: Handler, body: bytes, begin: int) -> None:
    well(handler, bytes(byte ^ 1 for byte in body), begin)


def other_length(by: int) -> Fault:
    def fault(handler: Handler, body: bytes, begin: int) -> None:
        well(handler, body[:by] if by < 0 else body + b"x" * by, 0)

    return fault


def unannounced(extra: bytes = b"") -> Fault:
    """Send the file without its length, and more than it."""

    def fault(handler: Handler, body: bytes, begin: int) -> None:
        handler.head(200)
        handler.wfile.write(body + extra)

    return fault


def status(code: int, **headers: Any) -> Fault:
    return lambda handler, body, begin: handler.head(code, Content_Length=0, **headers)


def redirect(to: str) -> Fault:
    return status(302, Location=to)


def ignores_ranges(handler: Handler, body: bytes, begin: int) -> None:
    well(handler, body, 0)


def other_range(handler: Handler, body: bytes, begin: int) -> None:
    handler.head(206, Content_Length=len(body), Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}")
    handler.wfile.write(body)


def compressed(handler: Handler, body: bytes, begin: int) -> None:
    handler.head(200, Content_Length=len(body), Content_Encoding="gzip")
    handler.wfile.write(body)


def garbage(handler: Handler, body: bytes, begin: int) -> None:
    handler.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")


# Zoo ------------------------------------------------------------------------------------------------------------------


def _field(number: int, content: bytes) -> bytes:
    size, length = b"", len(content)
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    key = number << 3 | 2
    return (bytes([key]) if key < 128 else bytes([key & 0x7F | 0x80, key >> 7])) + size + bytes([length]) + content


def onnx_bytes(weights: int = 300_000, *, external: bool = False) -> bytes:
    """Return a file that reads as ONNX: a graph with one input and one weight of so many bytes."""
    raw = bytes(index * 7 & 0xFF for index in range(256)) * (weights // 256)
    tensor = _field(8, b"w") + (_field(13, _field(1, b"location") + _field(2, b"../w")) if external else _field(9, raw))
    return _field(7, _field(11, _field(1, b"image")) + _field(5, tensor))


def entry(name: str, content: bytes, *sources: dict[str, Any]) -> dict[str, Any]:
    """Return a file of a card."""
    sha = hashlib.sha256(content).hexdigest()
    return {"name": name, "sha256": sha, "size_bytes": len(content), "sources": list(sources)}


def https(*urls: str) -> list[dict[str, Any]]:
    return [{"kind": "https", "url": url} for url in urls]


def card_values(name: str = "tiny", **changes: Any) -> dict[str, Any]:
    """Return a card as its file holds it; ``artifacts`` has to be given."""
    return {
        "format": 1,
        "name": name,
        "title": "A model for tests",
        "task": "classification",
        "origin": "upstream",
        "publisher": "nobody",
        "licence": "apache-2.0",
        "data": "cifar10",
        "num_classes": 3,
        "architecture": {"name": "cifar_resnet8"},
        "preprocessing": {
            "img_size": [32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
        "params_m": 0.08,
        "training": {"method": "supervised"},
        "good_for": ["tests"],
        "bad_for": ["anything else"],
        **changes,
    }


def write_card(zoo: Path, values: dict[str, Any]) -> Path:
    file = zoo / values["task"] / f"{values['name']}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def write_onnx_card(zoo: Path, content: bytes, *sources: dict[str, Any], name: str = "tiny", **changes: Any) -> Path:
    """Write the card of a model that is one ONNX file."""
    artifact = {"format": "onnx", "files": [{**entry("model.onnx", content, *sources), **changes}]}
    return write_card(zoo, card_values(name, artifacts={"onnx": artifact}))
