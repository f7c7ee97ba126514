"""Weights of few levels keep to them, are stored in few bits, and come back equal to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.contract import tiny_network
from visionkd.benchmark.complexity import measure_complexity
from visionkd.errors import DataError
from visionkd.hub.package import load_package, save_package
from visionkd.quantization.differentiable import quantile_points, quantize_to_points
from visionkd.quantization.packing import (
    pack_bits,
    post_training_copy,
    quantizable_names,
    restore,
    to_levels,
    unpack_bits,
)
from visionkd.quantization.quantized_distillation import quantize_uniform
from visionkd.quantization.size import size_mb


def save(network, path):
    return save_package(network, path, task="classification", classes=None, metrics={}, origin={})


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 70), st.integers(0, 10**6))
def test_bits_come_back(bits, count, seed):
    numbers = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(numbers, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count).long(), numbers)


@pytest.mark.parametrize("size", [None, 8, 1000])
def test_levels_stand_for_what_training_sees_to_the_bit(size):
    weight = torch.randn(5, 3, 3, 3)
    assert torch.equal(
        to_levels(weight, num_levels=4, bucket_size=size).tensor(),
        quantize_uniform(weight, num_levels=4, bucket_size=size),
    )
    points = quantile_points(weight, 7, bucket_size=size)
    coded = to_levels(weight, num_levels=0, bucket_size=size, points=points)
    assert coded.num_levels == 7
    assert torch.equal(coded.tensor(), quantize_to_points(weight, points, bucket_size=size))


@pytest.mark.parametrize("scheme", ["uniform", "quantiles"])
@pytest.mark.parametrize(("bits", "size"), [(2, 256), (3, 100), (8, None)])
def test_a_package_holds_packed_weights_and_gives_the_network_back(tmp_path, bits, size, scheme):
    network = tiny_network(seed=0)
    quantized = post_training_copy(network, bits=bits, bucket_size=size, scheme=scheme)
    image = torch.rand(2, 3, 32, 32)
    loaded, card = load_package(save(quantized, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded(image).logits, quantized(image).logits)
        assert not torch.equal(loaded(image).logits, network.eval()(image).logits)
    for name in card["quantization"]["tensors"]:
        assert size is not None or len(loaded.net.get_parameter(name).unique()) <= 2**bits
    plain = (save(network, tmp_path / "plain") / "model.safetensors").stat().st_size
    packed = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert packed < plain * (bits / 32 + 0.15)
    assert measure_complexity(loaded).size_mb < measure_complexity(network).size_mb * (bits / 32 + 0.1)
    assert measure_complexity(loaded).macs_g == measure_complexity(network).macs_g


def test_the_card_counts_sizes_as_the_paper_does(tmp_path):
    quantized = post_training_copy(tiny_network(seed=0), bits=4, bucket_size=64)
    card = json.loads((save(quantized, tmp_path / "model") / "model.json").read_text())
    spec = card["quantization"]
    count = sum(torch.Size(entry["shape"]).numel() for entry in spec["tensors"].values())
    plain = sum(p.numel() for p in quantized.net.parameters()) - count
    mean_bits = spec["huffman"]["mean_bits"]
    assert 1.0 < mean_bits < 4.0
    assert spec["huffman"]["size_mb"] == size_mb(
        num_quantized=count, num_plain=plain, mean_bits=mean_bits, bucket_size=64
    )


def test_a_loaded_package_is_saved_again_as_it_was(tmp_path):
    save(post_training_copy(tiny_network(seed=0), bits=2), tmp_path / "a")
    save(load_package(tmp_path / "a")[0], tmp_path / "b")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_weights_that_were_changed_are_saved_as_floats(tmp_path):
    quantized = post_training_copy(tiny_network(seed=0), bits=2)
    quantized.reset_classifier(3)
    with torch.no_grad():
        next(quantized.net.parameters()).add_(0.01)
    loaded, card = load_package(save(quantized, tmp_path / "model"))
    assert "quantization" not in card and loaded.packed is None
    assert all(torch.equal(a, b) for a, b in zip(loaded.net.parameters(), quantized.net.parameters(), strict=True))


def test_damaged_packages_are_told(tmp_path):
    quantized = post_training_copy(tiny_network(seed=0), bits=2)
    name = next(iter(quantized.quantization["tensors"]))
    for change in (lambda t: t.pop(f"{name}:alpha"), lambda t: t.update({f"{name}:levels": t[f"{name}:levels"][:3]})):
        tensors = dict(quantized.packed)
        change(tensors)
        with pytest.raises(DataError, match="packed weights do not fit"):
            restore(tiny_network(seed=1), quantized.quantization, tensors)


def test_what_is_quantised_can_be_chosen():
    network = tiny_network(seed=0)
    everything = quantizable_names(network, batch_norm=True)
    assert everything == tuple(name for name, _ in network.net.named_parameters())
    usual, inner = quantizable_names(network), quantizable_names(network, first_last=False)
    norms = set(everything) - set(usual)
    assert norms and all("bn" in name or "norm" in name or "downsample" in name for name in norms)
    modules = dict(network.net.named_modules())
    assert all("Norm" in type(modules[name.rpartition(".")[0]]).__name__ for name in norms)
    left = set(usual) - set(inner)
    assert {usual[0]} | {name for name in usual if name.startswith("fc.")} == left


def test_a_transformer_is_quantised_too(tmp_path):
    network = tiny_network("test_vit", seed=0)
    quantized = post_training_copy(network, bits=4)
    assert {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= set(quantized.quantization["tensors"])
    assert not any("norm" in name for name in quantized.quantization["tensors"])
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_package(save(quantized, tmp_path / "m"))[0](image).logits, quantized(image).logits)
