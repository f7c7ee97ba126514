from __future__ import annotations

import pytest
import torch

from visionkd.quantization.fake_quant import (
    ActivationQuantizer,
    WeightQuantizer,
    fake_quantize,
    learned_fake_quantize,
    quantize,
    symmetric_scale,
    weight_amax,
)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ties_go_to_even_and_the_ends_saturate():
    x = torch.tensor([0.25, 0.75, -0.25, -0.75, 63.5, 64.0, -64.0, -64.3, 1e9])
    expected = torch.tensor([0.0, 1.0, 0.0, -1.0, 63.5, 63.5, -64.0, -64.0, 63.5])
    assert torch.equal(fake_quantize(x, torch.tensor(0.5)), expected)
    assert torch.equal(quantize(x, torch.tensor(0.5)), (expected * 2).to(torch.int8))


def test_the_gradient_stops_outside_of_the_range_alone():
    scale = torch.tensor(1.5) / 127
    x = torch.tensor([-1.6, -1.5, 0.3, 1.5, 1.5001, 3.0], requires_grad=True)
    fake_quantize(x, scale).backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0, 0.0]
    # a value that torch's own operator lets through, as it still rounds into the range
    own = torch.tensor([1.5001], requires_grad=True)
    torch.fake_quantize_per_tensor_affine(own, float(scale), 0, -128, 127).backward()
    assert own.grad.item() == 1.0


@pytest.mark.parametrize("axis", [0, 1])
def test_the_largest_weight_of_each_channel_keeps_value_and_gradient(axis):
    weight = values(5, 6, 3, 3).requires_grad_()
    scale = symmetric_scale(weight_amax(weight, axis))
    rounded = fake_quantize(weight, scale, axis=axis, qmin=-127)
    torch.testing.assert_close(weight_amax(rounded, axis), weight_amax(weight, axis))
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight)), "nothing lies outside of a range made of all values"
    per_channel = [fake_quantize(w, s) for w, s in zip(weight.detach().unbind(axis), scale, strict=True)]
    assert torch.equal(rounded.detach(), torch.stack(per_channel, axis))


def test_an_all_zero_channel_stays_zero():
    weight = values(3, 4)
    weight[1] = 0.0
    quantizer = WeightQuantizer(3)
    output = quantizer(weight)
    assert torch.equal(output[1], torch.zeros(4)) and quantizer.scale[1] == 1.0


def test_weights_never_take_the_lowest_integer_and_follow_until_frozen():
    quantizer, weight = WeightQuantizer(8), values(8, 50)
    quantizer(weight)
    first = quantizer.scale.clone()
    integers = quantizer(2 * weight) / quantizer.scale[:, None]
    assert torch.equal(quantizer.scale, 2 * first)
    assert integers.abs().max() <= 127.001
    quantizer.frozen = True
    clipped = quantizer(6 * weight) / quantizer.scale[:, None]
    assert torch.equal(quantizer.scale, 2 * first)
    assert clipped.min() >= -127.001 and clipped.max() <= 127.001


def test_an_exported_graph_takes_torchs_operators_and_the_same_numbers(monkeypatch):
    x, weight = values(4, 16), values(8, 16, seed=1)
    activation, weights = ActivationQuantizer(), WeightQuantizer(8)
    activation.set_amax(2.0)
    activation.mode = "quantize"
    expected = activation(x), weights(weight)
    monkeypatch.setattr("visionkd.quantization.fake_quant.exporting", lambda: True)
    for ours, theirs in zip(expected, (activation(x), weights(weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_modes_of_an_activation():
    quantizer, seen = ActivationQuantizer(), []
    x = values(10)
    quantizer.observer = seen.append
    assert torch.equal(quantizer(x), x) and not seen
    quantizer.mode = "observe"
    assert torch.equal(quantizer(x), x) and torch.equal(seen[0], x)
    quantizer.mode = "quantize"
    assert quantizer(x).isnan().all(), "a scale that was never set gives no number rather than a wrong one"
    quantizer.set_amax(1.0)
    assert torch.equal(quantizer(x), fake_quantize(x, torch.tensor(1 / 127)))
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


def test_a_learned_scale_has_the_gradient_of_lsq():
    x, scale = values(40), torch.tensor(0.02, requires_grad=True)
    output = learned_fake_quantize(x, scale)
    torch.testing.assert_close(output, fake_quantize(x, scale.detach()))
    upstream = values(40, seed=1)
    output.backward(upstream)
    ratio = x / 0.02
    inside = (ratio >= -128) & (ratio <= 127)
    each = torch.where(inside, ratio.round() - ratio, ratio.clamp(-128, 127))
    torch.testing.assert_close(scale.grad, (upstream * each).sum() / (40 * 127) ** 0.5, rtol=1e-4, atol=1e-6)


def test_a_learned_activation_trains_its_scale_and_a_plain_one_does_not():
    for learned in (True, False):
        quantizer = ActivationQuantizer(learned=learned).train()
        quantizer.set_amax(1.0)
        quantizer.mode = "quantize"
        x = values(20).requires_grad_()
        quantizer(x).square().sum().backward()
        assert (quantizer.scale.grad is not None) == learned
        assert list(quantizer.state_dict()) == ["scale"]
