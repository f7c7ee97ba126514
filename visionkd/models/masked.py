"""Masked encoders: timm's plain vision transformers on the kept patches of their images alone.

The encoder has no parameters of its own: :func:`encode` runs a transformer that stays what it is and is packaged as it
is. Removed patches are left out before the first product, so they cost nothing and cannot be seen.

He, Chen, Xie, Li, Dollar and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visionkd.errors import RequestError
from visionkd.models.network import Network

_TOKEN_STD = 0.02


# Which patches are kept -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masking:
    """Which patches of each image are kept.

    Attributes:
        ids_keep: B x K, the kept patches, in the order in which the encoder sees them.
        ids_removed: B x (L - K), the others.
        ids_restore: B x L, where each patch lies in that order, removed ones behind the kept ones.
        mask: B x L, 1 where a patch is removed.
    """

    ids_keep: Tensor
    ids_removed: Tensor
    ids_restore: Tensor
    mask: Tensor


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """Return how many of ``num_patches`` are kept: a fraction of a patch is dropped, as in the authors' code."""
    return int(num_patches * (1 - mask_ratio))


def masking(noise: Tensor, keep: int) -> Masking:
    """Keep the ``keep`` patches of each image whose noise is smallest.

    Args:
        noise: B x L.
        keep: K, at least 1.
    """
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept, removed = ids_shuffle[:, :keep], ids_shuffle[:, keep:]
    return Masking(kept, removed, ids_restore, (ids_restore >= keep).to(torch.float32))


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Return tokens ``ids`` (B x K) of ``tokens`` (B x L x D), B x K x D."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# The encoder ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """What the encoder gives.

    Attributes:
        tokens: B x (prefix + K) x D after the final norm; None where the encoder was stopped before.
        features: Outputs of the blocks asked for, of the same shape, before any final norm.
    """

    tokens: Tensor | None
    features: tuple[Tensor, ...] = ()


def plain_problem(net: nn.Module) -> str | None:
    """Say why a network is no plain vision transformer, None where it is one."""
    if not isinstance(net, VisionTransformer):
        return "is no plain vision transformer of timm"
    if type(net) is not VisionTransformer:
        return f"is a {type(net).__name__}, whose tokens are not those of a plain vision transformer"
    projection = getattr(net.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride:
        return "does not cut its images into patches by one convolution"
    if net.pos_embed is None:
        return "has no table of positions, so patches that stand alone have no place"
    if net.embed_dim % 4:
        return f"is {net.embed_dim} wide, and sin-cos positions need a multiple of 4"
    return None


def encode(
    net: VisionTransformer, image: Tensor, ids_keep: Tensor, *, blocks: Sequence[int] = (), stop: bool = False
) -> Encoded:
    """Run a plain vision transformer on the kept patches of its images alone.

    Args:
        net: See :func:`plain_problem`.
        image: B x 3 x H x W, of the size and statistics that ``net`` takes.
        ids_keep: B x K, patches to keep, row by row.
        blocks: Blocks whose outputs are wanted, counted from 0.
        stop: Run no block behind the last of ``blocks``.
    """
    projection = net.patch_embed.proj
    pixels = _pixels(image, projection.kernel_size)
    weight = projection.weight.flatten(1)
    tokens = net.patch_embed.norm(F.linear(take(pixels, ids_keep), weight, projection.bias))
    prefix = _prefix(net, len(image))
    own = 0 if net.no_embed_class else prefix.shape[1]
    positions = net.pos_embed[:, own:].expand(len(image), -1, -1)
    tokens = tokens + take(positions, ids_keep)
    if own:
        prefix = prefix + net.pos_embed[:, :own]
    tokens = net.norm_pre(net.pos_drop(torch.cat([prefix.to(tokens.dtype), tokens], dim=1)))
    found = {}
    for number, block in enumerate(net.blocks):
        tokens = block(tokens)
        if number in blocks:
            found[number] = tokens
        if stop and len(found) == len(set(blocks)):
            return Encoded(None, tuple(found[number] for number in blocks))
    return Encoded(final_norm(net)(tokens), tuple(found[number] for number in blocks))


def final_norm(net: VisionTransformer) -> nn.Module:
    """Return the norm behind the last block, which networks that average their patches have behind the average."""
    return net.fc_norm if isinstance(net.norm, nn.Identity) else net.norm


def num_prefix(net: VisionTransformer) -> int:
    """Number of tokens in front of the patches: the class token, and registers."""
    return int(net.num_prefix_tokens)


def _pixels(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut into patches, B x L x (3 * p * p), in the order of a convolution's weights."""
    batch, channels, rows, columns = image.shape
    cut = image.reshape(batch, channels, rows // patch[0], patch[0], columns // patch[1], patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch[0] * patch[1])


def _prefix(net: VisionTransformer, batch: int) -> Tensor:
    parts = [token for token in (net.cls_token, net.reg_token) if token is not None]
    empty = net.pos_embed.new_empty(1, 0, net.embed_dim)
    return torch.cat([*parts, empty], dim=1).expand(batch, -1, -1)


# Positions and initial weights ----------------------------------------------------------------------------------------


def sincos_positions(grid: tuple[int, int], width: int, *, prefix: int = 0) -> Tensor:
    """Return the fixed table of positions, (prefix + L) x D: the column's sines and cosines, then the row's.

    Args:
        grid: Rows and columns of patches, L = rows * columns.
        width: D, a multiple of 4.
        prefix: Rows of zeros in front.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
    return torch.cat([table.new_zeros(prefix, width), table])


def _table_of(net: VisionTransformer) -> Tensor:
    prefix = 0 if net.no_embed_class else num_prefix(net)
    return sincos_positions(net.patch_embed.grid_size, net.embed_dim, prefix=prefix).unsqueeze(0)


def has_sincos_positions(net: VisionTransformer) -> bool:
    """Whether the table of positions is the fixed one."""
    table = _table_of(net).to(net.pos_embed)
    return net.pos_embed.shape == table.shape and torch.allclose(net.pos_embed, table, atol=1e-4)


@torch.no_grad()
def set_sincos_positions(net: VisionTransformer) -> None:
    """Put the fixed table of positions in place of what is there."""
    net.pos_embed.copy_(_table_of(net))


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draw weights as masked autoencoders begin: Xavier-uniform products, zero biases, unit norms."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


@torch.no_grad()
def initialize_encoder(net: VisionTransformer) -> None:
    """Draw a plain vision transformer's weights anew, as masked autoencoders begin; positions stay what they are."""
    initialize(net)
    nn.init.xavier_uniform_(net.patch_embed.proj.weight.view(net.embed_dim, -1))
    for token in (net.cls_token, net.reg_token):
        if token is not None:
            nn.init.normal_(token, std=_TOKEN_STD)


def resize_grid(network: Network, grid: tuple[int, int]) -> None:
    """Give a network images of so many rows and columns of its patches; a fixed table of positions is built anew.

    Raises:
        RequestError: If the network does not take such images.
    """
    net = network.net
    fixed = has_sincos_positions(net)
    patch = net.patch_embed.patch_size
    size = (grid[0] * patch[0], grid[1] * patch[1])
    try:
        net.set_input_size(img_size=size)
    except (AttributeError, AssertionError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"'{network.architecture}' does not take images of {size[0]} x {size[1]} pixels: {error}"
        ) from error
    if fixed:
        set_sincos_positions(net)
    network.input = type(network.input)(**{**network.input.to_dict(), "img_size": size})
    network.model_args["img_size"] = size[0] if size[0] == size[1] else size
