"""Published weights: fetched by timm and torchvision, refused in seconds where there is no network."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from visionkd.errors import DownloadError, VisionKDError, first_line
from visionkd.models.names import quiet_libraries

PROBE_TIMEOUT_S = 4.0
_NETWORK_PACKAGES = (
    "huggingface_hub",
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
    "urllib",
    "http",
    "socket",
)
_reachable: dict[str, bool] = {}


def reachable(url: str) -> bool:
    """Tell whether the server of ``url`` answers at all, within :data:`PROBE_TIMEOUT_S`; asked once per process.

    Hub clients retry for most of a minute, twice per model, before they admit that there is no network.
    """
    parts = urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}"
    if root not in _reachable:
        answer: list[bool] = []
        # Name resolution has no timeout of its own, hence the thread.
        thread = threading.Thread(target=lambda: answer.append(_answers(root)), daemon=True)
        thread.start()
        thread.join(PROBE_TIMEOUT_S + 1.0)
        _reachable[root] = bool(answer and answer[0])
    return _reachable[root]


def _answers(root: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(root, method="HEAD"), timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # A certificate that only this client distrusts is no proof that there is no network.
        return "SSL" in type(reason).__name__ and not isinstance(reason, (socket.gaierror, TimeoutError))
    return True


@contextlib.contextmanager
def hub_access(wanted: str, repository: str, *, advice: str) -> Iterator[None]:
    """Let a block fetch ``repository`` from the Hugging Face hub: from the cache alone where the hub cannot be reached.

    Args:
        wanted: What the user asked for, for the message.
        repository: Name of the repository on the hub.
        advice: What to do when it cannot be had.

    Raises:
        DownloadError: If the block fails for want of a network.
    """
    from huggingface_hub import constants

    switched_off, host = constants.HF_HUB_OFFLINE, urlsplit(constants.ENDPOINT).netloc
    online = not switched_off and reachable(constants.ENDPOINT)
    state = "downloads are switched off (HF_HUB_OFFLINE)" if switched_off else f"{host} cannot be reached"
    message = f"the published weights of '{wanted}' ({repository}) are not in the cache, and "
    if not online and not _in_hub_cache(repository):
        raise DownloadError(message + state, hint=advice)  # before a large network is built in vain
    constants.HF_HUB_OFFLINE = not online
    try:
        with quiet_libraries(), _progress_bars():
            yield
    except VisionKDError:
        raise
    except Exception as error:
        if not _is_network_error(error):
            raise
        if online:
            state = f"{host} did not deliver them: {first_line(error)[:200]}"
        raise DownloadError(message + state, hint=advice) from error
    finally:
        constants.HF_HUB_OFFLINE = switched_off


def _in_hub_cache(repository: str) -> bool:
    from huggingface_hub import constants

    folder = "models--" + repository.partition("@")[0].replace("/", "--")
    return any(Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*/*"))


@contextlib.contextmanager
def url_access(wanted: str, url: str, *, advice: str) -> Iterator[None]:
    """Let a block fetch ``url`` into torch's cache; see :func:`hub_access`."""
    import torch

    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(url).path))
    host = urlsplit(url).netloc
    message = f"the published weights of '{wanted}' are not in the cache ({cached}), and {host}"
    if not os.path.exists(cached) and not reachable(url):
        raise DownloadError(f"{message} cannot be reached", hint=advice)
    try:
        with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (OSError, EOFError) as error:
        raise DownloadError(f"{message} did not deliver them: {error}", hint=advice) from error


@contextlib.contextmanager
def _progress_bars() -> Iterator[None]:
    """Let the hub's client draw its progress bars on a terminal only."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def advice(wanted: str, *, page: str, cache: tuple[str, str], untrained: bool) -> str:
    """Return what to do without a network: random weights, a file from elsewhere, or a filled cache.

    Args:
        wanted: Name of the architecture.
        page: Where its weights are published.
        cache: Variable that names a cache, and what it does.
        untrained: Whether the network may start from random weights, because it is trained.
    """
    rows = [
        *([("--no-pretrained", "start from random weights")] if untrained else []),
        (f"{wanted}@FILE", f"read weights that you fetched elsewhere from {page}"),
        cache,
    ]
    width = max(len(name) for name, _ in rows)
    return "Choose one:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def _is_network_error(error: BaseException) -> bool:
    # RuntimeErrors of loading (other shapes, no weights published) are no network errors; OSErrors cover the hub's.
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
