from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visionkd.quantization.size import huffman_bits, level_counts, reduction_factor, size_mb


def test_counts_are_pooled_over_tensors():
    assert level_counts([torch.tensor([0, 2, 2]), torch.tensor([[1], [0]]), torch.tensor([4])]) == [2, 1, 2, 0, 1]
    assert level_counts([]) == []


def test_huffman_codes_of_known_lengths():
    assert huffman_bits([1, 1, 1, 1]) == 2.0
    assert huffman_bits([4, 2, 1, 1]) == pytest.approx((4 * 1 + 2 * 2 + 2 * 3) / 8)
    assert huffman_bits([0, 7, 0]) == 0.0 and huffman_bits([]) == 0.0


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=64).filter(lambda counts: sum(c > 0 for c in counts) > 1))
def test_a_huffman_code_is_within_a_bit_of_the_entropy(counts):
    share = torch.tensor([count for count in counts if count], dtype=torch.float64)
    share /= share.sum()
    entropy = float(-(share * share.log2()).sum())
    assert entropy - 1e-9 <= huffman_bits(counts) < entropy + 1


def test_sizes_are_the_papers():
    assert reduction_factor(4.0) == 8.0
    assert reduction_factor(4.0, 256) == pytest.approx(256 * 32 / (256 * 4 + 64))
    plain = 4 * 1000
    assert size_mb(num_quantized=0, num_plain=1000, mean_bits=0.0) == plain / 1e6
    found = size_mb(num_quantized=2560, num_plain=1000, mean_bits=1.5, bucket_size=256)
    assert found == pytest.approx((plain + 2560 * 1.5 / 8 + 10 * 8) / 1e6)
    assert size_mb(num_quantized=2560, num_plain=0, mean_bits=2.0) == pytest.approx(640 / 1e6)
