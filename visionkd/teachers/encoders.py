"""Image-text encoders: images, crops, objects in crops and texts, as embeddings of length 1 in one space.

Two kinds: those of open_clip, by name, and those that ``visionkd train --objective contrastive`` makes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkd.config.schema import NetworkConfig
from visionkd.errors import DownloadError, Problem, RequestError, did_you_mean, first_line
from visionkd.models.factory import create_network, resolve_name
from visionkd.models.names import OPEN_CLIP
from visionkd.models.network import Network
from visionkd.models.normalize import Normalize, resize
from visionkd.models.package_file import read_card
from visionkd.teachers.object_attention import (
    ClipTransformer,
    SteppedTransformer,
    TimmTransformer,
    clip_stepping_problem,
    encode_objects,
    encode_whole,
    stepping_problem,
)
from visionkd.types import InputSpec

_UPSAMPLE = 2
_BATCH = 64


class ImageTextEncoder(Protocol):
    """What a method may ask of an image-text encoder; everything without gradient, in float32, of length 1.

    Attributes:
        name: As it was asked for.
        identity: Changes with the weights, the architecture and the patches of masked crops: part of a cache's key.
        dim: Length of an embedding's vector.
        img_size: Height and width of the crops that it takes.
        grid: Rows and columns of the masks that it takes; None where it takes none, and objects are what their plain
            crops show.
        interpolation: How crops are brought to that size: ``bilinear`` or ``bicubic``.
        least_side: Pixels that a whole image must have along each side.
    """

    name: str
    identity: str
    dim: int
    img_size: tuple[int, int]
    grid: tuple[int, int] | None
    interpolation: str
    least_side: int

    def encode_image(self, images: Tensor) -> Tensor:
        """Return B x dim for whole images, B x 3 x H x W in [0, 1], at their own size where the network can."""

    def encode_crops(self, crops: Tensor, outside: Tensor | None = None) -> Tensor:
        """Return N x dim for crops, N x 3 x H x W in [0, 1]; ``outside`` (N x grid) hides what is no object."""

    def encode_text(self, names: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Return K x dim, for each name the mean over the templates: of length 1 only for one template."""


class TwoTowers:
    """An image tower and a text tower.

    Args:
        name: As it was asked for.
        module: Holds all weights; is put into eval mode and frozen.
        vit: Steps the image tower, where it can be stepped.
        images: Encodes prepared images of the network's own size, B x dim.
        texts: Encodes texts, K x dim.
        spec: Size and statistics of images.
        dim: Length of an embedding.
        upsample: How many times more patches along a side masked crops have.
    """

    def __init__(
        self,
        *,
        name: str,
        module: nn.Module,
        vit: SteppedTransformer | None,
        images: Callable[[Tensor], Tensor],
        texts: Callable[[Sequence[str]], Tensor],
        spec: InputSpec,
        dim: int,
        upsample: int = _UPSAMPLE,
    ) -> None:
        self.name, self.dim, self.img_size = name, dim, tuple(spec.img_size)
        self.module = module.eval().requires_grad_(False)
        self.grid = None if vit is None else vit.grid(upsample)
        self._vit, self._images, self._texts, self._upsample = vit, images, texts, upsample
        self.interpolation = spec.interpolation
        self.least_side = 1 if self.grid is None else -(-self.img_size[0] * upsample // self.grid[0])
        self._normalize = Normalize(spec.mean, spec.std)
        self.identity = f"{weights_hash(module)}-x{upsample if vit is not None else 0}"

    def to(self, device: torch.device | str) -> TwoTowers:
        """Move it, and return it."""
        self.module.to(device)
        self._normalize.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """See :class:`ImageTextEncoder`; a network that cannot be stepped resizes its images."""
        found = []
        for part in images.split(_BATCH):
            if self._vit is None:
                found.append(F.normalize(self._images(self._prepared(part)).float(), dim=-1))
            else:
                found.append(encode_whole(self._vit, self._normalize(part.to(self.device))))
        return self._joined(found)

    @torch.no_grad()
    def encode_crops(self, crops: Tensor, outside: Tensor | None = None) -> Tensor:
        """See :class:`ImageTextEncoder`; crops of another size than ``img_size`` are resized."""
        if outside is not None and (self._vit is None or tuple(outside.shape[1:]) != self.grid):
            raise ValueError(f"masks of {tuple(outside.shape[1:])} for a grid of {self.grid}")
        found = []
        for start in range(0, len(crops), _BATCH):
            part = self._prepared(crops[start : start + _BATCH])
            if outside is None:
                found.append(F.normalize(self._images(part).float(), dim=-1))
            else:
                hidden = outside[start : start + _BATCH].to(self.device)
                found.append(encode_objects(self._vit, part, hidden, upsample=self._upsample))
        return self._joined(found)

    @torch.no_grad()
    def encode_text(self, names: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """See :class:`ImageTextEncoder`.

        Raises:
            RequestError: If a name is one that the encoder cannot read, or a template has no place for it.
        """
        if not names or not templates:
            raise RequestError("no class names" if not names else "no templates")
        if wrong := [template for template in templates if "{}" not in template]:
            raise RequestError(f"a template needs {{}} where the class name goes: {', '.join(map(repr, wrong))}")
        of_each = [self._texts([template.replace("{}", name) for name in names]) for template in templates]
        return torch.stack([F.normalize(found.float(), dim=-1) for found in of_each]).mean(0)

    def _prepared(self, images: Tensor) -> Tensor:
        return self._normalize(resize(images.to(self.device), self.img_size, self.interpolation))

    def _joined(self, found: list[Tensor]) -> Tensor:
        return torch.cat(found) if found else torch.zeros(0, self.dim, device=self.device)


def open_encoder(name: str, *, upsample: int = _UPSAMPLE) -> TwoTowers:
    """Return an image-text encoder, on the CPU.

    Args:
        name: A run or packaged model of ``visionkd train --objective contrastive``, ``open_clip:ARCHITECTURE/TAG`` for
            published weights, ``open_clip:ARCHITECTURE@FILE`` for weights on disk, ``open_clip:hf-hub:OWNER/NAME``.
        upsample: How many times more patches along a side masked crops have.

    Raises:
        RequestError: If the name is unknown, or is that of a network that knows no texts.
        DownloadError: If published weights cannot be had.
        DataError: If a file is damaged.
    """
    if name.startswith(OPEN_CLIP):
        return _open_clip(name, name.removeprefix(OPEN_CLIP), upsample)
    network = create_network(NetworkConfig(name=name), in_training=False)
    if network.image_text is None:
        raise RequestError(
            f"'{name}' encodes images and no texts",
            hint="Train one that does with 'visionkd train --objective contrastive', or take one of open_clip, "
            "such as open_clip:ViT-B-32-quickgelu/openai.",
        )
    return from_network(network, name=name, upsample=upsample)


def is_encoder(name: str) -> bool:
    """Whether a name stands for an image-text encoder; none is loaded to find out."""
    if name.startswith(OPEN_CLIP):
        return True
    try:
        resolved = resolve_name(name)
    except RequestError:
        return False
    return resolved.source == "package" and resolved.path is not None and "text" in read_card(resolved.path)


#: What class names are put into where nobody says so: phrases about photographs for encoders of these.
_OWN_TEMPLATES = ("a {}",)
_PHOTO_TEMPLATES = (
    "a photo of a {}",
    "a photo of one {}",
    "a picture that shows a {}",
    "a {} in a scene",
    "a close view of a {}",
    "a {} seen from far away",
    "a small {}",
    "a large {}",
)


def usual_templates(name: str) -> tuple[str, ...]:
    """Return what class names are put into for the encoder called ``name``, where nobody says so."""
    return _PHOTO_TEMPLATES if name.startswith(OPEN_CLIP) else _OWN_TEMPLATES


def from_network(network: Network, *, name: str, upsample: int = _UPSAMPLE) -> TwoTowers:
    """Return the encoder that a contrastive training made of ``network``."""
    head = network.image_text.head()
    vit = None if stepping_problem(network.net) else TimmTransformer(network.net, head.projection)

    def texts(given: Sequence[str]) -> Tensor:
        return head.text(head.text.tokenizer(given).to(head.log_scale.device))

    def images(prepared: Tensor) -> Tensor:
        features = network.net.forward_features(prepared)
        return head.projection(network.net.forward_head(features, pre_logits=True))

    return TwoTowers(
        name=name, module=nn.ModuleDict({"image": network.net, "text": head}), vit=vit, images=images, texts=texts,
        spec=network.input, dim=head.text.spec.dim, upsample=upsample,
    )  # fmt: skip


# open_clip ------------------------------------------------------------------------------------------------------------


def _open_clip(name: str, rest: str, upsample: int) -> TwoTowers:
    try:
        import open_clip
    except ImportError as error:
        raise RequestError(f"'{name}' needs the package open_clip", hint="pip install 'visionkd[clip]'") from error
    architecture, file, tag = rest, None, None
    if not rest.startswith("hf-hub:"):
        if "@" in rest:
            architecture, _, file = rest.partition("@")
        else:
            architecture, _, tag = rest.partition("/")
        _check_clip(open_clip, name, architecture, file, tag)
    model = _built(open_clip, name, architecture, file, tag)
    tokenizer = open_clip.get_tokenizer(architecture)

    def texts(given: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(given)).to(next(model.parameters()).device))

    visual: Any = model.visual
    given = dict(visual.preprocess_cfg)
    size = given["size"]
    spec = InputSpec(
        img_size=(size, size) if isinstance(size, int) else tuple(size), mean=tuple(given["mean"]),
        std=tuple(given["std"]), interpolation=given["interpolation"],
    )  # fmt: skip
    vit = None if clip_stepping_problem(visual) else ClipTransformer(visual)
    with torch.no_grad():
        dim = texts(["a"]).shape[1]
    return TwoTowers(
        name=name, module=model, vit=vit, images=model.encode_image, texts=texts, spec=spec, dim=dim, upsample=upsample
    )


def _check_clip(open_clip: Any, name: str, architecture: str, file: str | None, tag: str | None) -> None:
    known = open_clip.list_models()
    if architecture not in known:
        near = did_you_mean(architecture, known)
        raise RequestError(f"open_clip has no '{architecture}'", hint=near or f"It has {', '.join(known[:8])}, ...")
    if file is not None:
        if not Path(file).expanduser().is_file():
            raise RequestError(f"'{file}' is no file", hint=f"Write {OPEN_CLIP}{architecture}@FILE.")
        return
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        said = f"open_clip has no weights '{tag}' of {architecture}" if tag else f"'{name}' does not say which weights"
        raise RequestError(said, hint=f"Write {OPEN_CLIP}{architecture}/TAG with one of {', '.join(tags)}, or @FILE.")


def _built(open_clip: Any, name: str, architecture: str, file: str | None, tag: str | None) -> nn.Module:
    if file is None:
        try:
            return open_clip.create_model(architecture, pretrained=tag, require_pretrained=True)
        except Exception as error:
            raise DownloadError(
                f"the weights of '{name}' cannot be had: {first_line(error)[:300]}",
                hint=f"Fetch them where there is a network, and write {OPEN_CLIP}{architecture}@FILE.",
            ) from error
    model = open_clip.create_model(architecture, load_weights=False)
    try:
        open_clip.load_checkpoint(model, str(Path(file).expanduser()), weights_only=True)
    except Exception as error:
        raise RequestError(
            Problem("encoder", f"'{file}' does not hold the weights of {architecture}: {first_line(error)[:300]}"),
            hint="Only safetensors and state dicts without Python objects are read. Weights that OpenAI trained belong "
            "to the architectures whose names end in -quickgelu.",
        ) from error
    return model


# Both -----------------------------------------------------------------------------------------------------------------


def weights_hash(module: nn.Module) -> str:
    """Return what changes with the weights of a module, or their names."""
    digest = hashlib.sha256()
    for part in _parts(module):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(module: nn.Module) -> Iterator[bytes]:
    for name, tensor in sorted(module.state_dict().items()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
