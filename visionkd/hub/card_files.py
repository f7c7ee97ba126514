"""The part of a card that says where files are: sources, and the forms of a model. No torch.

It is data from elsewhere: unknown keys are refused, no path leaves its folder, and no key runs code.
"""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

#: What a file of an artifact may be called. Anything else could be something that runs.
SAFE_SUFFIXES = (".safetensors", ".onnx", ".json", ".txt")
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _relative(path: str) -> str:
    """Refuse a path that is absolute, climbs, or means another thing on another system."""
    parts = PurePosixPath(path).parts
    if (
        not parts
        or PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).drive
        or any(part in (".", "..") or part.startswith(".") for part in parts)
        or any(letter in path for letter in "\\:\0")
        or any(ord(letter) < 32 for letter in path)
    ):
        raise ValueError(
            f"must be a path below its folder, without '..', a leading '/' or hidden names (given: {path})"
        )
    return path


def _file_name(path: str) -> str:
    if PurePosixPath(_relative(path)).name != path:
        raise ValueError(f"must be the name of a file, without folders (given: {path})")
    return path


def _safe_url(url: str) -> str:
    parts = urlsplit(url)
    plain = parts.scheme == "http" and parts.hostname in _LOOPBACK
    if (parts.scheme != "https" and not plain) or not parts.hostname:
        raise ValueError(f"must begin with https:// (given: {url})")
    if parts.username or parts.password:
        raise ValueError("must not hold a user name or a password")
    return url


# YAML reads 0.1 as a number, and so a version of two parts
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.+-]*$", max_length=100)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha256Prefix = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
RelativePath = Annotated[str, AfterValidator(_relative)]
FileName = Annotated[str, AfterValidator(_file_name)]
Url = Annotated[str, AfterValidator(_safe_url)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0.0)]


class StrictCard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Where files are ------------------------------------------------------------------------------------------------------


class RepositorySource(StrictCard):
    """A file of this repository; ``path`` counts from the folder ``zoo/``. Absent in an installed package."""

    kind: Literal["repository"]
    path: RelativePath


class HttpsSource(StrictCard):
    """A file behind an address. Several sources of this kind are mirrors of one another."""

    kind: Literal["https"]
    url: Url


class HubSource(StrictCard):
    """A file of a Hugging Face hub repository at a commit; branches and tags are refused because they move."""

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    file: RelativePath


class PythonPackageSource(StrictCard):
    """A file inside an installed Python package; none of its code is run. ``file`` counts from site-packages."""

    kind: Literal["python-package"]
    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: Text
    file: RelativePath


Source = Annotated[
    RepositorySource | HttpsSource | HubSource | PythonPackageSource,
    Field(discriminator="kind"),
]


class CardFile(StrictCard):
    """One file: its name in the artifact, what it must be, and where it can be had, the preferred place first."""

    name: FileName
    sha256: Sha256
    size_bytes: Count
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]


# Artifacts ------------------------------------------------------------------------------------------------------------


class PackageArtifact(StrictCard):
    """A packaged model: ``model.safetensors`` and ``model.json``, and what else visionkd wrote beside them."""

    format: Literal["package"]
    precision: Literal["float32", "int8"] = "float32"
    files: tuple[CardFile, ...]

    @model_validator(mode="after")
    def _check(self) -> PackageArtifact:
        names = [file.name for file in self.files]
        _check_names(names, SAFE_SUFFIXES)
        if missing := {"model.safetensors", "model.json"} - set(names):
            raise ValueError(f"a package needs {' and '.join(sorted(missing))}")
        return self


class OnnxArtifact(StrictCard):
    """An exported model in one file. ``target`` says what its INT8 is written for."""

    format: Literal["onnx"]
    precision: Literal["float32", "float16", "int8"] = "float32"
    target: Literal["cpu", "tensorrt"] | None = None
    files: Annotated[tuple[CardFile, ...], Field(min_length=1, max_length=1)]

    @model_validator(mode="after")
    def _check(self) -> OnnxArtifact:
        _check_names([file.name for file in self.files], (".onnx",))
        if (self.target is not None) != (self.precision == "int8"):
            raise ValueError("'target' goes with precision int8")
        return self


class CheckpointArtifact(StrictCard):
    """A published weight file, packaged at the first pull with the card's architecture, input and classes.

    Attributes:
        keys: ``names``: the keys are the architecture's, or those that timm converts. ``order``: other names for the
            same tensors in the same order.
    """

    format: Literal["checkpoint"]
    keys: Literal["names", "order"] = "names"
    files: Annotated[tuple[CardFile, ...], Field(min_length=1, max_length=1)]

    @model_validator(mode="after")
    def _check(self) -> CheckpointArtifact:
        _check_names([file.name for file in self.files], CHECKPOINT_SUFFIXES)
        return self


class PublishedArtifact(StrictCard):
    """Weights that timm or torchvision publish and fetch.

    Attributes:
        model: ``timm/NAME.TAG`` or ``torchvision/NAME.TAG``: the tag is required, since default weights change.
        sha256: SHA-256 of the file, or the first eight digits or more that its publisher put into its name; None
            where the publisher states none, and then what is pulled is trusted as the library trusts it.
        size_bytes: Size of the file, if known.
    """

    format: Literal["published"]
    model: Annotated[str, Field(pattern=r"^(timm|torchvision)/[A-Za-z0-9_]+\.[A-Za-z0-9_]+$")]
    sha256: Sha256Prefix | None = None
    size_bytes: Count | None = None


Artifact = Annotated[
    PackageArtifact | OnnxArtifact | CheckpointArtifact | PublishedArtifact,
    Field(discriminator="format"),
]


def _check_names(names: list[str], suffixes: tuple[str, ...]) -> None:
    if len({name.casefold() for name in names}) != len(names):
        raise ValueError("two files have the same name")
    for name in names:
        if PurePosixPath(name).suffix not in suffixes:
            raise ValueError(f"'{name}' must end in one of {', '.join(suffixes)}: nothing that may run code is kept")
