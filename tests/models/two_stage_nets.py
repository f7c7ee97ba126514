"""Tiny detectors of two stages whose stages answer differently about each box, as trained ones do."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.batch_norms import draw_statistics
from tests.quantization.dense_nets import pictures
from visionkd.config.schema import NetworkConfig
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.open_heads import OpenVocabulary
from visionkd.models.detection.open_network import OpenVocabularyDetector, open_vocabulary
from visionkd.models.factory import create_network

SIZE = (64, 96)
CLASSES = ("red", "blue")
#: Mixed, so that the order of the classifiers is not that of the classes.
BASE = (False, True)


def plain_two_stages(
    name: str = "fasterrcnn_test_resnet", *, img_size: object = SIZE, boxes: tuple[int, int] | None = None,
    **args: object,
) -> DetectionNetwork:  # fmt: skip
    """Return a detector in eval mode.

    Args:
        name: Its name.
        img_size: Of its images.
        boxes: Anchors of each level and proposals in all that it looks at; None takes torchvision's numbers.
        args: Further arguments.
    """
    torch.manual_seed(0)
    own = {"channels": 16, "head_dim": 32} if name.startswith("fasterrcnn_test") else {}
    config = NetworkConfig(name=name, pretrained=False, img_size=img_size, args={**own, **args})  # type: ignore[arg-type]
    network = create_network(config, classes=CLASSES, in_training=True).eval()
    assert isinstance(network, DetectionNetwork)
    draw_statistics(network)
    enliven(network)
    if boxes is not None:
        rpn = network.net.rpn
        rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"] = boxes
    return network


def open_two_stages(*, boxes: tuple[int, int] = (60, 40), **args: object) -> OpenVocabularyDetector:
    """Return an open-vocabulary detector in eval mode, whose two heads are calibrated."""
    made = {"dim": 8, "base": BASE, "head_convs": 1, "head_dim": 16, "proposals": boxes, "rois": 16, "eval_scale": 4.0}
    texts = F.normalize(torch.randn(len(BASE), 8, generator=torch.Generator().manual_seed(1)), dim=1)
    network = open_vocabulary(
        plain_two_stages(**args), OpenVocabulary(**made), names=CLASSES, texts=texts  # type: ignore[arg-type]
    )  # fmt: skip
    enliven(network)
    return network.eval()


@torch.no_grad()
def enliven(network: DetectionNetwork) -> None:
    """Let objectness, classes and corrections of boxes vary."""
    torch.manual_seed(2)
    rpn, heads = network.net.rpn, network.net.roi_heads
    rpn.head.cls_logits.weight.mul_(200.0)
    rpn.head.bbox_pred.weight.mul_(50.0)
    heads.box_predictor.bbox_pred.weight.mul_(10.0)
    if not hasattr(heads.box_predictor, "cls_score"):
        return
    scores, seen = heads.box_predictor.cls_score, []
    handle = scores.register_forward_hook(lambda module, given, logits: seen.append(logits))
    network(pictures(2, seed=6))
    handle.remove()
    spread = 1.5 / seen[0].std(0)
    scores.bias.copy_(spread * (scores.bias - seen[0].mean(0)))
    scores.weight.mul_(spread[:, None])
