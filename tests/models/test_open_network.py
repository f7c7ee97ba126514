"""A detector whose classes are texts: what it learns from, what it answers, and how its classes change."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError
from visionkd.hub.package import save_package
from visionkd.models.detection.open_heads import AlignedPool, OpenVocabulary
from visionkd.models.detection.open_network import OpenVocabularyDetector, kind_problem, open_vocabulary
from visionkd.models.factory import create_network, load_packaged

NAMES = ("a", "b", "c", "d", "e")
#: Base and novel classes mixed.
BASE = (True, False, True, True, False)
SIZE = (48, 64)


def texts(count: int = 5, *, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain(name: str = "fasterrcnn_test_resnet", **args):
    torch.manual_seed(0)
    given = {"channels": 8, "head_dim": 16, **args} if "fasterrcnn" in name else {"channels": 8}
    config = NetworkConfig(name=name, pretrained=False, img_size=SIZE, args=given)
    return create_network(config, classes=NAMES, in_training=True)


def spec(**changes) -> OpenVocabulary:
    few = {"head_convs": 1, "head_dim": 16, "proposals": (20, 10), "rois": 16}
    return OpenVocabulary(**{"dim": 8, "base": BASE, **few, **changes})


def detector(**changes) -> OpenVocabularyDetector:
    network = plain()
    torch.manual_seed(1)
    return open_vocabulary(network, spec(**changes), names=NAMES, texts=texts())


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def targets() -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[4.0, 4, 30, 40], [33, 10, 60, 44]])
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 3]), "crowd": torch.tensor([False, False])},
        {"boxes": boxes[:0], "labels": torch.tensor([], dtype=torch.int64), "crowd": torch.zeros(0, dtype=torch.bool)},
    ]


def test_training_gives_the_losses_of_both_stages_and_learning_gives_the_maps_too() -> None:
    network = detector()
    torch.manual_seed(5)
    losses = network(images(), targets()).losses
    torch.manual_seed(5)
    output, maps = network.learn(images(), targets())
    assert {name: value.item() for name, value in losses.items()} == {
        name: value.item() for name, value in output.losses.items()
    }
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert list(maps)[-1] == "pool" and maps["pool"].shape[1] == 8
    sum(output.losses.values()).backward()
    silent = {name.split(".")[2] for name, p in network.named_parameters() if p.grad is None}
    assert silent == {"object_head", "object_embed"}  # they learn from embeddings alone


def test_no_gradient_and_no_loss_depends_on_novel_texts() -> None:
    found = []
    for seed in (0, 7):
        network, other = detector(), texts()
        other[[1, 4]] = texts(2, seed=seed + 1)
        network.set_classes(NAMES, other, base=BASE)
        torch.manual_seed(5)
        loss = sum(network(images(), targets()).losses.values())
        loss.backward()
        found.append((loss.item(), network.net.backbone.fpn.inner_blocks[0][0].weight.grad))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_every_class_is_scored_by_its_own_text_wherever_novel_ones_stand() -> None:
    network = detector(base_power=None).eval()
    heads = network.second_stage
    x = torch.randn(6, 16)
    logits, _ = heads.box_predictor(x)
    p = heads.scores(logits, torch.empty(0))
    cosines = heads.box_predictor.embed(x) @ texts().T * 100
    background = heads.box_predictor.embed(x) @ F.normalize(heads.box_predictor.classifier.background).T * 100
    expected = torch.cat([cosines, background], 1).softmax(1)[:, :5]
    assert torch.allclose(p, expected, atol=1e-6)
    wanted = heads.losses(logits, torch.zeros(6, 4), torch.tensor([4, 0, 1, 1, 3, 0]), torch.zeros(6, 4))
    index = torch.tensor([3, 5, 0, 0, 2, 5])
    assert torch.allclose(
        wanted["loss_classifier"], F.cross_entropy(torch.cat([cosines, background], 1), index), atol=1e-4
    )


def test_calibration_trusts_one_head_on_base_and_the_other_on_novel_classes() -> None:
    network = detector().eval()
    heads = network.second_stage
    pooled, logits = torch.randn(6, 8, 7, 7), heads.box_predictor(torch.randn(6, 16))[0]
    network.calibrate(None)
    p = heads.scores(logits, pooled)
    q = (heads.object_embed(heads.object_head(pooled)) @ texts().T * 100).softmax(1)
    network.calibrate(1.0)
    base = torch.tensor(BASE)
    assert torch.allclose(heads.scores(logits, pooled), torch.where(base, p, q), atol=1e-6)
    network.calibrate(2 / 3)
    power = torch.where(base, 2 / 3, 1 / 3)
    assert torch.allclose(heads.scores(logits, pooled), p**power * q ** (1 - power), atol=1e-5)
    assert network.model_args["open_vocabulary"]["base_power"] == 2 / 3


def test_boxes_belong_to_classes_and_are_cut_and_thinned() -> None:
    network = detector().eval()
    heads = network.second_stage
    boxes = torch.tensor([[-5.0, 0, 20, 20], [0, 0, 20, 20], [30, 30, 90, 90], [1, 1, 1, 5]])
    scores = torch.zeros(4, 5)
    scores[0, 1], scores[1, 1], scores[2, 4], scores[3, 0], scores[1, 0] = 0.5, 0.6, 0.3, 0.9, 0.2
    found = heads._found(boxes, scores, SIZE)
    assert found["labels"].tolist() == [2, 5, 1]  # one of two that overlap, and none without an area
    assert found["boxes"].tolist() == [[0, 0, 20, 20], [30, 30, 64, 48], [0, 0, 20, 20]]
    heads.score_thresh, heads.detections_per_img = 0.25, 1
    assert heads._found(boxes, scores, SIZE)["labels"].tolist() == [2]


def test_a_package_answers_as_the_network_did(tmp_path) -> None:
    network = detector(encoder="runs/x", identity="ab", templates=("a {}", "{}")).eval()
    save_package(network, tmp_path / "m", task="detection", classes=None, metrics={}, origin={})
    again, _ = load_packaged(tmp_path / "m")
    assert isinstance(again, OpenVocabularyDetector)
    assert (again.classes, again.base, again.spec) == (NAMES, BASE, network.spec)
    assert torch.allclose(again.texts, texts())
    with torch.no_grad():
        for mine, other in zip(network(images()).boxes, again(images()).boxes, strict=True):
            assert torch.equal(mine.boxes, other.boxes) and torch.equal(mine.scores, other.scores)
            assert torch.equal(mine.labels, other.labels)


def test_another_class_appends_a_column_and_trains_nothing() -> None:
    network = detector(base_power=None).eval()
    state = {name: value.clone() for name, value in network.state_dict().items() if not name.endswith("texts")}
    heads = network.second_stage
    x = torch.randn(6, 16)
    before = heads.box_predictor(x)[0][:, heads.place]
    network.set_classes(("x", *NAMES), torch.cat([texts(1, seed=3), texts()]), base=(False, *BASE))
    after = heads.box_predictor(x)[0][:, heads.place]
    assert torch.equal(after[:, 1:], before) and network.num_classes == 6 == network.model_args["num_classes"]
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    network.select_classes([3, 1])
    assert (network.classes, network.base) == (("c", "a"), (True, True))
    assert torch.allclose(network.texts, texts()[[2, 0]])
    with pytest.raises(ValueError, match="for 1 classes"):
        network.set_classes(("x",), texts(), base=(True,))
    with pytest.raises(ValueError, match="embeddings of 8"):
        network.set_classes(("x",), torch.zeros(1, 9), base=(True,))


def test_pseudo_boxes_let_the_box_head_learn_novel_classes() -> None:
    network = detector()
    target = [{**targets()[0], "labels": torch.tensor([1, 4])}, targets()[1]]
    network.learn_novel(True)
    assert sum(network(images(), target).losses.values()).isfinite()
    assert network.second_stage.num_base == 3  # calibration still knows which ones are novel
    network.learn_novel(False)
    assert network(images(), target).losses["loss_classifier"].isinf()


def test_what_cannot_become_one_is_told() -> None:
    classifier = create_network(NetworkConfig(name="cifar_resnet8", pretrained=False), num_classes=5, in_training=True)
    for network in (plain("fcos_test_resnet"), classifier):
        with pytest.raises(RequestError, match="no fasterrcnn on a backbone"):
            open_vocabulary(network, spec(), names=NAMES, texts=texts())
    published = NetworkConfig(name="fasterrcnn_mobilenet_v3_large_320_fpn", pretrained=False)
    coco = create_network(published, in_training=True)
    assert "count as novel" in kind_problem(coco)
    network = detector(identity="ab", encoder="runs/x")
    with pytest.raises(RequestError, match="another encoder"):
        open_vocabulary(network, spec(identity="cd"), names=NAMES, texts=texts())
    with pytest.raises(RequestError, match="options.head_dim: 32 is asked for, and the student has 16"):
        open_vocabulary(network, spec(identity="ab", head_dim=32), names=NAMES, texts=texts())


def test_a_trained_one_goes_on_with_its_weights_and_other_classes() -> None:
    network = detector(identity="ab")
    state = {name: value.clone() for name, value in network.net.state_dict().items() if not name.endswith("texts")}
    others = spec(identity="ab", base=(False, True), rois=8)
    again = open_vocabulary(network, others, names=("x", "y"), texts=texts(2, seed=9))
    assert again.classes == ("x", "y") and again.second_stage.fg_bg_sampler.batch_size_per_image == 8
    assert all(torch.equal(value, again.net.state_dict()[name]) for name, value in state.items())
    assert torch.allclose(again.texts, texts(2, seed=9))


def test_norms_of_the_pyramid_train_where_those_of_the_backbone_are_frozen() -> None:
    network = open_vocabulary(plain(frozen_norm=True), spec(), names=NAMES, texts=texts())

    def norms(part: torch.nn.Module) -> set[str]:
        names = {type(module).__name__ for module in part.modules()}
        return {name for name in names if "BatchNorm" in name}

    backbone = network.net.backbone
    assert norms(backbone.fpn) == {"BatchNorm2d"} and norms(backbone.body) == {"FrozenBatchNorm2d"}


def test_regions_are_pooled_where_their_size_says_with_pixels_at_their_centres() -> None:
    pool = AlignedPool((4, 8))
    # a map that holds each pixel's own place: the mean of a region is its centre
    maps = {}
    for number, stride in enumerate((4, 8)):
        rows, columns = torch.meshgrid(
            torch.arange(128 // stride) * stride + stride / 2, torch.arange(128 // stride) * stride + stride / 2,
            indexing="ij",
        )  # fmt: skip
        maps[str(number)] = torch.stack([columns, rows, torch.full_like(rows, stride)])[None].float()
    boxes = [torch.tensor([[16.0, 20, 48, 60], [8, 8, 88, 80]])]
    found = pool(maps, boxes).mean((2, 3))
    # sqrt(32 * 40) / 56 is below 1, sqrt(80 * 72) / 56 is not, but below 2
    assert torch.allclose(found, torch.tensor([[32.0, 40, 4], [48, 44, 4]]), atol=1e-3)
    large = pool(maps, [torch.tensor([[0.0, 0, 112, 113]])])
    assert math.isclose(float(large[0, 2].mean()), 8)
    assert pool(maps, [torch.zeros(0, 4)]).shape == (0, 3, 7, 7)
