"""Where quantisers go on the graph of a network.

Both inputs of each product; the skip input of a residual add, whose other input comes straight from its convolution;
nothing between a convolution and its norm, activation or add. One scale serves a tensor wherever it is used, also past
operators that only move values, and the inputs of a concatenation share one with its output. So do the two sides of a
resize: it mixes neighbours and leaves the range as it is, and is rounded in front as well, so that its input is stored
as bytes. A tensor that is rounded for a product is rounded for the mean over it too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

import timm.layers
import torch
from torch import fx, nn
from torch.nn import functional as F

from visionkd.models.segmentation.blocks import GridMean
from visionkd.quantization.products import quantizable
from visionkd.quantization.scheme import Int8Scheme

_ADDS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
_CATS = (torch.cat, torch.concat)
_MATMULS = (operator.matmul, torch.matmul, torch.bmm)
_MOVES = (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, F.max_pool2d, F.dropout)
_MOVE_METHODS = ("view", "reshape", "permute", "transpose", "contiguous", "flatten", "chunk", "clone")
_MOVE_MODULES = (nn.Identity, nn.Flatten, nn.MaxPool2d, nn.Dropout, nn.Dropout2d)
_MEANS = (torch.mean, F.adaptive_avg_pool2d)
_MEAN_MODULES = (nn.AdaptiveAvgPool2d, timm.layers.SelectAdaptivePool2d, GridMean)
_RESIZES = (F.interpolate, F.upsample)
_CONVEX = ("nearest", "nearest-exact", "linear", "bilinear", "area")  # nothing leaves the range of what it mixes
_MULTIPLIES = (operator.mul, operator.imul, torch.mul)
_PRODUCTS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass
class Placement:
    """What to insert.

    Attributes:
        products: Names of the layers whose weights are quantised.
        inputs: For each use of a tensor that is quantised, user and tensor, the name of its quantiser.
        left_float: Products that have no quantised twin or were to be skipped, with the reason.
    """

    products: list[str] = field(default_factory=list)
    inputs: dict[tuple[fx.Node, fx.Node], str] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)


def place(graph_module: fx.GraphModule, scheme: Int8Scheme, *, precise: tuple[str, ...] = ()) -> Placement:
    """Decide where the quantisers of a scheme go.

    Args:
        graph_module: The graph of a network.
        scheme: What is asked for.
        precise: Patterns of the names of layers that stay in float whatever is asked for.
    """
    return _Placer(graph_module, scheme, precise).run()


class _Placer:
    def __init__(self, graph_module: fx.GraphModule, scheme: Int8Scheme, precise: tuple[str, ...]) -> None:
        self.scheme, self.precise = scheme, precise
        self.nodes = list(graph_module.graph.nodes)
        self.order = {node: number for number, node in enumerate(self.nodes)}
        self.modules = dict(graph_module.named_modules())
        self._root_module = graph_module
        self._parents: dict[fx.Node, fx.Node] = {}

    def run(self) -> Placement:
        placement = Placement()
        uses: list[tuple[fx.Node, fx.Node, str]] = []  # user, tensor, name
        for node in self.nodes:
            module = self.module(node)
            if module is not None and isinstance(module, _PRODUCTS):
                if reason := self._stays_float(node, module):
                    placement.left_float[str(node.target)] = reason
                    continue
                if node.target not in placement.products:
                    placement.products.append(str(node.target))
                uses.append((node, node.args[0], _key(str(node.target))))
            elif module is not None:  # a layer that cannot be traced, and what it holds
                for name, inner in module.named_modules():
                    if isinstance(inner, _PRODUCTS):
                        placement.left_float[f"{node.target}.{name}"] = f"inside of a {type(module).__name__}"
            elif node.op == "get_attr" and str(node.target).endswith("weight") and self.attribute(node).ndim > 1:
                placement.left_float[str(node.target).rpartition(".")[0]] = "its weight is used outside of a layer"
            elif self._is_function(node, _MATMULS, ("matmul", "bmm")) and self.scheme.attention == "int8":
                uses += [
                    (node, tensor, f"{node.name}_{side}")
                    for tensor, side in zip(node.args[:2], ("left", "right"), strict=True)
                ]
        # a layer that is called in two places, one of which is to stay in float, stays in float
        placement.products = [name for name in placement.products if name not in placement.left_float]
        uses = [use for use in uses if str(use[0].target) not in placement.left_float]
        quantized = set(placement.products)
        for node in self.nodes:
            if (found := self._residual(node, quantized)) is not None:
                skip, long = found
                uses.append((node, skip, f"{_key(long)}_skip"))
        self._share(uses, placement)
        return placement

    # Products ---------------------------------------------------------------------------------------------------------

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def attribute(self, node: fx.Node) -> torch.Tensor:
        """Return the tensor of a ``get_attr`` node."""
        path, _, name = str(node.target).rpartition(".")
        return getattr(self._root_module.get_submodule(path), name)

    def _stays_float(self, node: fx.Node, module: nn.Module) -> str:
        name = str(node.target)
        if any(fnmatchcase(name, pattern) for pattern in self.scheme.skip):
            return "skipped"
        if any(fnmatchcase(name, pattern) for pattern in self.precise):
            return "gives sides of boxes"
        if not quantizable(module):
            return f"a {type(module).__name__} has no quantised form"
        if self.scheme.gates == "float" and isinstance(module, nn.Conv2d) and self._after_mean(node):
            return self._spread(node)
        return ""

    def _after_mean(self, node: fx.Node) -> bool:
        """Whether nothing but convolutions and element-wise layers lies between a spatial mean and ``node``."""
        while node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            module = self.module(node)
            if self._is_mean(node):
                return True
            if module is None or (isinstance(module, _CONVOLUTIONS) and max(module.kernel_size) > 1):
                return False
        return False

    def _is_mean(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return isinstance(module, _MEAN_MODULES)
        return self._is_function(node, _MEANS, ("mean",))

    def _spread(self, node: fx.Node) -> str:
        """Say how the result of a convolution on pooled maps is spread over the image again; nothing if it is not.

        Squeeze-and-excitation multiplies channels with it, pooling branches of segmentation heads resize it; between
        are 1 x 1 convolutions and element-wise layers.
        """
        while len(users := self._readers(node)) == 1:
            (node,) = users
            if self._is_function(node, _MULTIPLIES, ("mul", "mul_")):
                return "part of a gate"
            if self._is_resize(node):
                return "part of a pooling branch"
            if node.op == "output" or isinstance(self.module(node), nn.Linear):
                return ""
        return ""

    # Residual adds ----------------------------------------------------------------------------------------------------

    def _residual(self, node: fx.Node, quantized: set[str]) -> tuple[fx.Node, str] | None:
        """Return the skip input of a residual add, and the name of the last layer of its other branch."""
        operands = [value for value in node.args[:2] if isinstance(value, fx.Node)]
        if not self._is_function(node, _ADDS, _ADD_METHODS) or len(set(operands)) != 2:
            return None
        ends = [self._last_product(operand, quantized) for operand in operands]
        if not any(ends):
            return None
        resized = [self._is_resized(operand) for operand in operands]
        if any(resized):  # a coarser map comes from far, and it is the other one that enters from its convolution
            branch = resized.index(False) if False in resized else 0
            return (operands[1 - branch], ends[branch]) if ends[branch] else None
        distances = self._distances(*operands)
        if distances is None:  # no common ancestor: a constant, such as positions
            return None
        # the longer way from where they part is the branch, which enters straight from its convolution
        branch = 0 if distances[0] > distances[1] or (distances[0] == distances[1] and ends[0]) else 1
        return (operands[1 - branch], ends[branch]) if ends[branch] else None

    def _last_product(self, node: fx.Node, quantized: set[str]) -> str:
        """Return the quantised product that ``node`` comes from through norms, activations and scalings; or nothing."""
        kinds: tuple[type[nn.Module], ...] = _CONVOLUTIONS
        if self.scheme.residual == "all":
            kinds = (*kinds, nn.Linear)
        while True:
            module = self.module(node)
            if isinstance(module, _PRODUCTS):
                return str(node.target) if isinstance(module, kinds) and node.target in quantized else ""
            followed = module is not None or self._is_function(node, (*_MULTIPLIES, *_MOVES), ("mul", *_MOVE_METHODS))
            if not followed or not node.args or not isinstance(node.args[0], fx.Node):
                return ""
            node = node.args[0]

    def _distances(self, *operands: fx.Node) -> tuple[int, int] | None:
        """Return the lengths of the longest ways from the last common ancestor to two nodes; None without one."""
        ancestors = [self._ancestors(operand) for operand in operands]
        common = ancestors[0] & ancestors[1] & self._from_image
        if not common:
            return None
        start = max(common, key=self.order.__getitem__)
        return self._longest(start, operands[0]), self._longest(start, operands[1])

    @cached_property
    def _from_image(self) -> set[fx.Node]:
        """The nodes that depend on the images."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(parent in found for parent in self._inputs(node)):
                found.add(node)
        return found

    def _ancestors(self, node: fx.Node) -> set[fx.Node]:
        seen, pending = set(), [node]
        while pending:
            current = pending.pop()
            if current not in seen:
                seen.add(current)
                pending += self._inputs(current)
        return seen

    def _longest(self, start: fx.Node, end: fx.Node) -> int:
        length = {start: 0}
        for node in self.nodes[self.order[start] + 1 : self.order[end] + 1]:
            ways = [length[parent] for parent in self._inputs(node) if parent in length]
            if ways:
                length[node] = max(ways) + 1
        return length[end]

    # Sharing ----------------------------------------------------------------------------------------------------------

    def _share(self, uses: list[tuple[fx.Node, fx.Node, str]], placement: Placement) -> None:
        """Name one quantiser for all uses of a tensor, and put it on the inputs of the concatenations it comes from."""
        uses = sorted(uses, key=lambda use: self.order[use[0]])
        names: dict[fx.Node, str] = {}  # of the first user, by what has one scale
        pending = list(uses)
        joined: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        resizes: list[tuple[fx.Node, fx.Node]] = []
        seen: set[fx.Node] = set()
        while pending:
            _, tensor, name = pending.pop(0)
            resizes += [(node, node.args[0]) for node in self._resizes_behind(tensor)]
            root = self._root(tensor)
            if root not in seen:
                seen.add(root)
                for part in self._parts(root):
                    self._union(root, self._root(part))
                    joined.append((root, part, root))
                    pending.append((root, part, name))
        for _, tensor, name in uses:
            names.setdefault(self._find(self._root(tensor)), name)
        for user, tensor, _ in uses:
            placement.inputs[user, tensor] = names[self._find(self._root(tensor))]
        for user, part, root in joined:
            placement.inputs[user, part] = names[self._find(root)]
        means = [(node, node.args[0]) for node in self.nodes if self._is_mean(node)]
        for user, tensor in (*resizes, *means):
            if (root := self._find(self._root(tensor))) in names:
                placement.inputs[user, tensor] = names[root]

    def _parts(self, root: fx.Node) -> Iterator[fx.Node]:
        """Yield the inputs of a concatenation."""
        if self._is_function(root, _CATS, ()):
            parts = root.args[0] if root.args else root.kwargs.get("tensors")
            for part in parts if isinstance(parts, (list, tuple)) else ():
                if isinstance(part, fx.Node) and part in self._from_image:
                    yield part

    def _root(self, node: fx.Node) -> fx.Node:
        """Return the node that made the values of ``node``, which others have only moved or resized since."""
        while (before := self._moved(node)) is not None:
            node = before
        return node

    def _moved(self, node: fx.Node) -> fx.Node | None:
        """Return what ``node`` only moves or resizes; None if it does more."""
        module = self.module(node)
        moved = isinstance(module, _MOVE_MODULES) if module is not None else self._is_move(node)
        if not (moved or self._is_resize(node)) or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        return node.args[0]

    def _resizes_behind(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the resizes between ``node`` and the node that made its values."""
        while (before := self._moved(node)) is not None:
            if self._is_resize(node):
                yield node
            node = before

    def _is_resized(self, node: fx.Node) -> bool:
        return any(True for _ in self._resizes_behind(node))

    def _is_resize(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return isinstance(module, nn.Upsample) and module.mode in _CONVEX
        if not self._is_function(node, _RESIZES, ()):
            return False
        return (node.args[3] if len(node.args) > 3 else node.kwargs.get("mode", "nearest")) in _CONVEX

    def _is_move(self, node: fx.Node) -> bool:
        if node.op == "call_function" and node.target is operator.getitem:
            source = node.args[0]
            return isinstance(source, fx.Node) and self._is_function(source, (torch.chunk,), ("chunk",))
        return self._is_function(node, _MOVES, _MOVE_METHODS)

    def _find(self, node: fx.Node) -> fx.Node:
        while node in self._parents:
            node = self._parents[node]
        return node

    def _union(self, one: fx.Node, other: fx.Node) -> None:
        one, other = self._find(one), self._find(other)
        if one is not other:
            self._parents[other] = one

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that ``node`` computes with, rather than the shapes of others."""
        return [parent for parent in node.all_input_nodes if not self._is_shape(parent)]

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the users of ``node`` that compute with it, rather than with its shape."""
        return [user for user in node.users if not self._is_shape(user)]

    def _is_shape(self, node: fx.Node) -> bool:
        """Whether ``node`` is a shape or another property of a tensor, or is computed from such alone."""
        if node.op == "call_method" and node.target == "size" or node.target is getattr:
            return True
        parents = node.all_input_nodes if node.op == "call_function" else []
        return bool(parents) and all(map(self._is_shape, parents))

    @staticmethod
    def _is_function(node: fx.Node, functions: tuple, methods: tuple[str, ...]) -> bool:
        if node.op == "call_function":
            return node.target in functions
        return node.op == "call_method" and node.target in methods


def _key(name: str) -> str:
    return name.replace(".", "_")
