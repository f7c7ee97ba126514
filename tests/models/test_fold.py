from __future__ import annotations

import pytest
import torch
from torch import nn

from visionkd.config.schema import NetworkConfig
from visionkd.models.factory import create_network
from visionkd.models.fold import fold_batch_norm


def network(name: str):
    """A network whose norms have statistics of their own, as after a training."""
    torch.manual_seed(0)
    made = create_network(NetworkConfig(name=name, pretrained=False, img_size=32), num_classes=5, in_training=True)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return made


def norms(made) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in made.modules())


@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "test_resnet", "test_efficientnet", "test_byobnet", "torchvision/mobilenet_v3_small"]
)
def test_folded_network_computes_the_same(name):
    made = network(name)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    folded = fold_batch_norm(made)
    assert norms(made) > 0 and norms(folded) == 0
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(images).logits, made(images).logits, rtol=1e-3, atol=1e-4)
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_nothing_to_fold():
    made = network("test_vit")
    assert fold_batch_norm(made) is made


def test_a_norm_that_shares_its_input_is_left_alone():
    made = network("cifar_resnet8")

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
            nn.init.uniform_(self.norm.running_mean, 1.0, 2.0)

        def forward(self, x):
            x = self.conv(x)
            return self.head((x + self.norm(x)).mean((2, 3)))

    made.net = Shared()
    assert fold_batch_norm(made) is made
