from __future__ import annotations

import pytest
import timm
import torch

from visionkd.models.free_mobilenet import FreeMobileNetV2


def test_what_is_not_said_is_timms_mobilenet() -> None:
    with torch.device("meta"):
        free, known = timm.create_model("mobilenetv2_free"), timm.create_model("mobilenetv2_100")
    assert {k: v.shape for k, v in free.state_dict().items()} == {k: v.shape for k, v in known.state_dict().items()}


def test_stages_have_depths_kernels_expansions_and_strides_of_their_own() -> None:
    args = {"depths": [1, 2, 1, 1, 3, 1], "kernels": [3, 5, 7, 3, 5, 3], "expansions": [2, 3, 4, 6, 2, 3]}
    with torch.device("meta"):
        net = timm.create_model("mobilenetv2_free", width=0.5, strides=[1, 2, 2, 1, 2, 1], num_classes=4, **args).eval()
        assert net.forward_features(torch.empty(1, 3, 32, 32)).shape == (1, 1280, 2, 2)
        assert net(torch.empty(1, 3, 32, 32)).shape == (1, 4)
    stages = list(net.blocks)[1:]
    assert [len(stage) for stage in stages] == args["depths"]
    assert [stage[0].conv_dw.kernel_size[0] for stage in stages] == args["kernels"]
    widened = [stage[0].conv_pw.out_channels // stage[0].conv_pw.in_channels for stage in stages]
    assert widened == args["expansions"]


@pytest.mark.parametrize("args", [{"depths": (1,)}, {"kernels": (3, 3, 4, 3, 3, 3)}, {"expansions": (0,) * 6}])
def test_wrong_arguments(args: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(args))):
        FreeMobileNetV2(**args)
