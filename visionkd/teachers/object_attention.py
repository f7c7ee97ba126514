"""The [OBJ] token: what a vision transformer sees of one object in a crop that shows more than the object.

    y_0 = the class token behind the first norm
    kv  = LN1([patches of X_l; y_l]),   y' = y_l + Attn(LN1(y_l), kv, bias),   y_{l+1} = y' + MLP(LN2(y'))

with the block's own weights, a bias of -100 on patches outside the object, and X_{l+1} = block(X_l) as if y were not
there. With a mask that leaves nothing out, y is the class token. Patches may be denser than the network's own, whose
positions are then resized bilinearly.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

MASK_BIAS = -100.0


class SteppedTransformer(Protocol):
    """A vision transformer whose blocks can be run one by one, with a class token first and one of its own beside."""

    def tokens(self, images: Tensor, upsample: int) -> Tensor:
        """Return B x (1 + patches) x D, as the first block takes them."""

    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks."""

    def step(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Return what ``block`` makes of the ordinary tokens."""

    def step_beside(self, block: nn.Module, own: Tensor, patches: Tensor, bias: Tensor) -> Tensor:
        """Return what ``block`` makes of ``own``, B x 1 x D, which sees ``patches`` and itself under ``bias``."""

    def project(self, own: Tensor) -> Tensor:
        """Return the embedding, B x dim, of a token that has passed all blocks, B x D."""

    def grid(self, upsample: int) -> tuple[int, int]:
        """Return rows and columns of patches of an image of the network's own size."""


def encode_objects(
    vit: SteppedTransformer, crops: Tensor, outside: Tensor, *, upsample: int = 2, mask_bias: float = MASK_BIAS
) -> Tensor:
    """Return the embedding of the object in each crop, N x dim of length 1.

    Args:
        vit: See :func:`stepped`.
        crops: N x 3 x H x W, of the size and statistics that the transformer takes.
        outside: N x rows x columns, of bool or 0 and 1, in patches: 1 outside the object.
        upsample: How many times more patches along each side than the network has.
        mask_bias: Added to the attention to patches outside the object, before its softmax.
    """
    tokens = vit.tokens(crops, upsample)
    bias = outside.flatten(1).to(tokens) * mask_bias
    if bias.shape[1] != tokens.shape[1] - 1:
        raise ValueError(f"a mask of {bias.shape[1]} cells for {tokens.shape[1] - 1} patches")
    bias = F.pad(bias, (0, 1))  # nothing is taken off the token itself
    own = tokens[:, :1]
    for block in vit.blocks():
        own = vit.step_beside(block, own, tokens[:, 1:], bias)
        tokens = vit.step(block, tokens)
    return F.normalize(vit.project(own[:, 0]).float(), dim=-1)


def encode_whole(vit: SteppedTransformer, images: Tensor, *, upsample: int = 1) -> Tensor:
    """Return the embedding of the class token of each image, N x dim of length 1; images may have any size.

    Args:
        vit: See :func:`stepped`.
        images: N x 3 x H x W, of the statistics that the transformer takes.
        upsample: How many times more patches along each side than the network has.
    """
    tokens = vit.tokens(images, upsample)
    for block in vit.blocks():
        tokens = vit.step(block, tokens)
    return F.normalize(vit.project(tokens[:, 0]).float(), dim=-1)


def dense_patches(images: Tensor, projection: nn.Conv2d, upsample: int) -> Tensor:
    """Return patches by the same filter at a finer stride, B x D x rows x columns."""
    stride = tuple(size // upsample for size in projection.kernel_size)
    padding = (0, 0) if upsample == 1 else tuple((size - 1) // 2 for size in projection.kernel_size)
    return F.conv2d(images, projection.weight, projection.bias, stride, padding)


def resized_positions(positions: Tensor, grid: tuple[int, int], *, old: tuple[int, int]) -> Tensor:
    """Resize a table of positions, (1 + rows * columns) x D, to another grid; that of the class token stays.

    Args:
        positions: The class token's first.
        grid: Rows and columns wanted.
        old: Rows and columns of the table.
    """
    if grid == old:
        return positions
    cells = positions[1:].T.reshape(1, positions.shape[1], *old)
    cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], cells[0].flatten(1).T])


class TimmTransformer:
    """Steps timm's plain vision transformer.

    Args:
        net: See :func:`stepping_problem`.
        projection: Brings the class token behind the last norm into the space of texts; None takes the network's head.
    """

    def __init__(self, net: VisionTransformer, projection: nn.Module | None = None) -> None:
        self.net = net
        self.projection = net.head if projection is None else projection

    def tokens(self, images: Tensor, upsample: int) -> Tensor:
        net = self.net
        patches = dense_patches(images, net.patch_embed.proj, upsample)
        positions = resized_positions(net.pos_embed[0], tuple(patches.shape[2:]), old=tuple(net.patch_embed.grid_size))
        patches = net.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        return net.norm_pre(torch.cat([net.cls_token.expand(len(images), -1, -1), patches], dim=1) + positions)

    def blocks(self) -> Sequence[nn.Module]:
        return tuple(self.net.blocks)

    def step(self, block: nn.Module, tokens: Tensor) -> Tensor:
        return block(tokens)

    def step_beside(self, block: nn.Module, own: Tensor, patches: Tensor, bias: Tensor) -> Tensor:
        keys = block.norm1(torch.cat([patches, own], dim=1))
        own = own + block.ls1(_attend(block.attn, keys[:, -1:], keys, bias))
        return own + block.ls2(block.mlp(block.norm2(own)))

    def project(self, own: Tensor) -> Tensor:
        return self.projection(self.net.fc_norm(self.net.norm(own)))

    def grid(self, upsample: int) -> tuple[int, int]:
        rows, columns = self.net.patch_embed.grid_size
        return rows * upsample, columns * upsample


class ClipTransformer:
    """Steps the vision transformer of open_clip; ``visual`` is the image tower of one of its models."""

    def __init__(self, visual: nn.Module) -> None:
        self.visual: Any = visual

    def tokens(self, images: Tensor, upsample: int) -> Tensor:
        visual = self.visual
        patches = dense_patches(images, visual.conv1, upsample)
        positions = resized_positions(
            visual.positional_embedding, tuple(patches.shape[2:]), old=tuple(visual.grid_size)
        )
        own = visual.class_embedding.expand(len(images), 1, -1)
        return visual.ln_pre(torch.cat([own, patches.flatten(2).transpose(1, 2)], dim=1) + positions)

    def blocks(self) -> Sequence[nn.Module]:
        return tuple(self.visual.transformer.resblocks)

    def step(self, block: nn.Module, tokens: Tensor) -> Tensor:
        return block(tokens)

    def step_beside(self, block: nn.Module, own: Tensor, patches: Tensor, bias: Tensor) -> Tensor:
        keys = block.ln_1(torch.cat([patches, own], dim=1))
        heads = block.attn.num_heads
        mask = bias[:, None].repeat_interleave(heads, 0)
        seen = block.attn(keys[:, -1:], keys, keys, need_weights=False, attn_mask=mask)[0]
        own = own + block.ls_1(seen)
        return own + block.ls_2(block.mlp(block.ln_2(own)))

    def project(self, own: Tensor) -> Tensor:
        return self.visual.ln_post(own) @ self.visual.proj

    def grid(self, upsample: int) -> tuple[int, int]:
        rows, columns = self.visual.grid_size
        return rows * upsample, columns * upsample


def _attend(attention: nn.Module, query: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Attention of ``query`` (B x 1 x D) to ``keys`` (B x N x D), by the weights of a block that attends to itself."""
    weights = attention.qkv.weight.chunk(3)
    biases = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    q, k, v = (
        F.linear(x, weight, own).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, own in zip((query, keys, keys), weights, biases, strict=True)
    )
    seen = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v, attn_mask=bias[:, None, None])
    return attention.proj(attention.norm(seen.transpose(1, 2).flatten(2)))


def stepping_problem(net: nn.Module) -> str | None:
    """Say why the blocks of a timm network cannot be stepped, None where they can."""
    if type(net) is not VisionTransformer:
        return f"is a {type(net).__name__}, no plain vision transformer of timm"
    if net.cls_token is None or net.num_prefix_tokens != 1 or net.no_embed_class or net.pos_embed is None:
        return "has no class token with a position of its own, or other tokens beside it"
    if net.global_pool != "token":
        return f"pools by '{net.global_pool}', not by its class token"
    if type(net.patch_embed) is not PatchEmbed:  # that of a hybrid has a network of its own in front
        return "does not cut its images into patches by one convolution"
    if not all(type(block) is Block and getattr(block.attn, "gate", None) is None for block in net.blocks):
        return "has blocks other than the plain ones"
    return None


def clip_stepping_problem(visual: Any) -> str | None:
    """Say why the blocks of an image tower of open_clip cannot be stepped, None where they can."""
    wanted = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj")
    if not all(hasattr(visual, name) for name in wanted) or visual.proj is None:
        return f"is a {type(visual).__name__}, no vision transformer of open_clip"
    if visual.pool_type != "tok" or visual.attn_pool is not None:
        return "does not pool by its class token"
    if not all(type(block).__name__ == "ResidualAttentionBlock" for block in visual.transformer.resblocks):
        return "has blocks other than the plain ones"
    return None
