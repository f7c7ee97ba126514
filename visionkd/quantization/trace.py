"""From a network to its graph: torch.fx, with the layers of timm and torchvision that must stay whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from visionkd.errors import WorkError, first_line
from visionkd.models.modes import evaluating
from visionkd.models.network import Network

#: Where modules come from that may stay whole if they hold no product; they then keep their train and eval modes.
_LIBRARIES = (
    "torch.nn", "timm.layers", "torchvision.ops", "timm.models", "visionkd.models.cifar_resnet",
    "visionkd.models.segmentation",
)  # fmt: skip
_PRODUCTS = (nn.modules.conv._ConvNd, nn.Linear)
_SUM_PARTS = (nn.Sequential, nn.ModuleList)


class _Tracer(fx.Tracer):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._whole = tuple(get_notrace_modules())
        self._with_products = {
            name.rsplit(".", depth)[0] if depth else name
            for name, module in net.named_modules()
            if isinstance(module, _PRODUCTS)
            for depth in range(name.count(".") + 1)
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _PRODUCTS) or type(m) in self._whole:
            return True
        if isinstance(m, _SUM_PARTS):
            return False
        if module_qualified_name not in self._with_products and m.__module__.startswith(_LIBRARIES):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(network: Network, *, split_attention: bool = False) -> fx.GraphModule:
    """Return the graph of ``network.net``: the same parameters under the same names, and its own train and eval modes.

    Parameters that the forward pass has no use for are left out.

    Args:
        network: Any network in float.
        split_attention: Take attention apart into its two products and the softmax between them.

    Raises:
        WorkError: If the network decides from its data what it computes, as a detector of two stages does.
    """
    if network.task == "detection" and network.two_stage:
        raise network.no_plain_graph()
    net = copy.deepcopy(network.core())
    if split_attention:
        for module in net.modules():
            if getattr(module, "fused_attn", None) is True:
                module.fused_attn = False
    tracer = _Tracer(net)
    try:
        with evaluating(net):
            graph = tracer.trace(net)
        graph_module = fx.GraphModule(tracer.root, graph, class_name=type(net).__name__)
    except Exception as error:  # whatever a network's own code objects to when it is given a symbol for its images
        raise WorkError(
            f"'{network.architecture}' cannot be quantised: torch.fx cannot follow its forward pass"
            f" ({first_line(error)})",
            hint="Choose a student of another family, for example a ResNet, MobileNet, EfficientNet, ConvNeXt or ViT.",
        ) from error
    _revive_dropout(graph_module)
    graph_module.recompile()
    return graph_module.train(net.training)


def _revive_dropout(graph_module: fx.GraphModule) -> None:
    """Make modules of dropout functions, whose mode was fixed when the graph was drawn."""
    for number, node in enumerate(list(graph_module.graph.nodes)):
        if node.op == "call_function" and node.target in (nn.functional.dropout, nn.functional.dropout2d):
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            kind = nn.Dropout2d if node.target is nn.functional.dropout2d else nn.Dropout
            name = f"dropout_of_graph_{number}"
            graph_module.add_submodule(name, kind(p))
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)


def check_same(network: Network, graph_module: fx.GraphModule) -> None:
    """Compare a graph with the network that it was drawn from, on random images.

    Raises:
        WorkError: If they answer differently.
    """
    parameter = next(network.net.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, *network.input.img_size, generator=generator).to(parameter.device, parameter.dtype)
    with torch.no_grad(), evaluating(network), evaluating(graph_module):
        image = network.prepare(image)
        pairs = list(zip(_tensors(network.core()(image)), _tensors(graph_module(image)), strict=True))
    fine = [torch.allclose(own, given, rtol=1e-4, atol=1e-4 * float(own.abs().max())) for own, given in pairs]
    if not all(fine):
        raise WorkError(f"'{network.architecture}' cannot be quantised: its graph does not compute what it does")


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an answer in their order, however they are packed."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _tensors(each)
