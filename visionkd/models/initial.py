"""A fresh network that begins with the weights of a trained one: what follows a pre-training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from visionkd.config.schema import NetworkConfig
from visionkd.errors import Problem, RequestError
from visionkd.models.factory import create_network
from visionkd.models.masked import plain_problem
from visionkd.models.network import Network
from visionkd.models.segmentation.factory import size_of
from visionkd.types import TaskName

_NOT_ARGS = ("num_classes", "img_size")
_NORMS = ("norm.", "fc_norm.")  # where a network averages its patches, the last norm stands behind the average
_HEAD_STD = 2e-5


def network_from(
    init: str, config: NetworkConfig, *, classes: Sequence[str] | None, task: TaskName | None = None
) -> Network:
    """Build the network that ``config`` describes and load the weights of ``init``, all but the classifier.

    Args:
        init: MODEL with the weights.
        config: Its ``args`` win over those that the weights were trained with, such as ``drop_path_rate`` or
            ``global_pool``; a name equal to ``init`` takes the same architecture.
        classes: Names of the outputs; None gives it no classifier.
        task: What it is to serve: for pixels or boxes, a classifier's weights are those of the backbone alone.

    Raises:
        RequestError: If the weights are those of another network.
    """
    source = create_network(NetworkConfig(name=init), in_training=False)
    same = config.name == init
    if task in ("segmentation", "detection") and source.task == "classification":
        wanted = config if same else config.model_copy(update={"backbone": init})
        return create_network(wanted, classes=tuple(classes or ()), in_training=True, task=task)
    if config.img_size is not None and source.input.img_size != size_of(config):
        source = create_network(NetworkConfig(name=init, img_size=config.img_size), in_training=False)
    args = dict(config.args)
    size = config.img_size
    if same or config.name == source.architecture:
        args = {**{key: value for key, value in source.model_args.items() if key not in _NOT_ARGS}, **args}
        own_size = source.model_args.get("img_size")
        size = size or (own_size if isinstance(own_size, int) else None)
    name = source.architecture if same else config.name
    wanted = NetworkConfig(name=name, pretrained=False, img_size=size, args=args)
    network = create_network(
        wanted, num_classes=0 if classes is None else None, classes=None if classes is None else tuple(classes),
        in_training=True,
    )  # fmt: skip
    fresh = _load(network, source, init)
    network.input, network.trained, network.pretrained_tag = source.input, True, source.pretrained_tag
    if classes is not None and plain_problem(network.net) is None:
        nn.init.trunc_normal_(network.net.head.weight, std=_HEAD_STD)
    what = f"; new: {', '.join(fresh)}" if fresh else ""
    network.notes = (f"{network.architecture} begins with the weights of {init}{what}",)
    return network


@torch.no_grad()
def _load(network: Network, source: Network, init: str) -> list[str]:
    """Load what both have, and return the layers that stay new."""
    tensors, wanted = source.net.state_dict(), network.net.state_dict()
    classifiers = (f"{name}." for net in (source, network) for name in net.class_layers())
    loose = (*classifiers, *network.auxiliary, *_NORMS)
    missing = [name for name in wanted if name not in tensors and not name.startswith(loose)]
    unexpected = [name for name in tensors if name not in wanted and not name.startswith(loose)]
    heads = loose[: -len(_NORMS)]
    taken = {name: value for name, value in tensors.items() if name in wanted and not name.startswith(heads)}
    shapes = [name for name, value in taken.items() if value.shape != wanted[name].shape]
    if missing or unexpected or shapes:
        named = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        text = "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in named.items() if names)
        raise RequestError(
            Problem("--init", f"the weights of '{init}' are not those of '{network.architecture}' ({text})"),
            hint="Leave --model out to take the architecture of the weights.",
        )
    network.net.load_state_dict(taken, strict=False)
    new = sorted({name.rpartition(".")[0] for name in wanted if name not in taken})
    return new
