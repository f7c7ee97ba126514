"""One file over HTTPS into a partial file that a later attempt goes on with. Standard library only.

Written by hand, on urllib, because pooch begins anew after every cut and a device without torch has neither it nor
huggingface_hub. Nothing here judges the content: the caller compares the SHA-256.
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import os
import random
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import visionkd
from visionkd.errors import first_line
from visionkd.hub.cache import write_error

_CHUNK_BYTES = 1 << 18
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_MEANINGS = {401: "asks for a login", 403: "forbids it", 404: "has no such file", 407: "wants a login to the proxy",
             410: "no longer has this file", 429: "is asked too often"}  # fmt: skip


@dataclass(frozen=True)
class Patience:
    """How long to go on with a server that fails.

    Attributes:
        timeout_s: Silence after which a connection is given up.
        attempts: Failures in a row, without :attr:`progress_bytes` between them, after which the server is given up.
        connects: The same for a server that cannot be reached at all.
        first_wait_s: Wait after the first failure; it doubles with each further one.
        longest_wait_s: Longest wait, also where the server asks for more: then it is given up.
        window_s: Time over which the rate is looked at.
        least_bytes_per_s: A slower connection counts as a failed one.
        progress_bytes: What an attempt must bring to count as progress.
    """

    timeout_s: float = 20.0
    attempts: int = 6
    connects: int = 2
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0
    window_s: float = 30.0
    least_bytes_per_s: float = 1024.0
    progress_bytes: int = 1 << 20


class TransferError(Exception):
    """This server does not give the file; the text says why, beginning with a verb."""


class _TryAgainError(Exception):
    def __init__(self, reason: str, *, wait_s: float | None = None, reached: bool = True) -> None:
        super().__init__(reason)
        self.wait_s, self.reached = wait_s, reached


def download(
    url: str,
    part: Path,
    *,
    size_bytes: int,
    progress: Callable[[int], None],
    patience: Patience,
) -> None:
    """Fetch ``url`` into ``part``, going on from the bytes that are in it.

    Args:
        url: Address of the file.
        part: File to write; it is kept when this fails.
        size_bytes: Length that the file must have.
        progress: Is told how many bytes are there.
        patience: How long to go on with a server that fails.

    Raises:
        TransferError: If the server does not give a file of that length.
        DownloadError: If ``part`` cannot be written, as on a full disk.
    """
    failures = unreached = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have > size_bytes:
            part.unlink()
            have = 0
        if have == size_bytes:
            return
        try:
            _receive(url, part, have, size_bytes, progress, patience)
        except _TryAgainError as error:
            gained = (part.stat().st_size if part.exists() else 0) - have
            failures = 0 if gained >= patience.progress_bytes else failures + 1
            unreached = 0 if error.reached else unreached + 1
            if failures >= patience.attempts or unreached >= patience.connects:
                raise TransferError(f"{error} (given up after {failures} attempts)") from error
            wait_s = patience.first_wait_s * 2 ** min(failures, 10) * random.uniform(0.5, 1.0)
            if error.wait_s is not None:
                if error.wait_s > patience.longest_wait_s:
                    raise TransferError(f"{error}, and asks to come back in {error.wait_s:.0f} s") from error
                wait_s = error.wait_s
            time.sleep(min(wait_s, patience.longest_wait_s))


def _receive(
    url: str, part: Path, have: int, size_bytes: int, progress: Callable[[int], None], patience: Patience
) -> None:
    """Make one connection and write what comes."""
    headers = {"User-Agent": f"visionkd/{visionkd.__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with _opener().open(urllib.request.Request(url, headers=headers), timeout=patience.timeout_s) as response:
            begin = _begin(response, part, have, size_bytes)
            _write(response, part, begin, size_bytes, progress, patience)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(error, part) from error
    except urllib.error.URLError as error:
        raise _connection(error.reason if isinstance(error.reason, BaseException) else error, url, patience) from error
    except (OSError, http.client.HTTPException) as error:
        raise _connection(error, url, patience) from error


def _begin(response: Any, part: Path, have: int, size_bytes: int) -> int:
    """Return where in the file the response begins, after a look at what it announces."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise TransferError(f"sends it compressed ({encoding}), which was not asked for")
    begin, total = 0, response.headers.get("Content-Length")
    if response.status == 206:
        unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = rest.partition("/")
        if unit != "bytes" or span.partition("-")[0] != str(have):
            part.unlink(missing_ok=True)
            raise _TryAgainError("went on from another place than asked")
        begin = have
    elif response.status != 200:
        raise TransferError(f"answers with status {response.status}")
    if total is not None and total.isdecimal() and int(total) != size_bytes:
        raise TransferError(f"offers {int(total):,} bytes, and the card says {size_bytes:,}")
    return begin


def _write(
    response: Any, part: Path, begin: int, size_bytes: int, progress: Callable[[int], None], patience: Patience
) -> None:
    have = begin
    window_start, window_have = time.monotonic(), have
    with _opened(part, begin) as file:
        while chunk := response.read1(_CHUNK_BYTES):
            if have + len(chunk) > size_bytes:
                raise TransferError(f"sends more than the {size_bytes:,} bytes that the card says")
            _put(file, chunk, part)
            have += len(chunk)
            progress(have)
            elapsed = time.monotonic() - window_start
            if elapsed >= patience.window_s:
                if have - window_have < patience.least_bytes_per_s * elapsed:
                    raise _TryAgainError(f"sends less than {patience.least_bytes_per_s / 1024:g} kB/s")
                window_start, window_have = time.monotonic(), have
    if have < size_bytes:
        raise _TryAgainError(f"cut the connection after {have:,} of {size_bytes:,} bytes")


def _opened(part: Path, begin: int) -> Any:
    """Open a file that may exist, without its end from ``begin`` on."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = open(os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", buffering=0)
        file.truncate(begin)
        file.seek(begin)
    except OSError as error:
        raise write_error(error) from error
    return file


def _put(file: Any, chunk: bytes, part: Path) -> None:
    view = memoryview(chunk)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise write_error(error) from error


# What went wrong ------------------------------------------------------------------------------------------------------


def _refusal(error: urllib.error.HTTPError, part: Path) -> Exception:
    """Return what an HTTP status means: another attempt, or the end of it."""
    if error.code == 416:  # what is there does not fit the file that is offered
        part.unlink(missing_ok=True)
        return _TryAgainError("does not go on from where the last attempt ended")
    text = f"{_MEANINGS.get(error.code, 'answers')} (HTTP {error.code})"
    if error.code in _RETRIED:
        return _TryAgainError(text, wait_s=_retry_after(error.headers.get("Retry-After")))
    if 300 <= error.code < 400:
        return TransferError(f"redirects without end, or to nowhere (HTTP {error.code})")
    return TransferError(text)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a server asks to wait, given as such or as a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _connection(error: BaseException, url: str, patience: Patience) -> Exception:
    through = _proxy(url)
    if isinstance(error, ssl.SSLCertVerificationError):
        return TransferError(
            f"shows a certificate that is not trusted ({error.verify_message}){through}; set SSL_CERT_FILE to the "
            "certificates of your network if it has its own"
        )
    if isinstance(error, TimeoutError):
        return _TryAgainError(f"was silent for {patience.timeout_s:g} s{through}")
    if isinstance(error, socket.gaierror):
        return _TryAgainError(f"is not found by name ({first_line(error)}){through}", reached=False)
    if isinstance(error, ConnectionRefusedError) or getattr(error, "errno", 0) in (
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    ):
        return _TryAgainError(f"cannot be reached ({first_line(error)}){through}", reached=False)
    if isinstance(error, OSError) and "Tunnel connection failed" in str(error):
        return TransferError(f"cannot be reached: {str(error).strip()}{through}")
    return _TryAgainError(f"broke the connection ({first_line(error)}){through}")


def _proxy(url: str) -> str:
    """Return the proxy that a request goes through, for messages: a wrong one looks like a server that is down."""
    parts = urlsplit(url)
    address = urllib.request.getproxies().get(parts.scheme)
    if not address or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    shown = urlsplit(address if "//" in address else f"//{address}")
    return f", through the proxy {shown.hostname}:{shown.port or 80} ({parts.scheme}_proxy)"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but none that leaves https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if after.scheme not in {"https", before.scheme}:
            raise TransferError(f"redirects to {after.scheme}://{after.hostname or ''}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that knows http and https alone: build_opener would read file:// and ftp:// as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,  # from the environment, at each call
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        _Redirects,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
