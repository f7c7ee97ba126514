"""Put quantisers into a network, and take them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from visionkd.errors import WorkError
from visionkd.models.network import Network
from visionkd.quantization.fake_quant import ActivationQuantizer, Mode, WeightQuantizer
from visionkd.quantization.placement import place
from visionkd.quantization.products import QUANTIZED, float_twin, quantized_twin
from visionkd.quantization.scheme import Int8Scheme
from visionkd.quantization.trace import check_same, trace

__all__ = [
    "Int8Scheme",
    "activation_quantizers",
    "float_layers",
    "float_network",
    "freeze",
    "int8_layers",
    "leave_float",
    "quantize_network",
    "set_mode",
    "unfreeze",
]

_FOLDER = "quantizers"


def quantize_network(network: Network, *, scheme: Int8Scheme) -> Network:
    """Return a copy of ``network`` whose graph has the quantisers of ``scheme``, switched on but not calibrated.

    ``net`` of the copy is a ``torch.fx.GraphModule``: parameters keep their names, scales join them
    (``quantizers.<name>.scale`` and ``<layer>.weight_quantizer.scale``). A network that is quantised already is
    quantised anew; scales that both have are kept.

    Raises:
        WorkError: If the network cannot be traced, or nothing in it can be quantised.
    """
    if network.quantization is not None and network.quantization.get("kind") != "int8":
        raise WorkError(
            f"'{network.architecture}' is stored with few bits already ({network.quantization.get('kind')})",
            hint="Start from its float model.",
        )
    plain = float_network(network)
    if scheme.attention == "int8" and isinstance(plain.net, fx.GraphModule):
        raise WorkError("attention cannot be taken apart once it is quantised: start from the float model")
    heads = network.heads or network.class_layers()
    graph_module = plain.net
    if not isinstance(graph_module, fx.GraphModule):
        graph_module = trace(plain, split_attention=scheme.attention == "int8")
        check_same(plain, graph_module)
    placement = place(graph_module, scheme, precise=network.precise)
    if not placement.products:
        raise WorkError(
            f"'{network.architecture}' has no layer to quantise"
            + (f": {next(iter(placement.left_float.values()))}" if placement.left_float else "")
        )
    for name in placement.products:
        graph_module.set_submodule(name, quantized_twin(graph_module.get_submodule(name)))
    folder, device = nn.Module(), next(graph_module.parameters()).device
    graph_module.add_module(_FOLDER, folder)
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    made: dict[tuple[str, fx.Node], fx.Node] = {}
    # right before the first user, as an activation may work in place between the tensor and that user
    for (user, tensor), name in sorted(placement.inputs.items(), key=lambda item: order[item[0][0]]):
        if not hasattr(folder, name):
            folder.add_module(name, ActivationQuantizer(learned=scheme.learned_scales).to(device))
        if (name, tensor) not in made:
            with graph_module.graph.inserting_before(user):
                made[name, tensor] = graph_module.graph.call_module(f"{_FOLDER}.{name}", (tensor,))
        user.replace_input_with(tensor, made[name, tensor])
    graph_module.graph.lint()
    graph_module.recompile()
    plain.take_graph(graph_module.train(network.net.training))
    plain.heads = heads
    plain.quantization = {"kind": "int8", "scheme": scheme.to_dict()}
    set_mode(plain, "quantize")
    if network.quantization is not None:
        _take_scales(network, plain)
    return plain


def float_network(network: Network) -> Network:
    """Return a copy of a network without its quantisers; of a network in float, a plain copy."""
    plain = copy.deepcopy(network)
    if network.quantization is None:
        return plain
    graph_module = plain.net
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(f"{_FOLDER}."):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    delattr(graph_module, _FOLDER)
    for name, module in int8_layers(plain).items():
        graph_module.set_submodule(name, float_twin(module))
    graph_module.recompile()
    plain.quantization = None
    return plain


def leave_float(network: Network, names: Sequence[str]) -> Network:
    """Return a copy of a quantised network in which the layers ``names`` are in float too; other scales stay."""
    scheme = Int8Scheme.from_dict(network.quantization["scheme"])
    return quantize_network(network, scheme=replace(scheme, skip=tuple(dict.fromkeys((*scheme.skip, *names)))))


def int8_layers(network: Network) -> dict[str, nn.Module]:
    """Return the layers with quantised weights by their names in the network, in the order of the modules."""
    return {name: module for name, module in network.net.named_modules() if isinstance(module, QUANTIZED)}


def float_layers(network: Network) -> dict[str, str]:
    """Return the products of a quantised network that stay in float, by name, with the reason."""
    scheme = Int8Scheme.from_dict(network.quantization["scheme"])
    return place(float_network(network).net, scheme, precise=network.precise).left_float


def activation_quantizers(network: Network) -> dict[str, ActivationQuantizer]:
    """Return the quantisers of activations by name."""
    folder = getattr(network.net, _FOLDER, None)
    return dict(folder.named_children()) if folder is not None else {}


def set_mode(network: Network, mode: Mode) -> None:
    """Set what the quantisers do: ``off`` (float), ``observe`` (float, and show values to observers), ``quantize``."""
    for quantizer in activation_quantizers(network).values():
        quantizer.mode = mode
    for quantizer in _weight_quantizers(network):
        quantizer.enabled = mode == "quantize"


@torch.no_grad()
def freeze(network: Network) -> None:
    """Fix the scales of the weights, from the weights as they are unless they are fixed already, and clip to them."""
    for layer in int8_layers(network).values():
        quantizer = layer.weight_quantizer
        if not quantizer.frozen:
            quantizer.update(layer.weight)
            quantizer.frozen = True
        bound = (quantizer.scale * 127.0).reshape([-1 if d == quantizer.axis else 1 for d in range(layer.weight.ndim)])
        layer.weight.clamp_(-bound, bound)


def unfreeze(network: Network) -> None:
    """Let the scales of the weights follow the weights."""
    for quantizer in _weight_quantizers(network):
        quantizer.frozen = False


def _weight_quantizers(network: Network) -> Iterator[WeightQuantizer]:
    return (layer.weight_quantizer for layer in int8_layers(network).values())


@torch.no_grad()
def _take_scales(source: Network, target: Network) -> None:
    """Give a network the scales that another has for the same tensors and weights."""
    known = _by_tensor(source)
    for tensor, quantizer in _by_tensor(target).items():
        if tensor in known:
            quantizer.scale.copy_(known[tensor].scale)
    layers = int8_layers(source)
    for name, layer in int8_layers(target).items():
        if name in layers:
            layer.weight_quantizer.scale.copy_(layers[name].weight_quantizer.scale)
            layer.weight_quantizer.frozen = layers[name].weight_quantizer.frozen


def _by_tensor(network: Network) -> dict[str, ActivationQuantizer]:
    """Return the quantisers of activations by the node of the graph that they round."""
    quantizers = activation_quantizers(network)
    return {
        str(node.args[0]): quantizers[str(node.target).removeprefix(f"{_FOLDER}.")]
        for node in network.net.graph.nodes
        if node.op == "call_module" and str(node.target).startswith(f"{_FOLDER}.")
    }
