"""From a card's file to a verified file on disk: each source in turn until one gives what the card describes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from visionkd.errors import DataError, DownloadError, first_line
from visionkd.files import sha256
from visionkd.hub.cache import cache_root, locked, part_file, write_error
from visionkd.hub.card import CardFile, HttpsSource, HubSource, PythonPackageSource, RepositorySource, Source
from visionkd.hub.content import check_content
from visionkd.hub.transfer import Patience, TransferError, download

_HUB = "https://huggingface.co"
_SPARE_BYTES = 64 << 20
PATIENCE = Patience()


def is_offline() -> bool:
    """Tell whether the environment forbids downloads: ``VISIONKD_OFFLINE`` or ``HF_HUB_OFFLINE``."""
    values = (os.environ.get(name, "").strip().lower() for name in ("VISIONKD_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value in ("1", "true", "yes", "on") for value in values)


def fetch(
    file: CardFile, target: Path, *, zoo: Path, offline: bool, progress: Callable[[int], None], model: str
) -> None:
    """Put ``file`` at ``target``: whole, with the SHA-256 of its card and of harmless content, or not at all.

    Args:
        file: What to fetch.
        target: Where to; its folder exists.
        zoo: Folder that the sources of kind ``repository`` count from.
        offline: Take nothing from the network.
        progress: Is told how many bytes are there.
        model: Name of the model, for messages.

    Raises:
        DownloadError: If no source gives it, with what is wrong with each.
        DataError: If its content is refused.
    """
    with locked(file.sha256):  # two models may share a file
        failures = []
        for source in file.sources:
            part = part_file(file.sha256)
            if not isinstance(source, (HttpsSource, HubSource)):
                part = part.with_suffix(".copy")  # a partial download is no part of a copy, and is kept
            elif offline and not _in_hub_cache(source):
                failures.append(f"{_shown(source)} is not asked: downloads are switched off")
                continue
            try:
                _from_source(source, file, part, zoo, offline, progress)
                check_content(part, file.name)
                _move(part, target)
            except TransferError as error:
                failures.append(f"{_shown(source)} {error}")
            except DataError:
                part.unlink(missing_ok=True)
                raise
            else:
                part_file(file.sha256).unlink(missing_ok=True)
                return
    raise DownloadError(
        f"'{file.name}' of zoo:{model} cannot be had:\n" + "\n".join(f"  {failure}" for failure in failures),
        hint=_advice(file, model, offline),
    )


def _from_source(
    source: Source, file: CardFile, part: Path, zoo: Path, offline: bool, progress: Callable[[int], None]
) -> None:
    """Fill ``part`` from a source, and compare its length and SHA-256 with the card's."""
    resumed = part.exists() and isinstance(source, HttpsSource)
    for again in (resumed, False):
        _check_room(part, file.size_bytes)
        if isinstance(source, HttpsSource):
            download(source.url, part, size_bytes=file.size_bytes, progress=progress, patience=PATIENCE)
        elif isinstance(source, HubSource):
            _from_hub(source, file, part, offline, progress)
        else:
            _copy(_local(source, zoo), part)
        found, size = sha256(part), part.stat().st_size
        if (found, size) == (file.sha256, file.size_bytes):
            progress(size)
            return
        part.unlink()
        if not again:  # what an earlier attempt had left may have been at fault
            raise TransferError(
                f"gives another file: {size:,} bytes with SHA-256 {found}, and the card says {file.size_bytes:,} bytes "
                f"with {file.sha256}"
            )


# Kinds of sources -----------------------------------------------------------------------------------------------------


def _local(source: RepositorySource | PythonPackageSource, zoo: Path) -> Path:
    if isinstance(source, RepositorySource):
        path, root = zoo / source.path, zoo
        if not path.is_file():
            raise TransferError("is not there: this is an installed package, which brings cards without weights")
    else:
        try:
            distribution = importlib.metadata.distribution(source.package)
        except importlib.metadata.PackageNotFoundError:
            raise TransferError("is not installed") from None
        path, root = Path(str(distribution.locate_file(source.file))), Path(str(distribution.locate_file("")))
        if not path.is_file():
            raise TransferError(f"is installed in version {distribution.version}, without this file")
    if not path.resolve().is_relative_to(root.resolve()):  # through a symbolic link
        raise TransferError("leads out of its folder")
    return path


def _copy(source: Path, part: Path) -> None:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, part)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise write_error(error) from error


def _from_hub(source: HubSource, file: CardFile, part: Path, offline: bool, progress: Callable[[int], None]) -> None:
    """Fetch by huggingface_hub, which knows logins and caches; without it from the hub's plain address."""
    try:
        import huggingface_hub
    except ImportError:
        endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
        url = f"{endpoint}/{source.repo}/resolve/{source.revision}/{source.file}"
        download(url, part, size_bytes=file.size_bytes, progress=progress, patience=PATIENCE)
        return
    cached = huggingface_hub.try_to_load_from_cache(source.repo, source.file, revision=source.revision)
    if isinstance(cached, str):
        _copy(Path(cached), part)
        return
    folder = part.with_suffix(".hub")  # of its own, so that nothing is kept twice; it too goes on after a cut
    try:
        with _quiet():
            fetched = huggingface_hub.hf_hub_download(
                source.repo, source.file, revision=source.revision, local_dir=folder, local_files_only=offline
            )
        _move(Path(fetched), part)
    except (DownloadError, TransferError):
        raise
    except Exception as error:  # of huggingface_hub and of the clients below it, which share no base
        raise TransferError(f"does not give it: {first_line(error)[:200]}") from error
    shutil.rmtree(folder, ignore_errors=True)


def _in_hub_cache(source: Source) -> bool:
    if not isinstance(source, HubSource):
        return False
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return isinstance(try_to_load_from_cache(source.repo, source.file, revision=source.revision), str)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


# Disk, messages -------------------------------------------------------------------------------------------------------


def _check_room(part: Path, size_bytes: int) -> None:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        free = shutil.disk_usage(part.parent).free
    except OSError as error:
        raise write_error(error) from error
    missing = size_bytes - have + _SPARE_BYTES - free
    if missing > 0:
        raise DownloadError(
            f"'{part.parent}' has {free / 1e6:,.0f} MB free, and {missing / 1e6:,.0f} MB more are needed",
            hint="Make room (visionkd zoo prune), or set VISIONKD_CACHE to a folder with room.",
        )


def _move(path: Path, target: Path) -> None:
    """Rename a file once its content is on the disk, so that a power cut leaves no empty file of the right name."""
    try:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
    except OSError as error:
        raise write_error(error) from error


def _shown(source: Source) -> str:
    if isinstance(source, RepositorySource):
        return f"zoo/{source.path}"
    if isinstance(source, HttpsSource):
        return source.url
    if isinstance(source, HubSource):
        return f"{source.repo}@{source.revision[:12]} on the hub"
    return f"the Python package '{source.package}'"


def _advice(file: CardFile, model: str, offline: bool) -> str:
    packages = [source for source in file.sources if isinstance(source, PythonPackageSource)]
    if packages:
        return f"Run: pip install {packages[0].package}=={packages[0].version}"
    if offline:
        return (
            f"Run 'visionkd zoo pull {model}' once without --offline, or copy the folder '{cache_root()}' from a "
            "machine where that was done."
        )
    return "Try again: what was fetched is kept, and the next pull goes on from there."
