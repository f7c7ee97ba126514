"""A plain vision transformer with a distillation token and a head of its own for it.

The token stands at the end of the sequence and has no position. Attention does not know the order of its tokens, so
timm's DeiT, which has the token in the second place, is the same function as long as its position there is zero: the
result is packaged as such a DeiT and needs nothing of this project.

Touvron, Cord, Douze, Massa, Sablayrolles and Jegou, "Training data-efficient image transformers & distillation through
attention", ICML 2021, arXiv 2012.12877.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from visionkd.errors import Problem, RequestError
from visionkd.models.names import quiet_libraries
from visionkd.models.network import Network

_BY_WIDTH = {192: "deit_tiny_distilled_patch16_224", 384: "deit_small_distilled_patch16_224"}
_OTHER = "deit_base_distilled_patch16_224"
_PLACE = 1  # behind the class token
_HEAD_STD = 2e-5
_TOKEN_STD = 0.02
_NOT_PASSED = ("num_classes", "global_pool", "class_token", "fc_norm")


def distillation_problem(network: Network) -> str | None:
    """Say why a plain vision transformer cannot take a distillation token, None where it can."""
    net: Any = network.net
    if not net.has_class_token or net.num_prefix_tokens != 1:
        return "has other tokens in front of its patches than one class token"
    if net.global_pool != "token":
        return f"pools its tokens by '{net.global_pool}', and the two heads read the class and the distillation token"
    return None


def with_distillation_token(network: Network, *, classes: Sequence[str] | None, num_classes: int) -> Network:
    """Return the network with a distillation token and two fresh heads.

    Args:
        network: A plain vision transformer with one class token; it is not changed.
        classes: Names of the outputs.
        num_classes: Number of outputs of each head.

    Raises:
        RequestError: If it has parts that a DeiT lacks.
    """
    net: Any = network.net
    first = net.blocks[0]
    given = {key: value for key, value in network.model_args.items() if key not in _NOT_PASSED}
    size = net.patch_embed.img_size
    args = {
        **given,
        "img_size": size[0] if size[0] == size[1] else size,
        "patch_size": net.patch_embed.patch_size[0],
        "embed_dim": net.embed_dim,
        "depth": len(net.blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.fc1.out_features / net.embed_dim,
        "num_classes": num_classes,
    }
    architecture = _BY_WIDTH.get(net.embed_dim, _OTHER)
    with quiet_libraries():
        made = timm.create_model(architecture, **args)
    _load(made, net, network.architecture)
    made.train(net.training)
    return Network(
        made, architecture=architecture, source="timm", input=network.input, model_args=args,
        classes=None if classes is None else tuple(classes), pretrained_tag=network.pretrained_tag,
    )  # fmt: skip


@torch.no_grad()
def _load(made: Any, net: Any, name: str) -> None:
    tensors = {key: value for key, value in net.state_dict().items() if not key.startswith("head.")}
    positions = tensors.pop("pos_embed")
    if net.no_embed_class:
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    own = ("head.", "head_dist.", "dist_token", "pos_embed")
    missing = [key for key in made.state_dict() if key not in tensors and not key.startswith(own)]
    unexpected = [key for key in tensors if key not in made.state_dict()]
    if missing or unexpected:
        text = f"'{name}' has parts that a network with a distillation token lacks: {', '.join(missing + unexpected)}"
        raise RequestError(Problem("--student", text, "Take a plain one such as vit_small_patch16_224."))
    made.load_state_dict(tensors, strict=False)
    made.pos_embed.copy_(
        torch.cat([positions[:, :_PLACE], torch.zeros_like(positions[:, :1]), positions[:, _PLACE:]], dim=1)
    )
    nn.init.trunc_normal_(made.dist_token, std=_TOKEN_STD)
    nn.init.trunc_normal_(made.head.weight, std=_HEAD_STD)
    nn.init.zeros_(made.head.bias)


def keep_without_position(net: VisionTransformerDistilled) -> None:
    """Keep the distillation token without a position while the table of positions trains."""

    def without(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, _PLACE] = 0.0
        return gradient

    if net.pos_embed.requires_grad:
        net.pos_embed.register_hook(without)
