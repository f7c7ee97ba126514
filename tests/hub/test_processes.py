"""Several processes, processes that are killed, and a device that has nothing but the base."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub.zoo_server import Server, cut, https, onnx_bytes, stall, write_onnx_card
from visionkd.files import sha256
from visionkd.hub import cache
from visionkd.hub.pull import pull

ROOT = Path(__file__).resolve().parents[2]
CONTENT = onnx_bytes()
PATH = "/model.onnx"
PULL = "from visionkd.hub.pull import pull; pulled = pull('tiny'); print(pulled.fetched, pulled.path)"
#: As on a device: whatever is not in the base cannot be imported.
BASE = """
import sys
for name in ("torch", "torchvision", "timm", "safetensors", "huggingface_hub", "onnx", "onnxruntime", "lightning",
             "requests", "httpx", "urllib3", "pooch", "tqdm", "matplotlib"):
    sys.modules[name] = None
"""


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


def test_ten_processes_fetch_it_once(zoo: Path, server: Server) -> None:
    server.files[PATH] = CONTENT
    server.plan[PATH] = [cut(100_000)]  # so that it takes a moment, in which the others wait
    write_onnx_card(zoo, CONTENT, *https(server.url + PATH))
    answers = [answer(process) for process in [start(PULL) for _ in range(10)]]
    assert sorted(each.split()[0] for each in answers) == ["False"] * 9 + ["True"]
    (path,) = {each.split()[1] for each in answers}
    assert Path(path).read_bytes() == CONTENT
    assert server.requests == [(PATH, 0), (PATH, 100_000)]


def test_a_killed_pull_goes_on_where_it_was(zoo: Path, server: Server) -> None:
    server.files[PATH] = CONTENT
    server.plan[PATH] = [stall(150_000)]
    write_onnx_card(zoo, CONTENT, *https(server.url + PATH))
    process = start(PULL)
    part = cache.cache_root() / "parts"
    deadline = time.monotonic() + 30
    while not any(file.stat().st_size == 150_000 for file in part.glob("*.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert list(cache.cache_root().glob("models/tiny/.*.tmp")), "what the killed one left"
    assert pull("tiny").path.read_bytes() == CONTENT
    assert server.requests == [(PATH, 0), (PATH, 150_000)]
    assert [path.name[0] != "." for path in cache.cache_root().glob("models/tiny/*")] == [True], "and nothing is left"
    assert not list(part.iterdir())


def test_a_killed_pull_holds_nobody_up_and_is_never_taken_for_whole(zoo: Path, server: Server) -> None:
    server.files[PATH] = CONTENT
    write_onnx_card(zoo, CONTENT, *https(server.url + PATH))
    for delay_s in (0.0, 0.3, 0.6):
        server.plan[PATH] = [cut(70_000)]
        process = start(PULL)
        time.sleep(delay_s)
        process.kill()
        process.communicate()
        for path in cache.cache_root().glob("models/tiny/onnx-*/*"):
            assert path.read_bytes() == CONTENT
        assert pull("tiny").path.read_bytes() == CONTENT
        cache.prune(0, even_recent=True)


def test_the_base_alone_pulls_an_onnx_file(zoo: Path, server: Server) -> None:
    server.files[PATH] = CONTENT
    write_onnx_card(zoo, CONTENT, *https(server.url + PATH))
    code = BASE + "from visionkd import zoo; print(zoo.path('zoo:tiny')); print(zoo.card('tiny').params_m)"
    path, params_m = answer(start(code)).splitlines()
    assert Path(path).read_bytes() == CONTENT and params_m == "0.08"


HUB_FILE = "/owner/name/resolve/0123456789abcdef0123456789abcdef01234567/onnx/model.onnx"
HUB = {"kind": "hub", "repo": "owner/name", "revision": HUB_FILE.split("/")[4], "file": "onnx/model.onnx"}


@pytest.mark.parametrize("client", ["huggingface_hub", "none"])
def test_a_hub_repository_at_a_revision(zoo: Path, server: Server, tmp_path: Path, client: str) -> None:
    """By the hub's own client where there is one, and by the plain address on a device without it."""
    if client == "huggingface_hub":
        pytest.importorskip("huggingface_hub")
    code = PULL if client == "huggingface_hub" else BASE + PULL
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    server.files[HUB_FILE] = CONTENT
    write_onnx_card(zoo, CONTENT, HUB)
    fetched, path = answer(start(code, **environment)).split()
    assert fetched == "True" and Path(path).read_bytes() == CONTENT
    assert not list(cache.cache_root().glob("parts/*"))
    assert not list((tmp_path / "hf").rglob("model.onnx")), "it is kept once"
    cache.prune(0, even_recent=True)

    server.files[HUB_FILE] = CONTENT[:-1] + b"?"
    process = start(code, **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "owner/name@0123456789ab on the hub gives another file" in err and sha256_of(CONTENT) in err
    assert not list(cache.cache_root().glob("models/*/*"))


def sha256_of(content: bytes) -> str:
    file = cache.cache_root() / "for-its-hash"
    file.write_bytes(content)
    return sha256(file)
