"""The light decoder of a masked autoencoder.

It trains beside its encoder and is kept in a file of its own, under the names that the authors' files give its tensors
(``decoder_embed``, ``mask_token``, ``decoder_blocks``, ...).

He, Chen, Xie, Li, Dollar and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from visionkd.errors import RequestError, WorkError
from visionkd.models.masked import initialize, num_prefix, sincos_positions, take
from visionkd.models.network import Network

_EPS = 1e-6
_TOKEN_STD = 0.02
_HEAD_WIDTH = 32  # of the decoders that the authors published, whose files do not say it


@dataclass(frozen=True)
class DecoderSpec:
    """Size of a decoder.

    Attributes:
        width: Channels, a multiple of 4 and of ``heads``.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Width of the blocks' hidden layers as a multiple of ``width``.
        normalize_pixels: Whether it was trained to predict standardised patches; None where nobody knows.
    """

    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    normalize_pixels: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class SavedDecoder:
    """A decoder beside the weights of its encoder: its size and its tensors, by the names in the authors' files."""

    spec: DecoderSpec
    tensors: Mapping[str, Tensor]


class MaskedDecoder(nn.Module):
    """Fills the places of removed patches with a learned token and runs a few blocks over all places.

    Args:
        encoder_width: Channels of the encoder's tokens.
        grid: Rows and columns of patches.
        patch: Height and width of a patch in pixels.
        prefix: Tokens in front of the patches.
        spec: Its size.
        predicts: Whether it has a head that predicts pixels.
    """

    def __init__(
        self,
        *,
        encoder_width: int,
        grid: tuple[int, int],
        patch: tuple[int, int],
        prefix: int,
        spec: DecoderSpec,
        predicts: bool = True,
    ) -> None:
        super().__init__()
        self.spec, self.prefix = spec, prefix
        norm = partial(nn.LayerNorm, eps=_EPS)
        self.embed = nn.Linear(encoder_width, spec.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.width).normal_(std=_TOKEN_STD))
        table = sincos_positions(grid, spec.width, prefix=prefix).unsqueeze(0)
        self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList(
            Block(spec.width, spec.heads, mlp_ratio=spec.mlp_ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(spec.depth)
        )
        self.norm = norm(spec.width) if predicts else None
        self.pred = nn.Linear(spec.width, patch[0] * patch[1] * 3) if predicts else None
        initialize(self)

    def forward(self, tokens: Tensor, ids_restore: Tensor, *, blocks: int | None = None) -> Tensor:
        """Return the residual stream behind ``blocks`` blocks (None: all), B x (prefix + L) x width.

        Args:
            tokens: The encoder's, B x (prefix + K) x D.
            ids_restore: B x L, see :class:`Masking`.
            blocks: How many blocks to run.
        """
        hidden = self.embed(tokens)
        prefix, kept = hidden[:, : self.prefix], hidden[:, self.prefix :]
        removed = ids_restore.shape[1] - kept.shape[1]
        fill = self.mask_token.to(kept.dtype).expand(len(kept), removed, -1)
        places = take(torch.cat([kept, fill], dim=1), ids_restore)
        hidden = torch.cat([prefix, places], dim=1) + self.pos_embed
        for block in self.blocks[:blocks]:
            hidden = block(hidden)
        return hidden

    def predict(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return predicted patches, B x L x (p * p * 3), from the last hidden features.

        Args:
            hidden: B x (prefix + L) x width.
            ids: B x M, the patches to predict; None takes all L.
        """
        assert self.norm is not None and self.pred is not None, "built without a head for pixels"
        places = hidden[:, self.prefix :]
        return self.pred(self.norm(places if ids is None else take(places, ids)))

    def saved(self) -> SavedDecoder:
        """Return size and tensors, on the CPU."""
        named = {_outer_name(name): value.detach().cpu().clone() for name, value in self.state_dict().items()}
        return SavedDecoder(self.spec, named)


def new_decoder(net: VisionTransformer, spec: DecoderSpec, *, predicts: bool = True) -> MaskedDecoder:
    """Return a fresh decoder for the tokens of a plain vision transformer."""
    return MaskedDecoder(
        encoder_width=net.embed_dim, grid=net.patch_embed.grid_size, patch=net.patch_embed.patch_size,
        prefix=num_prefix(net), spec=spec, predicts=predicts,
    )  # fmt: skip


def decoder_of(network: Network) -> MaskedDecoder:
    """Return the decoder that was kept beside a network.

    Raises:
        RequestError: If there is none.
        WorkError: If its tensors are not those of such a decoder.
    """
    saved = network.masked_decoder
    if saved is None:
        raise RequestError(no_decoder_text(network), hint=NO_DECODER_HINT)
    decoder = new_decoder(network.net, saved.spec)
    tensors = {_inner_name(name): value for name, value in saved.tensors.items()}
    positions = tensors.pop("pos_embed", decoder.pos_embed)
    if positions.shape == decoder.pos_embed.shape:
        tensors["pos_embed"] = positions
    else:  # another grid than it was trained on: the fixed table is built anew
        tensors["pos_embed"] = decoder.pos_embed
    try:
        decoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise WorkError(f"the decoder beside '{network.architecture}' cannot be used: {error}") from error
    return decoder


def no_decoder_text(network: Network) -> str:
    """Say that a network comes without a decoder."""
    return f"'{network.architecture}' comes without the decoder of its masked pre-training"


NO_DECODER_HINT = (
    "Encoder-only files (such as timm's .mae weights) lack it: give a run of 'visionkd train --objective mae', or a"
    " file with the authors' whole autoencoder (ARCHITECTURE@FILE)."
)


def split_decoder(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], SavedDecoder | None]:
    """Part the tensors of a whole masked autoencoder into the encoder's and the decoder's."""
    if "mask_token" not in tensors or "decoder_embed.weight" not in tensors:
        return dict(tensors), None
    own = {name: value for name, value in tensors.items() if name == "mask_token" or name.startswith("decoder_")}
    width = own["decoder_embed.weight"].shape[0]
    depth = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("decoder_blocks."))
    hidden = own["decoder_blocks.0.mlp.fc1.weight"].shape[0]
    spec = DecoderSpec(width, depth, max(1, width // _HEAD_WIDTH), hidden / width)
    return {name: value for name, value in tensors.items() if name not in own}, SavedDecoder(spec, own)


def _outer_name(name: str) -> str:
    return name if name == "mask_token" else f"decoder_{name}"


def _inner_name(name: str) -> str:
    return name.removeprefix("decoder_")
