from __future__ import annotations

import pytest
import torch

from tests.methods.contract import tiny_network
from visionkd.errors import WorkError
from visionkd.teachers.fit import cache_features, fit_probe
from visionkd.teachers.preflight import preflight

CPU = torch.device("cpu")


def clusters(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes, badly scaled: a probe must not depend on units."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4.0 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 3, (count,), generator=generator)
    features = centres[targets] + torch.randn(count, 6, generator=generator)
    return features * torch.tensor([1e3, 1.0, 1e-3, 1.0, 1.0, 1.0]) + 50.0, targets


def test_probe_separates_what_is_separable_on_samples_it_never_saw():
    probe = fit_probe(*clusters(300, seed=1), num_classes=3, seed=0)
    features, targets = clusters(200, seed=2)
    logits = features @ probe.weight.T + probe.bias
    assert (logits.argmax(1) == targets).float().mean() > 0.97
    assert probe.holdout_top1 > 95 and probe.num_images == 300


def test_probe_survives_constant_features_and_few_samples():
    features, targets = torch.ones(3, 4), torch.tensor([0, 1, 2])
    probe = fit_probe(features, targets, num_classes=3, seed=0)
    assert torch.isfinite(probe.weight).all() and torch.isfinite(probe.bias).all()


def test_probe_is_deterministic():
    one, other = (fit_probe(*clusters(100, seed=1), num_classes=3, seed=5) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and one.l2 == other.l2


def test_cached_features_put_into_the_network_give_the_probes_logits():
    network = tiny_network(seed=0).eval()
    batches = [(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])), (torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
    counted = []
    features, targets = cache_features(network, batches, device=CPU, on_batch=counted.append)
    assert features.shape == (6, network.embedding_dim) and targets.tolist() == [0, 1, 2, 3, 0, 1] and counted == [4, 2]
    probe = fit_probe(features, targets, num_classes=4, seed=0)
    network.set_classifier(probe.weight, probe.bias, ("a", "b", "c", "d"))
    with torch.no_grad():
        logits = network(torch.cat([images for images, _ in batches])).logits
    torch.testing.assert_close(logits, features @ probe.weight.T + probe.bias, rtol=1e-3, atol=1e-3)


def test_no_images_is_an_error():
    with pytest.raises(WorkError, match="no images"):
        cache_features(tiny_network(seed=0), [], device=CPU)


def look(network, targets=None, *, num_classes=4, count=64):
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if targets is None:
        with torch.no_grad():
            targets = network.eval()(images).logits.argmax(1)
    return preflight(network, [(images, targets)], num_classes=num_classes, device=CPU, name="t")


def test_preflight_freezes_and_praises_a_teacher_that_knows_the_classes():
    network = tiny_network(seed=0)
    found = look(network)
    assert found.top1 == 100.0 and all(finding.status == "ok" for finding in found.findings)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_preflight_warns_of_a_teacher_at_chance():
    targets = torch.arange(64) % 4
    found = look(tiny_network(seed=0), targets)
    assert found.findings[-1].status == "warning" and "chance" in found.findings[-1].text


def test_preflight_warns_of_other_classes():
    found = look(tiny_network(seed=0), torch.zeros(64, dtype=torch.long), num_classes=7)
    assert found.top1 is None and found.findings[-1].status == "warning"


def test_preflight_refuses_nan():
    network = tiny_network(seed=0)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(WorkError, match="NaN"):
        look(network, torch.zeros(64, dtype=torch.long))


def test_preflight_refuses_a_teacher_that_is_not_deterministic():
    network = tiny_network(seed=0)
    network.net.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    with pytest.raises(WorkError, match="deterministic"):
        look(network, torch.zeros(64, dtype=torch.long))
