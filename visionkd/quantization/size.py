"""How large a model with quantised weights is, as the paper counts: Huffman codes, and two numbers for each bucket.

One Huffman code is built for all quantised tensors together, from the histogram of their level numbers. Neither its
table nor the positions of learned points nor the buffers of batch norms are counted.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv 1802.05668.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_FLOAT_BITS = 32
_BUCKET_BITS = 64  # alpha and beta


def level_counts(levels: Iterable[Tensor]) -> list[int]:
    """Return how often each level number occurs in all tensors together; they hold integers from 0."""
    total = torch.zeros(0, dtype=torch.int64)
    for tensor in levels:
        counts = torch.bincount(tensor.flatten().to(torch.int64).cpu(), minlength=len(total))
        counts[: len(total)] += total
        total = counts
    return total.tolist()


def huffman_bits(counts: Sequence[int]) -> float:
    """Return the mean length of a symbol's Huffman code in bits; 0 where there is a single symbol, which needs none.

    Args:
        counts: How often each symbol occurs.
    """
    heap = [count for count in counts if count]
    total = sum(heap)
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:  # each merge lengthens by one bit the codes of all symbols below it
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits / total if total else 0.0


def reduction_factor(mean_bits: float, bucket_size: int | None = None) -> float:
    """Return how many times smaller quantised weights are than in float32.

    Args:
        mean_bits: Mean length of a weight's code, in bits.
        bucket_size: k; None leaves the buckets' own numbers out, as the authors do for whole tensors.
    """
    if bucket_size is None:
        return _FLOAT_BITS / mean_bits
    return bucket_size * _FLOAT_BITS / (bucket_size * mean_bits + _BUCKET_BITS)


def size_mb(*, num_quantized: int, num_plain: int, mean_bits: float, bucket_size: int | None = None) -> float:
    """Return the size of a model's parameters in 10^6 bytes.

    Args:
        num_quantized: Number of quantised weights.
        num_plain: Number of the others, in float32.
        mean_bits: Mean length of a quantised weight's code, in bits.
        bucket_size: k; None leaves the buckets' own numbers out.
    """
    buckets = 0.0 if bucket_size is None else num_quantized * _BUCKET_BITS / bucket_size
    return (num_plain * _FLOAT_BITS + num_quantized * mean_bits + buckets) / 8e6
