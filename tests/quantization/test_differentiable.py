from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionkd.quantization.differentiable import (
    allocate,
    nearest,
    quantile_points,
    quantize_to_points,
    uniform_points,
)
from visionkd.quantization.quantized_distillation import quantize_uniform, scale


def example(num_points=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 7, dtype=torch.float64, generator=generator)
    points = torch.rand(num_points, dtype=torch.float64, generator=generator).sort().values
    return x, points.requires_grad_()


@pytest.mark.parametrize("size", [None, 16])
def test_the_gradient_of_a_point_is_that_of_finite_differences(size):
    x, points = example()
    weights = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(at):
        return (quantize_to_points(x, at, bucket_size=size).tanh() * weights).sum()

    loss(points).backward()
    for place in range(len(points)):
        step = torch.zeros_like(points)
        step[place] = 1e-7
        with torch.no_grad():
            assert torch.equal(nearest(scale(x, size).values, points + step), nearest(scale(x, size).values, points))
            numeric = (loss(points + step) - loss(points - step)) / 2e-7
        assert points.grad[place].item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-7)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), size=st.sampled_from([None, 5, 16, 100]))
def test_gradients_of_points_add_up_and_the_weights_get_theirs_straight_through(seed, size):
    x, points = example(seed=seed)
    x.requires_grad_()
    grad = torch.randn_like(x)
    quantize_to_points(x, points, bucket_size=size).backward(grad)
    buckets = scale(x, size)
    assert points.grad.sum().item() == pytest.approx((buckets.bucketed(grad, fill=0.0) * buckets.alpha).sum().item())
    assert torch.equal(x.grad, grad)
    unused = set(range(len(points))) - set(nearest(buckets.plain(buckets.values), points.detach()).unique().tolist())
    assert all(points.grad[place] == 0 for place in unused)


def test_an_unused_point_gets_no_gradient():
    points = torch.tensor([0.0, 0.5, 5.0], requires_grad=True)
    quantize_to_points(torch.linspace(0, 1, 9), points).sum().backward()
    assert points.grad[2] == 0 and (points.grad[:2] > 0).all()


def test_ties_go_to_the_upper_point():
    assert nearest(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 1, 1, 2, 2]


def test_equally_distant_points_are_uniform_quantisation():
    x = torch.randn(40)
    torch.testing.assert_close(
        quantize_to_points(x, uniform_points(x, 4), bucket_size=8), quantize_uniform(x, num_levels=4, bucket_size=8)
    )


def test_quantiles_are_sorted_reach_both_ends_and_share_the_weights_out():
    x = torch.randn(1000).exp()
    points = quantile_points(x, 8)
    assert torch.equal(points, points.sort().values) and points[0] == 0 and points[-1] == 1
    counts = torch.bincount(nearest(scale(x).values.flatten(), points), minlength=8)
    assert counts[1:-1].min() > 100  # equal distances would leave most of these almost empty
    assert torch.bincount(nearest(scale(x).values.flatten(), uniform_points(x, 8)), minlength=8).min() < 20


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(2, 64)), min_size=1, max_size=12),
    st.sampled_from(["points", "bits"]),
)
def test_an_allocation_keeps_the_total(pairs, of):
    norms, given_ = [norm for norm, _ in pairs], [number for _, number in pairs]
    assert sum(allocate(norms, given_, of=of)) == sum(given_)


def test_an_allocation_follows_the_gradients_and_takes_no_more_than_half():
    assert allocate([1.0, 1.0, 8.0], 16) == [11, 10, 27]
    assert allocate([0.0, 0.0], 4) == [4, 4]
    with pytest.raises(ValueError, match="2 initial numbers for 1"):
        allocate([1.0], [4, 4])
