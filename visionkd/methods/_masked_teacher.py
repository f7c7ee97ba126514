"""A masked autoencoder as a teacher: run on the student's visible patches, and only as far as it is learned from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionkd.errors import Problem, RequestError
from visionkd.models.masked import encode, num_prefix, plain_problem, resize_grid, sincos_positions
from visionkd.models.masked_decoder import decoder_of
from visionkd.models.network import Network


class MaskedTeacher(nn.Module):
    """The part of a teacher that runs. Its parameters are the teacher's own; blocks behind the last one are left out.

    Args:
        network: The teacher.
        blocks: Encoder blocks whose outputs are wanted, counted from 0; the encoder ends with the last of them.
        decoder_block: Block of its decoder whose output is wanted instead, counted from 1.
    """

    def __init__(self, network: Network, *, blocks: Sequence[int] = (), decoder_block: int | None = None) -> None:
        super().__init__()
        self.network = _cut(network, 1 + max(blocks)) if decoder_block is None else network
        self.blocks, self.decoder_block = tuple(blocks), decoder_block
        self.decoder = None
        if decoder_block is not None:
            self.decoder = decoder_of(network)
            self.decoder.blocks = self.decoder.blocks[:decoder_block]
            self.decoder.norm = self.decoder.pred = None

    def forward(self, image: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> tuple[Tensor, ...]:
        """Return the wanted features, B x (prefix + K) x D of the encoder or B x (prefix + L) x D of the decoder.

        Args:
            image: B x 3 x H x W in [0, 1].
            ids_keep: B x K, the patches that the student sees.
            ids_restore: B x L, see :class:`visionkd.models.masked.Masking`.
        """
        net: Any = self.network.net
        image = self.network.prepare(image)
        if self.decoder is None:
            return encode(net, image, ids_keep, blocks=self.blocks, stop=True).features
        tokens = encode(net, image, ids_keep).tokens
        return (self.decoder(tokens, ids_restore),)


def _cut(network: Network, count: int) -> Network:
    """Return a twin with the first ``count`` blocks, which shares all its tensors; the network stays whole."""
    twin, net = _shallow(network), _shallow(network.net)
    net.blocks = net.blocks[:count]
    twin.net = net
    return twin


def _shallow(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def three_quarters(depth: int) -> int:
    """Return the block that ends three quarters of a network, counted from 0: 17 of 24, 8 of 12, 2 of 3, 0 of 1."""
    return max(0, -(-3 * depth // 4) - 1)


def pair_problems(student: Network, teacher: Network, *, key: str = "--teacher") -> list[Problem]:
    """Return what keeps a teacher from seeing the patches that the student sees."""
    reason = plain_problem(teacher.net)
    if reason is not None:
        hint = "Take one such as vit_large_patch16_224.mae, or a run of 'visionkd train --objective mae'."
        return [Problem(key, f"'{teacher.architecture}' {reason}", hint)]
    if plain_problem(student.net) is not None:
        return []  # told elsewhere
    own, theirs = num_prefix(student.net), num_prefix(teacher.net)
    if own != theirs:
        text = f"'{teacher.architecture}' has {theirs} tokens in front of its patches, the student {own}"
        return [Problem(key, text, "Take networks with the same class and register tokens.")]
    grid = student.net.patch_embed.grid_size
    if teacher.net.patch_embed.grid_size == grid:
        return []
    problems = []
    try:
        resize_grid(copy.deepcopy(teacher), grid)
    except RequestError as error:
        problems.append(Problem(key, f"cannot be given the student's grid of patches: {error.message}"))
    saved = teacher.masked_decoder
    positions = None if saved is None else saved.tensors.get("decoder_pos_embed")
    if positions is not None and not _is_fixed(positions, teacher):
        text = "its decoder has learned positions, which cannot be built for the student's grid of patches"
        problems.append(Problem(key, text, "Give the student the teacher's patch and image size."))
    return problems


def _is_fixed(positions: Tensor, teacher: Network) -> bool:
    grid, width = teacher.net.patch_embed.grid_size, positions.shape[-1]
    table = sincos_positions(grid, width, prefix=num_prefix(teacher.net))[None]
    return positions.shape == table.shape and torch.allclose(positions.float(), table, atol=1e-4)


def match_grid(student: Network, teacher: Network) -> list[str]:
    """Give the teacher the student's grid of patches where it has another; return what to say about it."""
    old, grid = teacher.net.patch_embed.grid_size, student.net.patch_embed.grid_size
    if old == grid:
        return []
    before = teacher.input.img_size
    resize_grid(teacher, grid)
    after = teacher.input.img_size
    return [
        f"{teacher.architecture} sees images of {after[0]} x {after[1]} pixels in place of {before[0]} x {before[1]},"
        f" so that its patches are the student's {grid[0]} x {grid[1]}; its positions were built anew or resampled"
    ]
