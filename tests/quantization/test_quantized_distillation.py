"""What a faithful implementation must show; the authors' own numbers are in tests/reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionkd.quantization.quantized_distillation import (
    fake_quantize_uniform,
    from_levels,
    quantize_uniform,
    scale,
    uniform_levels,
)

tensors = st.builds(
    lambda seed, shape, spread: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread,
    st.integers(0, 10**6),
    st.sampled_from([(1,), (7,), (3, 5, 4), (8, 9), (2, 3, 3, 3)]),
    st.sampled_from([1e-4, 1.0, 300.0]),
)
sizes = st.sampled_from([None, 1, 2, 8, 16, 1000])
bits = st.integers(1, 8)


@settings(deadline=None, max_examples=60)
@given(x=tensors, size=sizes, bits=bits)
def test_a_bucket_has_few_values_keeps_its_ends_and_errs_by_half_a_step_at_most(x, size, bits):
    s = 2**bits
    q, before = quantize_uniform(x, num_levels=s, bucket_size=size), scale(x, size)
    assert q.shape == x.shape
    after = before.bucketed(q)
    tolerance = 1e-6 * before.alpha + 1e-6 * before.bucketed(x).abs()
    assert all(len(row.unique()) <= s for row in after)
    for end in (torch.amin, torch.amax):
        assert ((end(after, 1, True) - end(before.bucketed(x), 1, True)).abs() <= tolerance.amax(1, True)).all()
    assert ((after - before.bucketed(x)).abs() <= before.alpha / (2 * (s - 1)) + 2 * tolerance).all()


@settings(deadline=None, max_examples=40)
@given(x=tensors, size=sizes, bits=bits)
def test_quantising_again_changes_nothing(x, size, bits):
    once = quantize_uniform(x, num_levels=2**bits, bucket_size=size)
    again = quantize_uniform(once, num_levels=2**bits, bucket_size=size)
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6 * float(x.abs().max()))


def test_rounding_at_random_gives_neighbouring_levels_and_the_value_on_average():
    x, generator = torch.linspace(0, 1, 11), torch.Generator().manual_seed(0)
    noise = torch.rand(4000, 1, 11, generator=generator)
    drawn = torch.stack([quantize_uniform(x, num_levels=4, noise=each) for each in noise])
    assert (drawn - x).abs().max() < 1 / 3 + 1e-6
    assert (drawn.mean(0) - x).abs().max() < 0.02
    assert (quantize_uniform(x, num_levels=4) - x).abs().max() > 0.1  # while the nearest level is biased


def test_buckets_follow_the_flattened_order_and_the_last_is_filled_with_its_last_value():
    x = torch.tensor([[0.0, 1.0, 5.0], [6.0, 2.0, 2.5]])
    buckets = scale(x, 4)
    assert buckets.alpha.flatten().tolist() == [6.0, 0.5] and buckets.beta.flatten().tolist() == [0.0, 2.0]
    assert buckets.values[1].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert torch.equal(buckets.plain(buckets.bucketed(x)), x)
    turned = x.t().contiguous().t()  # the same values, laid out otherwise in memory
    assert torch.equal(scale(turned, 4).values, buckets.values)


def test_the_gradient_goes_straight_through():
    x = torch.randn(4, 5, requires_grad=True)
    grad = torch.randn(4, 5)
    fake_quantize_uniform(x, num_levels=4, bucket_size=8).backward(grad)
    assert torch.equal(x.grad, grad)


def test_truncated_stops_the_gradient_of_large_weights():
    x = torch.tensor([-1.5, -1.0, 0.2, 1.01], requires_grad=True)
    fake_quantize_uniform(x, num_levels=4, backward="truncated").sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_complicated_is_the_derivative_with_the_levels_held():
    """Against autograd of alpha * (xhat + rounding error) + beta, in which alpha and beta depend on the extremes."""
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 7, dtype=torch.float64)
    fake_quantize_uniform(x, num_levels=4, bucket_size=8, backward="complicated").backward(grad)
    ours = x.grad.clone()
    y = x.detach().clone().requires_grad_()
    flat = torch.cat([y.flatten(), y.flatten()[-1:].detach().expand(3)]).view(3, 8)
    beta = flat.min(1, keepdim=True).values
    alpha = flat.max(1, keepdim=True).values - beta
    scaled = (flat - beta) / alpha
    rounded = scaled + ((scaled * 3).round() / 3 - scaled).detach()
    (alpha * rounded + beta).flatten()[:21].view(3, 7).backward(grad)
    torch.testing.assert_close(ours, y.grad)
    assert not torch.allclose(ours, grad)


def test_noise_is_drawn_from_the_default_generator():
    x = torch.randn(50)
    torch.manual_seed(1)
    once = fake_quantize_uniform(x, num_levels=4, stochastic=True)
    torch.manual_seed(1)
    assert torch.equal(once, fake_quantize_uniform(x, num_levels=4, stochastic=True))
    assert not torch.equal(once, fake_quantize_uniform(x, num_levels=4, stochastic=True))


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_a_constant_tensor_stays_as_it_is(value):
    x = torch.full((5, 3), value, requires_grad=True)
    for backward in ("straight_through", "complicated"):
        out = fake_quantize_uniform(x, num_levels=4, bucket_size=4, backward=backward)
        assert torch.equal(out, x)
        x.grad = None
        out.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))


def test_levels_give_the_tensor_back_to_the_bit():
    x = torch.randn(100)
    buckets = scale(x, 16)
    assert torch.equal(
        from_levels(uniform_levels(buckets, 8), 8, buckets), quantize_uniform(x, num_levels=8, bucket_size=16)
    )
