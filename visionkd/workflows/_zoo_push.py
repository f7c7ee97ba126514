"""Publish a model of the zoo: into a folder of cards that others can use, or into a hub repository."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionkd.errors import Problem, RequestError, WorkError, first_line
from visionkd.files import replacing, write_text
from visionkd.hub.card import Card, CardFile, CheckpointArtifact, HubSource, PublishedArtifact, RepositorySource
from visionkd.hub.index import card_file, read_card
from visionkd.hub.pull import pull, verify
from visionkd.types import Listener
from visionkd.workflows._zoo_card import card_text

HUB = "hub:"

#: What the hub calls each task.
_TAGS = {
    "classification": "image-classification", "segmentation": "image-segmentation", "detection": "object-detection",
}  # fmt: skip


@dataclass(frozen=True)
class ZooPushed:
    """A model that was published.

    Attributes:
        target: The folder, or the address of the hub repository.
        files: Names of what was written, below it.
        size_mb: Their bytes in 10^6.
        revision: Commit of the hub repository; None for a folder.
    """

    target: str
    files: tuple[str, ...]
    size_mb: float
    revision: str | None = None


def push_zoo(
    *,
    name: str,
    target: str,
    private: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> ZooPushed:
    """Publish a model that this project or you trained: its files, verified, and its card.

    A folder becomes one that ``VISIONKD_ZOO`` may name. A hub repository gets the files, the card as ``card.yaml``
    and a ``README.md``; the card in the zoo then names the files at the new revision as a further source.

    Args:
        name: Name of the model.
        target: A folder, or ``hub:OWNER/NAME``.
        private: Make a new hub repository a private one.
        overwrite: Replace a card and files that the folder has.
        listener: Is told what happens.

    Raises:
        RequestError: If the model is published elsewhere, or the target has it.
        WorkError: If the hub refuses it.
    """
    listener = listener or Listener()
    file = card_file(name)
    card = read_card(file)
    if outside := [form for form, found in card.artifacts.items()
                   if isinstance(found, (PublishedArtifact, CheckpointArtifact))]:  # fmt: skip
        raise RequestError(
            f"zoo:{card.name} is published by {card.publisher or 'others'}: its '{outside[0]}' is not ours to push",
            hint="Push a model that 'visionkd zoo add' made.",
        )
    if card.licence == "unknown":
        raise RequestError(
            f"zoo:{card.name} has no licence, so that nobody may use it", hint=f"Write 'licence:' into {file}"
        )
    files = _verified_files(card, listener)
    if target.startswith(HUB):
        return _to_hub(card, file, files, target.removeprefix(HUB), private, listener)
    return _to_folder(card, files, Path(target).expanduser(), overwrite)


def _verified_files(card: Card, listener: Listener) -> dict[str, Path]:
    """Return the files of all forms by name, each compared with its SHA-256."""
    found: dict[str, Path] = {}
    for form, artifact in card.artifacts.items():
        if isinstance(artifact, PublishedArtifact):
            continue
        pulled = pull(f"{card.name}@{form}", listener=listener)
        verify(card, form)
        assert pulled.path is not None
        folder = pulled.path if pulled.path.is_dir() else pulled.path.parent
        found |= {file.name: folder / file.name for file in artifact.files}
    return found


def _to_folder(card: Card, files: dict[str, Path], root: Path, overwrite: bool) -> ZooPushed:
    target, folder = root / card.task / f"{card.name}.yaml", root / "weights" / card.name
    taken = [path for path in (target, folder) if path.exists()]
    if taken and not overwrite:
        raise RequestError(f"{taken[0]} exists, and nothing is written over unasked.", hint="Give --overwrite.")
    for name, file in files.items():
        with replacing(folder / name) as temporary:
            shutil.copyfile(file, temporary)
    local = {name: RepositorySource(kind="repository", path=f"weights/{card.name}/{name}") for name in files}
    write_text(target, card_text(_with_sources(card, local)))
    names = [str(target.relative_to(root)), *(f"weights/{card.name}/{name}" for name in files)]
    return ZooPushed(str(root), tuple(names), _size_mb(files))


def _to_hub(card: Card, file: Path, files: dict[str, Path], repo: str, private: bool, listener: Listener) -> ZooPushed:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise RequestError("'hub:' needs huggingface_hub", hint="Run: pip install huggingface_hub") from error
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise RequestError(Problem("TARGET", f"'hub:{repo}' is not hub:OWNER/NAME"))
    api = HfApi()
    with tempfile.TemporaryDirectory() as staging:
        folder = Path(staging)
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        (folder / "card.yaml").write_text(card_text(card), encoding="utf-8")
        (folder / "README.md").write_text(readme(card), encoding="utf-8")
        listener.message(f"uploading {len(files) + 2} files, {_size_mb(files):.1f} MB, to {repo}")
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit: Any = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"Add {card.name} from the zoo of visionkd"
            )
        except Exception as error:  # of huggingface_hub and of the clients below it, which share no base
            raise WorkError(
                f"the hub did not take it: {first_line(error)[:200]}", hint="Log in with: hf auth login"
            ) from error
    revision = str(commit.oid)
    hub = {name: HubSource(kind="hub", repo=repo, revision=revision, file=name) for name in files}
    write_text(file, card_text(_with_sources(card, hub)))
    return ZooPushed(f"https://huggingface.co/{repo}", (*files, "card.yaml", "README.md"), _size_mb(files), revision)


def _with_sources(card: Card, sources: dict[str, Any]) -> Card:
    """Return the card with a further source for each file, in place of a former one of its kind."""
    artifacts = {}
    for form, artifact in card.artifacts.items():
        if isinstance(artifact, PublishedArtifact):
            artifacts[form] = artifact
            continue
        files = []
        for file in artifact.files:
            new = sources[file.name]
            others = tuple(each for each in file.sources if each.kind != new.kind)
            ordered = (new, *others) if new.kind == "repository" else (*others, new)
            files.append(CardFile(**{**dict(file), "sources": ordered}))
        artifacts[form] = artifact.model_copy(update={"files": tuple(files)})
    return card.model_copy(update={"artifacts": artifacts})


def readme(card: Card) -> str:
    """Return the page of a hub repository."""
    lines = ["---", f"license: {card.licence}", "library_name: visionkd", "tags:", f"- {_TAGS[card.task]}", "---", ""]
    lines += [f"# {card.name}", "", f"{card.title}.", ""]
    lines += ["```", f"visionkd eval DIR --data {card.data}    # DIR: this repository, downloaded", "```", ""]
    for title, texts in (("Good for", card.good_for), ("Bad for", card.bad_for), ("Notes", card.notes)):
        if texts:
            lines += [f"## {title}", "", *(f"- {text}" for text in texts), ""]
    if card.metrics:
        lines += ["## Measured", "", "| form | data | metrics | how |", "|---|---|---|---|"]
        for row in card.metrics:
            values = ", ".join(f"{name} {value:g}" for name, value in row.values.items())
            lines.append(f"| {row.artifact or ''} | {row.data}, {row.split} | {values} | `{row.how}` |")
        lines.append("")
    if card.training.command:
        lines += ["## Made by", "", f"    {card.training.command}", ""]
    return "\n".join(lines)


def _size_mb(files: dict[str, Path]) -> float:
    return sum(file.stat().st_size for file in files.values()) / 1e6
