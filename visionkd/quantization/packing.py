"""Weights of few levels, stored with few bits: the spec ``packed`` of a package.

A quantised tensor NAME lies in ``model.safetensors`` as ``NAME:levels`` (its level numbers, bits packed into bytes),
``NAME:alpha`` and ``NAME:beta`` (range and smallest value of each bucket, float32) and, where its levels were learned,
``NAME:points``. Everything else lies there as it is. A network that was loaded holds plain float tensors again, equal
to the bit, so that whatever takes a network runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionkd.errors import DataError
from visionkd.models.network import Network
from visionkd.quantization.differentiable import nearest, quantile_points
from visionkd.quantization.quantized_distillation import Buckets, bucket_width, from_levels, scale, uniform_levels
from visionkd.quantization.size import huffman_bits, level_counts, reduction_factor, size_mb

_PARTS = ("levels", "alpha", "beta", "points")


@dataclass(frozen=True)
class Levels:
    """A tensor by the numbers of its levels.

    Attributes:
        numbers: Integers from 0, N.
        num_levels: How many there may be.
        alpha: Range of each bucket, B.
        beta: Smallest value of each bucket, B.
        points: Where the levels lie in a bucket's range, scaled to [0, 1]; None for equal distances.
        shape: Of the tensor.
        width: Values in a bucket.
    """

    numbers: Tensor
    num_levels: int
    alpha: Tensor
    beta: Tensor
    points: Tensor | None
    shape: torch.Size
    width: int

    def tensor(self) -> Tensor:
        """Return the quantised tensor in float32."""
        alpha, beta = self.alpha.view(-1, 1), self.beta.view(-1, 1)
        buckets = Buckets(alpha.new_empty(len(alpha), self.width), alpha, beta, self.shape)
        numbers = buckets.bucketed(self.numbers)
        if self.points is not None:
            return buckets.unscaled(self.points[numbers.long()])
        return from_levels(numbers.to(alpha.dtype), self.num_levels, buckets)


def bits_of(num_levels: int) -> int:
    """Return the bits that one level number takes."""
    return max(1, (num_levels - 1).bit_length())


def to_levels(
    weight: Tensor, *, num_levels: int, bucket_size: int | None = None, points: Tensor | None = None
) -> Levels:
    """Quantise a tensor.

    Args:
        weight: Any shape.
        num_levels: Number of equally distant levels; that of ``points`` where they are given.
        bucket_size: Values in a bucket; None takes the whole tensor as one.
        points: Sorted, in the scale of [0, 1].
    """
    weight = weight.detach().float()
    buckets = scale(weight, bucket_size)
    if points is None:
        numbers = uniform_levels(buckets, num_levels)
    else:
        points, num_levels = points.detach().float(), len(points)
        numbers = nearest(buckets.values, points)
    numbers = buckets.plain(numbers).flatten().to(torch.int32)
    alpha, beta = buckets.alpha.flatten(), buckets.beta.flatten()
    return Levels(numbers, num_levels, alpha, beta, points, weight.shape, buckets.values.shape[1])


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Pack N integers of ``bits`` bits into ceil(N * bits / 8) bytes; the highest bit of each comes first."""
    values = numbers.cpu().numpy().astype(np.uint32)
    planes = (values[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint32)) & 1
    return torch.from_numpy(np.packbits(planes.astype(np.uint8)))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` integers that :func:`pack_bits` packed.

    Raises:
        ValueError: If there are too few bytes, or too many.
    """
    if packed.dtype != torch.uint8 or packed.numel() != -(-count * bits // 8):
        raise ValueError(f"{packed.numel()} bytes do not hold {count} numbers of {bits} bits")
    planes = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy((planes.astype(np.int32) << np.arange(bits - 1, -1, -1, dtype=np.int32)).sum(1)).int()


# Networks -------------------------------------------------------------------------------------------------------------


def quantizable_names(network: Network, *, first_last: bool = True, batch_norm: bool = False) -> tuple[str, ...]:
    """Return the names of the parameters of ``network.net`` that are to be quantised, in the network's order.

    Args:
        network: Any network.
        first_last: Include the first product and the classifier, with their biases.
        batch_norm: Include scales and shifts of normalisation layers.
    """
    left_out: set[str] = set()
    modules = dict(network.net.named_modules())
    if not batch_norm:
        left_out |= {name for name, module in modules.items() if "norm" in type(module).__name__.lower()}
    if not first_last:
        products = [
            name for name, module in modules.items() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        ]
        left_out |= {*products[:1], *network.class_layers()}
    return tuple(
        name
        for name, parameter in network.net.named_parameters()
        if name.rpartition(".")[0] not in left_out and parameter.is_floating_point()
    )


def quantized_copy(
    network: Network,
    names: Iterable[str],
    *,
    bits: int,
    bucket_size: int | None = None,
    points: Mapping[str, Tensor] | None = None,
) -> Network:
    """Return a copy of a float network, in eval mode, whose named parameters take few levels.

    Args:
        network: Left as it is.
        names: Parameters of ``network.net`` to quantise.
        bits: 2 ** bits levels at equal distances, where ``points`` does not say otherwise.
        bucket_size: Values in a bucket; None takes each tensor as one.
        points: Learned levels of the named parameters.
    """
    copied = copy.deepcopy(network).requires_grad_(False).eval()
    coded = {
        name: to_levels(
            copied.net.get_parameter(name), num_levels=2**bits, bucket_size=bucket_size,
            points=None if points is None else points[name],
        )
        for name in names
    }  # fmt: skip
    for name, levels in coded.items():
        copied.net.get_parameter(name).data.copy_(levels.tensor())
    plain = sum(p.numel() for name, p in copied.net.named_parameters() if name not in coded)
    copied.quantization, copied.packed = _spec(coded, bits, bucket_size, plain), _tensors(copied, coded)
    return copied


def post_training_copy(
    network: Network,
    *,
    bits: int,
    bucket_size: int | None = 256,
    scheme: str = "uniform",
    first_last: bool = True,
    batch_norm: bool = False,
) -> Network:
    """Return a copy of a trained network that is quantised without any training.

    Args:
        network: Left as it is.
        bits: 2 ** bits levels.
        bucket_size: Values in a bucket; None takes each tensor as one.
        scheme: ``uniform``, or ``quantiles`` for levels at the quantiles of each tensor.
        first_last: As in :func:`quantizable_names`.
        batch_norm: As in :func:`quantizable_names`.
    """
    names, points = quantizable_names(network, first_last=first_last, batch_norm=batch_norm), None
    if scheme == "quantiles":
        weights = {name: network.net.get_parameter(name) for name in names}
        points = {name: quantile_points(w, 2**bits, bucket_size=bucket_size) for name, w in weights.items()}
    return quantized_copy(network, names, bits=bits, bucket_size=bucket_size, points=points)


def _spec(coded: Mapping[str, Levels], bits: int, bucket_size: int | None, num_plain: int) -> dict[str, Any]:
    mean_bits = huffman_bits(level_counts(levels.numbers for levels in coded.values()))
    count = sum(levels.shape.numel() for levels in coded.values())
    megabytes = size_mb(num_quantized=count, num_plain=num_plain, mean_bits=mean_bits, bucket_size=bucket_size)
    return {
        "kind": "packed",
        "bits": bits,
        "bucket_size": bucket_size,
        "levels": "points" if any(levels.points is not None for levels in coded.values()) else "uniform",
        "tensors": {
            name: {"shape": list(levels.shape), "num_levels": levels.num_levels} for name, levels in coded.items()
        },
        "huffman": {
            "mean_bits": mean_bits,
            "size_mb": megabytes,
            "float_mb": 4e-6 * (count + num_plain),
            "reduction_factor": reduction_factor(mean_bits, bucket_size) if mean_bits else None,
        },
    }


def _tensors(network: Network, coded: Mapping[str, Levels]) -> dict[str, Tensor]:
    tensors = {name: value for name, value in network.net.state_dict().items() if name not in coded}
    for name, levels in coded.items():
        parts = (pack_bits(levels.numbers, bits_of(levels.num_levels)), levels.alpha, levels.beta, levels.points)
        tensors |= {f"{name}:{kind}": part for kind, part in zip(_PARTS, parts, strict=True) if part is not None}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _decoded(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain state dict that packed tensors stand for."""
    state = {name: tensor for name, tensor in tensors.items() if ":" not in name}
    for name, entry in spec["tensors"].items():
        shape = torch.Size(entry["shape"])
        found = {kind: tensors.get(f"{name}:{kind}") for kind in _PARTS}
        num_levels = int(entry["num_levels"])
        numbers = unpack_bits(found["levels"], bits_of(num_levels), shape.numel())
        width = bucket_width(shape.numel(), spec["bucket_size"])
        coded = Levels(numbers, num_levels, found["alpha"], found["beta"], found["points"], shape, width)
        state[name] = coded.tensor()
    return state


def restore(network: Network, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Network:
    """Return ``network`` with the weights of a packed model; see :func:`visionkd.quantization.restore.restore`.

    Raises:
        DataError: If the tensors do not fit the network or the spec.
    """
    try:
        network.net.load_state_dict(_decoded(spec, tensors))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"The packed weights do not fit '{network.architecture}': {str(error).splitlines()[0]}",
            hint="The package is damaged or was made by another version of timm or torchvision; make it again.",
        ) from error
    network.quantization, network.packed = dict(spec), dict(tensors)
    return network


def stored(network: Network) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return spec and tensors that a package of ``network`` is to hold.

    Weights that were trained or replaced since they were packed do not keep to their levels: they are stored as plain
    floats, without a spec.
    """
    state = network.net.state_dict()
    if network.packed is not None and network.quantization is not None:
        decoded = _decoded(network.quantization, network.packed)
        if decoded.keys() == state.keys() and all(torch.equal(decoded[name], v.cpu()) for name, v in state.items()):
            return network.quantization, dict(network.packed)
    return None, state
