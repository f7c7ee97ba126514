from __future__ import annotations

import re
from pathlib import Path

import pytest

from visionkd.benchmark.complexity import measure_complexity
from visionkd.config.schema import NetworkConfig
from visionkd.models.factory import create_network
from visionkd.models.segmentation.heads import SPECS
from visionkd.models.segmentation.names import HEADS
from visionkd.models.segmentation.nets import OWN_ARGS

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("head", HEADS)
def test_the_page_says_what_a_head_costs(head: str) -> None:
    row = re.search(rf"^\| `{head}` \|.*\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) M \| ([\d.]+) G \|$", PAGE, re.MULTILINE)
    stride, deepest, channels, params_m, macs_g = map(float, row.groups())
    name = f"{head}_tf_efficientnet_lite0"
    config = NetworkConfig(name=name, pretrained=False, img_size=(360, 480))
    network = create_network(config, num_classes=11, in_training=True)
    found = measure_complexity(network)
    assert (found.params_m, found.macs_g) == (pytest.approx(params_m, abs=0.006), pytest.approx(macs_g, abs=0.006))
    assert network.stride == stride
    assert (SPECS[head].output_stride, SPECS[head].channels) == (deepest, channels)


def test_the_page_names_every_argument() -> None:
    assert all(f"`{name}`" in PAGE for name in OWN_ARGS)
