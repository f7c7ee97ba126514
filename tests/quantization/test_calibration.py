from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.quantization.conftest import calibrated, images, tiny
from visionkd.errors import DataError
from visionkd.hub.package import load_package, save_package
from visionkd.quantization.bias_correction import correct_bias
from visionkd.quantization.calibration import calibrate
from visionkd.quantization.equalization import equalize, find_chains
from visionkd.quantization.fold import fold_quantized
from visionkd.quantization.insert import (
    Int8Scheme,
    activation_quantizers,
    float_network,
    freeze,
    int8_layers,
    quantize_network,
    set_mode,
    unfreeze,
)
from visionkd.quantization.ranges import HistogramObserver, MaxObserver, mse_amax, percentile_amax


def test_a_histogram_grows_with_its_bins_as_wide_as_before():
    observer = HistogramObserver(bins=100)
    observer(torch.zeros(7))  # says nothing about the width, and is not forgotten
    observer(torch.linspace(-1.0, 1.0, 2001))
    assert len(observer.counts) == 100 and observer.counts.sum() == 2008
    observer(torch.tensor([2.5, 0.1]))
    assert len(observer.counts) == 250 and observer.counts.sum() == 2010 and observer.counts[249] == 1
    assert observer.edges[-1] == pytest.approx(2.5)


def test_the_mean_squared_error_is_the_least_of_all_candidates():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
    observer = HistogramObserver(bins=1024)
    observer(x)
    found = mse_amax(observer.counts, observer.edges)

    def error(amax: float) -> float:
        scale = amax / 127
        return float(((x / scale).round().clamp(-128, 127) * scale - x).square().mean())

    assert 0.3 * observer.amax < found < observer.amax
    assert error(found) <= 1.01 * min(error(amax) for amax in np.linspace(0.15, 1.0, 40) * observer.amax)


def test_a_percentile_leaves_out_the_share_that_it_says():
    observer = HistogramObserver(bins=1000)
    observer(torch.linspace(0.0, 1.0, 10_001))
    assert percentile_amax(observer.counts, observer.edges, 90.0) == pytest.approx(0.9, abs=2e-3)
    assert percentile_amax(np.array([9.0, 1.0]), np.array([0.0, 1.0, 2.0]), 60.0) > 0


@pytest.mark.parametrize("calibration", ["max", "entropy", "percentile", "mse"])
def test_calibration_finds_ranges_within_what_was_seen(calibration):
    network = quantize_network(tiny("cifar_resnet8", width=0.5), scheme=Int8Scheme(calibration=calibration))
    exact = float_network(network).eval()(images()).logits
    found = calibrate(network.train(), images(32, seed=1).split(16))
    assert found.images == 32 and network.training
    for name, amax in found.ranges.items():
        assert 0 < amax <= found.largest[name] * (1 + 1e-3)  # the upper bound of the last bin
    if calibration == "max":
        assert found.ranges == found.largest
    error = (network.eval()(images()).logits - exact).abs().max()
    assert error < 0.1 * exact.abs().max()


def test_calibration_refuses_what_gives_no_ranges():
    network = quantize_network(tiny("cifar_resnet8", width=0.5), scheme=Int8Scheme())
    with pytest.raises(DataError, match="3 images for calibration, and at least 16"):
        calibrate(network, [images(3)])
    with pytest.raises(DataError, match="0 images"):
        calibrate(network, [])
    with pytest.raises(DataError, match="All 16 images for calibration are the same"):
        calibrate(network, [images(1).expand(16, -1, -1, -1)])
    broken = images(16)
    broken[3, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match="'conv1' is not finite"):
        calibrate(network, [broken])
    network.net.bn1.weight.data.zero_()
    network.net.bn1.bias.data.fill_(-1.0)
    with pytest.raises(DataError, match="'layer1_0_conv1' is zero on all calibration images"):
        calibrate(network, [images(16)])


def test_max_of_nothing_but_numbers_is_no_range():
    observer = MaxObserver()
    observer(torch.tensor([float("nan"), 1.0]))
    observer(torch.tensor([1.0]))
    assert not np.isfinite(observer.amax)


@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenetv2_035", "tf_efficientnet_lite0"])
def test_folding_batch_norms_changes_no_integer(name):
    network = calibrated(tiny(name)).eval()
    with torch.no_grad():  # a channel that is turned round, and one that is switched off
        norm = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
        norm.weight[0], norm.weight[1] = -norm.weight[0], 0.0
    folded = fold_quantized(network)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert folded.quantization["folded"] and "folded" not in network.quantization
    before, after = network(images()).logits, folded(images()).logits
    # isolated values on a tie may fall to the other side, one step away, which changes the image they belong to
    assert (before - after).abs().amax(1).median() < 1e-4 * before.abs().max()
    first = next(iter(int8_layers(network)))
    layers = int8_layers(network)[first], int8_layers(folded)[first]
    integers = [(layer.weight / layer.weight_quantizer.scale[:, None, None, None]).round() for layer in layers]
    signs = norm.weight.sign()[:, None, None, None]
    assert torch.equal(signs * integers[0], integers[1])


def test_a_folded_network_goes_through_a_package(small, tmp_path):
    folded = fold_quantized(small)
    save_package(folded, tmp_path / "model", task="classification", classes=None, metrics={}, origin={})
    loaded, _ = load_package(tmp_path / "model")
    assert torch.equal(loaded(images()).logits, folded(images()).logits)
    assert loaded.quantization == folded.quantization


def test_weight_ranges_stay_once_frozen_and_weights_within_them(small):
    network = calibrated(tiny("cifar_resnet8", width=0.5))
    unfreeze(network)
    freeze(network)
    scales = {name: layer.weight_quantizer.scale.clone() for name, layer in int8_layers(network).items()}
    with torch.no_grad():
        for layer in int8_layers(network).values():
            layer.weight *= 1.5
    freeze(network)
    for name, layer in int8_layers(network).items():
        quantizer = layer.weight_quantizer
        assert torch.equal(quantizer.scale, scales[name])
        assert weight_ratio(layer) <= 127.0001


def weight_ratio(layer) -> float:
    shape = [-1, *(1,) * (layer.weight.ndim - 1)]
    return float((layer.weight / layer.weight_quantizer.scale.reshape(shape)).abs().max().detach())


def test_bias_correction_takes_back_the_shift_of_each_channel():
    network = calibrated(tiny("cifar_resnet8", width=0.5)).eval()
    layer = int8_layers(network)["layer1.0.conv1"]
    with torch.no_grad():  # coarse steps, so that the shift is large
        for quantizer in activation_quantizers(network).values():
            quantizer.scale *= 6
    exact = float_network(network)
    calibration = images(32, seed=1)

    def shift() -> torch.Tensor:
        return (network(calibration).logits - exact(calibration).logits).mean(0).abs().mean()

    before, mean = shift(), network.net.layer1.get_submodule("0").bn1.running_mean.clone()
    found = correct_bias(network, calibration.split(16))
    assert set(found) == set(int8_layers(network)), "each layer has a bias, or a batch norm behind it"
    torch.testing.assert_close(network.net.layer1.get_submodule("0").bn1.running_mean, mean - found["layer1.0.conv1"])
    assert shift() < before and layer.bias is None


@pytest.mark.parametrize("name", ["mobilenetv2_free", "cifar_resnet8"])
def test_equalisation_changes_ranges_and_not_the_network(name):
    args = {"width": 0.25, "depths": (1, 2, 1, 1, 1, 1)} if name == "mobilenetv2_free" else {"width": 0.5}
    network = quantize_network(tiny(name, **args).eval(), scheme=Int8Scheme(calibration="max"))
    calibration = images(16, seed=1)
    chains = find_chains(network)
    assert any(chain.ceiling for chain in chains) == (name == "mobilenetv2_free")
    exact = float_network(network)(calibration).logits
    factors = equalize(network, [calibration])
    assert set(factors) == {chain.second for chain in chains} and len(factors) >= 3
    assert any((factor != 1).any() for factor in factors.values())
    set_mode(network, "off")
    torch.testing.assert_close(network(calibration).logits, exact, rtol=1e-3, atol=1e-4)
    if name == "cifar_resnet8":  # ReLU has no ceiling: exact on any image
        other = images(16, seed=2)
        before = quantize_network(tiny(name, **args).eval(), scheme=Int8Scheme())
        set_mode(before, "off")
        torch.testing.assert_close(network(other).logits, before(other).logits, rtol=1e-3, atol=1e-4)


def test_equalised_channels_in_front_of_a_depthwise_convolution_have_like_ranges():
    network = quantize_network(tiny("torchvision/shufflenet_v2_x0_5").eval(), scheme=Int8Scheme())
    chain = next(c for c in find_chains(network) if network.net.get_submodule(c.second).groups > 1)

    def spread() -> float:
        seen = []
        quantizer = activation_quantizers(network)[chain.quantizer]
        set_mode(network, "observe")
        quantizer.observer = seen.append
        network(images(16))
        quantizer.observer = None
        amax = seen[0].amax((0, 2, 3))
        return float(amax.max() / amax[amax > 0].median())

    before = spread()
    equalize(network, [images(16)])
    assert spread() < before
