"""Packages that do not fit are refused."""

from __future__ import annotations

import copy

import pytest
import torch

from visionkd.errors import DataError
from visionkd.quantization.insert import float_network
from visionkd.quantization.restore import restore


@pytest.fixture
def parts(small):
    tensors = {name: value.clone() for name, value in small.net.state_dict().items()}
    return float_network(small), copy.deepcopy(small.quantization), tensors


def test_what_was_written_comes_back(small, parts):
    network, spec, tensors = parts
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(restore(network, spec, tensors).eval()(image).logits, small(image).logits)


def test_an_unknown_kind_a_missing_tensor_and_a_bad_scale_are_refused(parts):
    network, spec, tensors = parts
    with pytest.raises(DataError, match="quantised as 'int2', which this version does not know"):
        restore(network, {**spec, "kind": "int2"}, tensors)
    less = {name: value for name, value in tensors.items() if name != "quantizers.fc.scale"}
    with pytest.raises(DataError, match="lacks quantizers.fc.scale"):
        restore(network, spec, less)
    with pytest.raises(DataError, match="holds quantizers.more.scale"):
        restore(network, spec, {**tensors, "quantizers.more.scale": torch.ones(())})
    for value in (0.0, float("inf"), float("nan"), -1.0):
        with pytest.raises(DataError, match="'quantizers.fc.scale' of this package is no positive number"):
            restore(network, spec, {**tensors, "quantizers.fc.scale": torch.tensor(value)})
